"""Make a known share of the training labels wrong."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def noise_data(config: str, parent_run_id: str, data: Input[Dataset], noisy_data: Output[Dataset], metrics: Output[Metrics]):
    """Add label, clean_answer, is_noisy and noise_kind to the training rows; test splits are copied as they are.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        data: Folder written by prepare_data.
        noisy_data: The same folder layout, with labels.
        metrics: Noise rate asked for and measured.
    """
    from math import isfinite

    from dfpo_core import noise as step

    summary = step.run(config, parent_run_id, data.path, noisy_data.path)
    metrics.metadata.update({name: value for name, value in summary.items() if isfinite(value)})
    noisy_data.metadata.update(metrics.metadata)
