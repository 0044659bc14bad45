"""One cell of a comparison: an algorithm in a setting at a seed."""

from kfp import dsl
from kfp.dsl import Input, Model

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def comparison_cell(study: str, cell: str, warm_start: Input[Model]) -> str:
    """Train and measure one cell; its record is an artifact of its MLflow child run. A cell that has a record is not run again.

    Args:
        study: The whole study as JSON.
        cell: Key of the cell, `setting.algorithm.seed`.
        warm_start: Directory written by comparison_start.

    Returns:
        The id of the MLflow run that holds the record.
    """
    from dfpo_core import comparison as step

    return step.run_tracked(study, cell, warm_start.path)
