"""Tables and figures of a comparison from the records of its cells."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def comparison_report(study: str, parent_run_id: str, cell_runs: list, results: Output[Dataset], report: Output[HTML]):
    """Collect the records of all cells and write results.json, the tables, the figures and the HTML report.

    Args:
        study: The whole study as JSON.
        parent_run_id: The MLflow run of the study; it gets the report as an artifact and is closed.
        cell_runs: MLflow runs of the cells.
        results: Folder with results.json, summary.md and the figures.
        report: The report as one HTML file.
    """
    from dfpo_core import comparison as step

    step.report(study, parent_run_id, cell_runs, results.path, report.path)
