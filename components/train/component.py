"""RL post-training with a critic."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def train(
    config: str,
    parent_run_id: str,
    pipeline_run_id: str,
    data: Input[Dataset],
    sft_checkpoint: Input[Model],
    policy: Output[Model],
    critic: Output[Model],
    metrics: Output[Metrics],
) -> NamedTuple("Outputs", [("train_run_id", str)]):
    """Train policy and critic from the warm start; a retried pod resumes from the last checkpoint of this pipeline run.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        pipeline_run_id: Id of this pipeline run, the same in a retried pod; names the resumable state.
        data: Folder written by noise_data.
        sft_checkpoint: Directory written by sft.
        policy: Trained policy as a Hugging Face checkpoint directory.
        critic: Trained critic.
        metrics: Final training figures.

    Returns:
        train_run_id: The MLflow child run that holds the checkpoint.
    """
    from math import isfinite

    from dfpo_core import train as step

    summary, train_run_id = step.run(config, parent_run_id, pipeline_run_id, data.path, sft_checkpoint.path, policy.path, critic.path)
    metrics.metadata.update({name: value for name, value in summary.items() if isfinite(value)})
    policy.metadata.update(framework="transformers", step="train", mlflow_run_id=train_run_id)
    critic.metadata.update(framework="torch", step="train", mlflow_run_id=train_run_id)
    return (train_run_id,)
