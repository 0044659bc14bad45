"""The supervised warm start."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def sft(config: str, parent_run_id: str, data: Input[Dataset], checkpoint: Output[Model], metrics: Output[Metrics]):
    """Fine-tune the base model on the training labels for a few steps, so that RL sees rewards.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        data: Folder written by noise_data.
        checkpoint: Policy as a Hugging Face checkpoint directory.
        metrics: Final training figures.
    """
    from math import isfinite

    from dfpo_core import sft as step

    summary = step.run(config, parent_run_id, data.path, checkpoint.path)
    metrics.metadata.update({name: value for name, value in summary.items() if isfinite(value)})
    checkpoint.metadata.update(framework="transformers", step="sft")
