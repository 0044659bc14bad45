"""The gate between a trained checkpoint and the champion alias."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Artifact, Input

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def promote(config: str, parent_run_id: str, train_run_id: str, evaluation: Input[Artifact]) -> NamedTuple(
    "Outputs", [("version", str), ("promoted", bool), ("reason", str)]
):
    """Register the trained policy as candidate, and as champion if the gate holds.

    Args:
        config: The resolved configuration as JSON.
        parent_run_id: The MLflow parent run.
        train_run_id: The MLflow run that holds the checkpoint.
        evaluation: Folder written by evaluate.

    Returns:
        version: The registered version.
        promoted: Whether the champion alias moved to it.
        reason: The decision with its numbers.
    """
    from dfpo_core import promote as step

    decision = step.run(config, parent_run_id, train_run_id, evaluation.path)
    return str(decision["version"]), bool(decision["promoted"]), str(decision["reason"])
