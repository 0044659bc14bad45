"""Read, validate and split the data."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare_data(config: str, parent_run_id: str, data: Output[Dataset], metrics: Output[Metrics]):
    """Read the sources, validate rows, drop duplicates across splits, and write train, id_test and ood_test as Parquet.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        data: Folder with train.parquet, id_test.parquet, ood_test.parquet, rejects.jsonl, removed.jsonl, report.json and data_report.html.
        metrics: Row counts.
    """
    from math import isfinite

    from dfpo_core.data import prepare as step

    summary = step.run(config, parent_run_id, data.path)
    metrics.metadata.update({name: value for name, value in summary.items() if isfinite(value)})
    data.metadata.update(metrics.metadata)
