"""The exit handler: the MLflow parent run ends as the pipeline did."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def close_run(config: str, pipeline_run_id: str, status: PipelineTaskFinalStatus):
    """Close the MLflow parent run of this pipeline run with its final status.

    Args:
        config: The whole configuration as JSON; only its tracking section matters here.
        pipeline_run_id: Id of this pipeline run.
        status: Final status of the steps, filled in by KFP.
    """
    from dfpo_core import tracking

    tracking.close_parent(config, pipeline_run_id, status.state, error=status.error_message)
