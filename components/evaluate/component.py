"""Accuracy of base, warm start and trained policy."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def evaluate(
    config: str,
    parent_run_id: str,
    data: Input[Dataset],
    sft_checkpoint: Input[Model],
    policy: Input[Model],
    critic: Input[Model],
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
):
    """Answer the test splits with every model and compare them on the same questions, with bootstrap intervals.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        data: Folder written by noise_data.
        sft_checkpoint: Directory written by sft.
        policy: Directory written by train.
        critic: Directory written by train; empty for an algorithm without a critic.
        evaluation: Folder with evaluation.json and answers.parquet.
        report: The report as one HTML file.
        metrics: Accuracies.
    """
    from math import isfinite

    from dfpo_core import evaluate as step

    checkpoints = sft_checkpoint.path, policy.path
    summary = step.run(config, parent_run_id, data.path, *checkpoints, evaluation.path, report.path, critic.path)
    metrics.metadata.update({name: value for name, value in summary.items() if isfinite(value)})
    evaluation.metadata.update(metrics.metadata)
