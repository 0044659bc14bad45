"""reward_model: any Hugging Face sequence classifier as a judge of (question, response), without a look at the answer.

The score is in [0, 1]: the sigmoid of the only logit of a model with one, else the softmax probability of the class `positive_class`.
The question and the response go through the tokenizer's chat template as a user's and an assistant's turn where it has one, else in as
a pair of texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from dfpo_core import models
from dfpo_core.config import RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.rewards import registry


class RewardModelConfig(Section):
    """Options of a reward model."""

    model: str = Field(min_length=1, description="hub id or directory of a sequence classifier")
    batch_size: int = Field(16, ge=1, description="responses a forward pass")
    positive_class: int = Field(-1, description="class whose probability is the score; -1 is the last (of a model with several)")
    max_tokens: int = Field(0, ge=0, description="longer question-and-response pairs are refused; 0: the model's own limit")

    @field_validator("model")
    @classmethod
    def _is_a_reference(cls, reference: str) -> str:
        if reference.startswith(("scratch:", "pkg:")) or reference.endswith(".gguf"):
            raise ValueError(f"{reference!r} names a language model; a reward model is a hub id or a directory")
        try:
            models.check_reference(reference)
        except UserError as error:
            raise ValueError(error.problem) from None
        return reference


@registry.register("reward_model")
class RewardModel:
    """The model is loaded once, in fp32, on the GPU where there is one."""

    config_class = RewardModelConfig

    def __init__(self, config: RewardModelConfig, limits: RewardsConfig):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.config = config
        folder = Path(config.model).expanduser()
        source = str(folder) if folder.is_dir() else config.model
        try:
            with models.quiet_transformers():
                model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
                self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError("train.reward.model", f"cannot load {config.model!r} ({reason})", "give a sequence classifier") from None
        classes = model.config.num_labels
        if not -classes <= config.positive_class < classes:
            problem = f"{config.positive_class} is no class of a model with {classes}"
            raise UserError("train.reward.positive_class", problem, f"choose one from 0 to {classes - 1}")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.max_tokens = config.max_tokens or _own_limit(model, self.tokenizer)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        """Probabilities. Raises UserError on a pair longer than max_tokens."""
        import torch

        encoded = self._encode([row["question"] for row in rows], responses) if rows else {"input_ids": []}
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if max(lengths, default=0) > self.max_tokens:
            problem = f"a question and its response have {max(lengths)} tokens, more than {self.max_tokens}"
            raise UserError("train.reward.max_tokens", problem, "raise it if the model allows, or lower train.max_new_tokens")
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lengths.__getitem__)  # alike lengths together: little padding
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            batch = self.tokenizer.pad({key: [values[i] for i in chosen] for key, values in encoded.items()}, return_tensors="pt")
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits.float()
            for index, value in zip(chosen, self._to_scores(logits), strict=True):
                scores[index] = value
        return scores

    def _encode(self, questions: list[str], responses: list[str]) -> dict[str, list[list[int]]]:
        if not self.tokenizer.chat_template:
            return dict(self.tokenizer(questions, responses))
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            for question, response in zip(questions, responses, strict=True)
        ]
        return dict(self.tokenizer(self.tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False))

    def _to_scores(self, logits: Any) -> list[float]:
        """(B, classes) -> B probabilities."""
        if logits.shape[-1] == 1:
            return logits[:, 0].sigmoid().tolist()
        return logits.softmax(-1)[:, self.config.positive_class].tolist()


def _own_limit(model: Any, tokenizer: Any) -> int:
    """The longest input that model and tokenizer both name; those that name none have none."""
    return min(getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length, tokenizer.model_max_length)
