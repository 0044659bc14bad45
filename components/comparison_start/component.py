"""The warm start that all cells of a comparison share, and the MLflow parent run above them."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def comparison_start(study: str, warm_start: Output[Model]) -> NamedTuple("Outputs", [("parent_run_id", str)]):
    """Check the study, open its MLflow parent run and train the supervised warm start.

    Args:
        study: The whole study as JSON.
        warm_start: Warm-started policy as a Hugging Face checkpoint directory.

    Returns:
        parent_run_id: The MLflow run under which every cell is a child.
    """
    from dfpo_core import comparison as step

    return (step.start(study, warm_start.path),)
