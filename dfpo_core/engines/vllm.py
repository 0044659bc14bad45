"""vLLM as the rollout engine: it samples in the training process itself, on the same GPU, with the policy's weights of the moment.

What samples and what is trained are two implementations of one model, so their probabilities differ by rounding (in bf16 by several per
cent a token). The trainer computes the log-probabilities again, weighs tokens by the ratio, truncated, and logs the mismatch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfpo_core import distributed
from dfpo_core.config import PipelineConfig
from dfpo_core.errors import UserError
from dfpo_core.rollout import Generation, padded

# On a CPU: GiB for the cache, and cores left to the operating system.
CPU_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def library() -> Any:
    """vLLM, set up to run inside this process. Raises UserError where it is not installed."""
    # Read when vLLM is imported: without processes of its own, weights can be handed over as they are.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {} if torch.cuda.is_available() else CPU_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError:
        raise UserError("train.rollout_engine", "vllm is not installed", "run: pip install 'dfpo[vllm]', or use hf") from None
    return vllm


class VLLMSampler:
    """Samples responses as `rollout.generate` does. `checkpoint` gives the architecture; `load` the weights, after every update."""

    def __init__(self, checkpoint: str, config: PipelineConfig, bf16: bool):
        self.vllm, train = library(), config.train
        several = {"distributed_executor_backend": "external_launcher"} if distributed.world() > 1 else {}
        self.engine = self.vllm.LLM(
            model=checkpoint,
            skip_tokenizer_init=True,  # tokens in, tokens out
            dtype="bfloat16" if bf16 else "float32",
            max_model_len=config.prompt.max_prompt_tokens + config.response_tokens,
            max_num_seqs=train.vllm.max_sequences,
            gpu_memory_utilization=train.vllm.memory_share,
            enforce_eager=train.vllm.eager,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            seed=config.seed,
            **several,
        )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, by their names in the checkpoint; what was cached of prompts under the old ones is dropped."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.engine.reset_prefix_cache()

    def __call__(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int,
        pad_token_id: int,
        streams: list[np.random.Generator] | None = None,
        guided_tokens: None = None,
    ) -> Generation:
        """Left-padded prompts (P, L) -> responses (P * samples_per_prompt, T), each seeded by its own stream. The entropy is not known: 0.

        vLLM shares what prompts begin with in its cache, so a prompt is given once for each of its responses.
        """
        prompts = [{"prompt_token_ids": ids[real > 0].tolist()} for ids, real in zip(prompt_ids, prompt_mask, strict=True)]
        prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        common = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0, "detokenize": False}
        common |= {"stop_token_ids": [eos_token_id], "ignore_eos": True}
        seeds = [int(stream.integers(2**62)) for stream in streams] if streams else [None] * len(prompts)
        parameters = [self.vllm.SamplingParams(seed=seed, **common) for seed in seeds]
        answers = [answer.outputs[0] for answer in self.engine.generate(prompts, parameters, use_tqdm=False)]
        sequences = [
            [(token, 1.0, known[token].logprob, 0.0) for token, known in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ]
        return padded(sequences, pad_token_id, prompt_ids.device)
