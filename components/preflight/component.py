"""The first step: every problem found before anything is spent, and the MLflow parent run opened."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def preflight(
    config: str,
    pipeline_run_id: str,
    model: str = "",
    data: str = "",
    algorithm: str = "",
    noise_kind: str = "",
    noise_rate: float = -1.0,
    seed: int = -1,
    steps: int = -1,
    learning_rate: float = -1.0,
) -> NamedTuple("Outputs", [("resolved_config", str), ("parent_run_id", str)]):
    """Check the configuration, the model, the data and the tracking server, then open the MLflow parent run.

    Args:
        config: The whole configuration as one JSON string.
        pipeline_run_id: Id of this pipeline run; the parent run is tagged with it.
        model: Model reference in place of the config's; empty keeps it.
        data: One training source (`*.jsonl`, `*.parquet`, `gym:FAMILY[:SIZE]`, a named data set, a hub id); empty keeps the config's.
        algorithm: Algorithm in place of the config's; empty keeps it.
        noise_kind: Kind of label noise in place of the config's; empty keeps it.
        noise_rate: Share of wrong labels in place of the config's; negative keeps it.
        seed: Seed in place of the config's; negative keeps it.
        steps: Training steps in place of the config's; negative keeps it.
        learning_rate: Policy learning rate in place of the config's; negative keeps it.

    Returns:
        resolved_config: The configuration with these values in it, as JSON.
        parent_run_id: The MLflow parent run.
    """
    from dfpo_core import preflight as step

    return step.run(
        config,
        pipeline_run_id,
        model=model,
        data=data,
        algorithm=algorithm,
        noise_kind=noise_kind,
        noise_rate=noise_rate,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
    )
