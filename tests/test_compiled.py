"""The compiled pipeline: committed, reproducible, valid against the protos, and showing every cluster setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from dfpo_core.config import load_config
from dfpo_core.errors import UserError
from pipelines.dfpo_pipeline import compile_pipeline

COMMITTED = ROOT / "pipelines" / "dfpo_pipeline.yaml"
GPU_STEPS = {"exec-sft", "exec-train", "exec-evaluate"}
ALL_STEPS = GPU_STEPS | {"exec-preflight", "exec-prepare-data", "exec-noise-data", "exec-promote", "exec-close-run"}


def parse(path: Path):
    """(PipelineSpec, KubernetesExecutorConfig by executor), parsed strictly: an unknown field is an error."""
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    platform = json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec()) if documents[1:] else pipeline_spec_pb2.PlatformSpec()
    executors = platform.platforms["kubernetes"].deployment_spec.executors
    configs = {
        name: json_format.ParseDict(json_format.MessageToDict(value), kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        for name, value in executors.items()
    }
    return spec, configs


def executors_of(spec) -> dict[str, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec]:
    deployment = json_format.ParseDict(json_format.MessageToDict(spec.deployment_spec), pipeline_spec_pb2.PipelineDeploymentConfig())
    return dict(deployment.executors)


@pytest.fixture(scope="module")
def cluster_run(tmp_path_factory):
    """A configuration with every cluster setting, compiled and parsed."""
    settings = {
        "image": "registry.example/dfpo-cpu:1",
        "gpu_image": "registry.example/dfpo-gpu:1",
        "gpu_type": "nvidia.com/gpu",
        "gpu_count": 2,
        "cpu_request": "4",
        "cpu_limit": "8",
        "memory_request": "32Gi",
        "memory_limit": "64Gi",
        "data_cpu_request": "500m",
        "data_memory_request": "2Gi",
        "shm_size": "16Gi",
        "node_selector": {"pool": "a100"},
        "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
        "pvc": "checkpoints",
        "pvc_mount_path": "/mnt/ckpt",
        "mlflow_secret": "mlflow-auth",
        "hub_secret": "hub-auth",
        "object_store_secret": "store-auth",
        "image_pull_secrets": ["registry"],
        "timeout_seconds": 7200,
        "retries": 3,
        "retry_backoff_seconds": 30,
        "labels": {"team": "post-training"},
    }
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(load_config(TINY, [f"cluster={settings}"]), path)
    return parse(path)


def test_the_committed_yaml_is_what_the_code_compiles_to(tmp_path):
    compiled = tmp_path / "pipeline.yaml"
    compile_pipeline(load_config(ROOT / "pipelines" / "configs" / "demo.yaml"), compiled)
    assert compiled.read_bytes() == COMMITTED.read_bytes(), "run `make compile` and commit the result"


def test_kfp_dsl_compile_gives_the_committed_yaml(tmp_path):
    compiled = tmp_path / "pipeline.yaml"
    command = [str(Path(sys.executable).parent / "kfp"), "dsl", "compile", "--py", "pipelines/dfpo_pipeline.py", "--output", str(compiled)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert compiled.read_bytes() == COMMITTED.read_bytes()


def test_the_committed_yaml_parses_strictly():
    spec, _ = parse(COMMITTED)
    assert spec.pipeline_info.name == "dfpo"
    assert set(executors_of(spec)) == ALL_STEPS


def test_no_step_installs_anything_at_start():
    spec, _ = parse(COMMITTED)
    for name, executor in executors_of(spec).items():
        words = " ".join([*executor.container.command, *executor.container.args])
        assert "pip" not in words.replace("pipeline", ""), name


def test_no_step_is_cached():
    spec, _ = parse(COMMITTED)
    steps = {**spec.components["comp-exit-handler-1"].dag.tasks, "close-run": spec.root.dag.tasks["close-run"]}
    assert {f"exec-{name}" for name in steps} == ALL_STEPS
    assert not any(task.caching_options.enable_cache for task in steps.values())


def test_the_exit_handler_runs_whatever_the_steps_did():
    spec, _ = parse(COMMITTED)
    closing = spec.root.dag.tasks["close-run"]
    assert closing.trigger_policy.strategy == pipeline_spec_pb2.PipelineTaskSpec.TriggerPolicy.ALL_UPSTREAM_TASKS_COMPLETED
    assert closing.inputs.parameters["status"].task_final_status.producer_task == "exit-handler-1"


def test_the_parameters_a_person_changes_are_inputs_with_the_types_of_the_backend():
    spec, _ = parse(COMMITTED)
    inputs = spec.root.input_definitions.parameters
    kinds = {name: pipeline_spec_pb2.ParameterType.ParameterTypeEnum.Name(entry.parameter_type) for name, entry in inputs.items()}
    text = ("config", "model", "data", "algorithm", "noise_kind", "image", "gpu_image", "gpu_type", "gpu_count")
    numbers = {"noise_rate": "NUMBER_DOUBLE", "learning_rate": "NUMBER_DOUBLE", "seed": "NUMBER_INTEGER", "steps": "NUMBER_INTEGER"}
    assert kinds == dict.fromkeys(text, "STRING") | numbers
    assert all(entry.is_optional for entry in inputs.values())


def test_every_pipeline_parameter_used_inside_the_group_is_handed_into_it():
    spec, _ = parse(COMMITTED)
    group = spec.components["comp-exit-handler-1"]
    used = {p.component_input_parameter for task in group.dag.tasks.values() for p in task.inputs.parameters.values()} - {""}
    assert used == set(group.input_definitions.parameters) == set(spec.root.dag.tasks["exit-handler-1"].inputs.parameters)


def test_accelerators_and_images_come_from_string_parameters(cluster_run):
    executors = executors_of(cluster_run[0])
    for name in GPU_STEPS:
        resources, image = executors[name].container.resources, executors[name].container.image
        assert resources.accelerator.resource_count == "{{$.inputs.parameters['pipelinechannel--gpu_count']}}"
        assert resources.accelerator.resource_type == "{{$.inputs.parameters['pipelinechannel--gpu_type']}}"
        assert image == "{{$.inputs.parameters['pipelinechannel--gpu_image']}}"
    for name in ALL_STEPS - GPU_STEPS:
        assert executors[name].container.image == "{{$.inputs.parameters['pipelinechannel--image']}}"
        assert not executors[name].container.resources.HasField("accelerator")
    defaults = {name: p.default_value.string_value for name, p in cluster_run[0].root.input_definitions.parameters.items()}
    assert (defaults["gpu_count"], defaults["gpu_type"]) == ("2", "nvidia.com/gpu")
    assert (defaults["image"], defaults["gpu_image"]) == ("registry.example/dfpo-cpu:1", "registry.example/dfpo-gpu:1")


def test_steps_ask_for_cpu_and_memory(cluster_run):
    for name, executor in executors_of(cluster_run[0]).items():
        resources = executor.container.resources
        requests = (resources.resource_cpu_request, resources.resource_memory_request)
        assert requests == (("4", "32Gi") if name in GPU_STEPS else ("500m", "2Gi")), name
        assert (resources.resource_cpu_limit, resources.resource_memory_limit) == (("8", "64Gi") if name in GPU_STEPS else ("", "")), name


def test_what_the_backend_reads_only_as_text_is_text(cluster_run):
    """The driver drops an accelerator count that arrives as an integer, and multiplies the wait by an integer factor."""
    spec, _ = cluster_run
    raw = json_format.MessageToDict(spec)
    resources = raw["deploymentSpec"]["executors"]["exec-train"]["container"]["resources"]["accelerator"]
    assert all(isinstance(value, str) for value in resources.values())
    inputs = spec.components["comp-exit-handler-1"].input_definitions.parameters
    for name in ("gpu_count", "gpu_type"):
        assert inputs[f"pipelinechannel--{name}"].parameter_type == pipeline_spec_pb2.ParameterType.STRING
    policy = raw["components"]["comp-exit-handler-1"]["dag"]["tasks"]["train"]["retryPolicy"]
    assert policy["backoffFactor"] == int(policy["backoffFactor"])


def test_only_gpu_steps_are_bound_to_gpu_nodes(cluster_run):
    for name, config in cluster_run[1].items():
        tolerations = [(t.key, t.operator, t.value, t.effect) for t in config.tolerations]
        assert dict(config.node_selector.labels) == ({"pool": "a100"} if name in GPU_STEPS else {})
        assert tolerations == ([("gpu", "Equal", "yes", "NoSchedule")] if name in GPU_STEPS else [])


def test_every_pod_gets_secrets_volume_pull_secret_and_labels(cluster_run):
    assert set(cluster_run[1]) == ALL_STEPS
    for config in cluster_run[1].values():
        secrets = {s.secret_name or s.secret_name_parameter.runtime_value.constant.string_value: s for s in config.secret_as_env}
        assert set(secrets) == {"mlflow-auth", "hub-auth", "store-auth"}
        assert all(secret.optional for secret in secrets.values())
        keys = {(k.secret_key, k.env_var) for k in secrets["mlflow-auth"].key_to_env}
        assert keys == {(f"MLFLOW_TRACKING_{name}",) * 2 for name in ("USERNAME", "PASSWORD", "TOKEN")}
        assert [(k.secret_key, k.env_var) for k in secrets["hub-auth"].key_to_env] == [("HF_TOKEN", "HF_TOKEN")]
        keys = {k.env_var for k in secrets["store-auth"].key_to_env if k.env_var == k.secret_key}
        assert keys == {f"AWS_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "DEFAULT_REGION", "ENDPOINT_URL")}
        claims = [(mount.pvc_name_parameter.runtime_value.constant.string_value, mount.mount_path) for mount in config.pvc_mount]
        assert claims == [("checkpoints", "/mnt/ckpt")]
        assert [pull.secret_name for pull in config.image_pull_secret] == ["registry"]
        assert dict(config.pod_metadata.labels) == {"team": "post-training"}


def test_only_training_has_shared_memory_timeout_and_retries(cluster_run):
    spec, configs = cluster_run
    for name, config in configs.items():
        mounts = [(m.mount_path, m.medium, m.size_limit) for m in config.empty_dir_mounts]
        assert mounts == ([("/dev/shm", "Memory", "16Gi")] if name == "exec-train" else [])
        assert config.active_deadline_seconds == (7200 if name == "exec-train" else 0)
    tasks = spec.components["comp-exit-handler-1"].dag.tasks
    retries = {name: task.retry_policy for name, task in tasks.items() if task.HasField("retry_policy")}
    assert set(retries) == {"train"}
    policy = retries["train"]
    assert (policy.max_retry_count, policy.backoff_duration.seconds, policy.backoff_factor) == (3, 30, 2)


def test_settings_that_are_off_leave_no_trace(tmp_path):
    off = {"shm_size": "", "retries": 0, "timeout_seconds": 0, "cpu_request": "", "memory_request": ""}
    compile_pipeline(load_config(TINY, [f"cluster={off}"]), tmp_path / "pipeline.yaml")
    spec, configs = parse(tmp_path / "pipeline.yaml")
    assert configs == {}
    for executor in executors_of(spec).values():
        assert {field.name for field, _ in executor.container.resources.ListFields()} <= {"accelerator"}
    assert not any(task.HasField("retry_policy") for task in spec.components["comp-exit-handler-1"].dag.tasks.values())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ("{memory_request: 8 GB}", "memory_request"),
        ("{memory_limit: 8gi}", "memory_limit"),
        ("{shm_size: 2GiB}", "shm_size"),
        ("{cpu_request: two}", "cpu_request"),
        ("{gpu_memory: lots}", "gpu_memory"),
        ("{gpu_count: -1}", "gpu_count"),
        ("{gpu_count: 1.5}", "gpu_count"),
        ("{image: dfpo cpu}", "image"),
        ("{gpu_image: ''}", "gpu_image"),
        ("{pvc: My_Claim}", "pvc"),
        ("{pvc: claim, pvc_mount_path: mnt}", "pvc_mount_path"),
        ("{mlflow_secret: 'a b'}", "mlflow_secret"),
        ("{object_store_secret: Store}", "object_store_secret"),
        ("{image_pull_secrets: ['']}", "image_pull_secrets.0"),
        ("{labels: {'bad key!': x}}", "labels"),
        ("{labels: {team: 'post training'}}", "labels"),
        ("{node_selector: {pool: 'a/b'}}", "node_selector"),
        ("{tolerations: [{key: gpu, value: 'yes'}]}", "tolerations.0"),
        ("{tolerations: [{operator: Equal, value: 'yes'}]}", "tolerations.0"),
        ("{timeout_seconds: -5}", "timeout_seconds"),
        ("{retry_backoff_seconds: 1.5}", "retry_backoff_seconds"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_before_compiling(settings, field):
    with pytest.raises(UserError, match=rf"^cluster\.{field}: "):
        load_config(TINY, [f"cluster={settings}"])


def test_a_configuration_too_long_for_a_command_line_is_refused(tmp_path):
    config = load_config(TINY, [f"prompt.system={'x' * 131_072}"])
    with pytest.raises(UserError, match="config: takes 13"):
        compile_pipeline(config, tmp_path / "pipeline.yaml")
    assert list(tmp_path.iterdir()) == []


def test_component_readmes_are_generated_from_the_code():
    from components import STEPS
    from components.readme import render

    for step in STEPS:
        written = (ROOT / "components" / step / "README.md").read_text(encoding="utf-8")
        assert written == render(step), "run `make compile` and commit the result"


def test_with_several_nodes_the_training_step_waits_without_an_accelerator(tmp_path):
    cluster = ["cluster.gpu_count=8", "cluster.gpu_image=registry.example/dfpo-gpu:1", "tracking.uri=http://mlflow:5000"]
    cluster += ["train.checkpoint_uri=s3://bucket/{run}"]
    for nodes, steps in ((1, GPU_STEPS), (2, GPU_STEPS - {"exec-train"})):
        compile_pipeline(load_config(TINY, [*cluster, f"cluster.nodes={nodes}"]), tmp_path / "pipeline.yaml")
        executors = executors_of(parse(tmp_path / "pipeline.yaml")[0])
        assert {name for name, executor in executors.items() if executor.container.resources.HasField("accelerator")} == steps
    with pytest.raises(UserError) as refused:
        compile_pipeline(load_config(TINY, ["cluster.nodes=2"]), tmp_path / "pipeline.yaml")
    assert refused.value.field == "train.checkpoint_uri"
