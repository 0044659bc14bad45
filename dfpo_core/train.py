"""RL post-training: roll out, score, estimate returns, compute advantages, update the policy and the critic.

`Trainer.step` is the whole algorithm on one screen; which critic, advantage and policy loss it uses is the algorithm's choice
(dfpo_core.algorithms). Resume is exact: on one CPU thread the metrics after a kill equal those of an uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfpo_core import (
    advantages,
    algorithms,
    checkpoint,
    critics,
    distributed,
    engines,
    environments,
    figures,
    launch,
    lora,
    noise,
    policy_losses,
    rewards,
    rollout,
    tracking,
    train_job,
)
from dfpo_core.config import PipelineConfig
from dfpo_core.critic_model import CriticModel, save_critic
from dfpo_core.data import prompts
from dfpo_core.engines.pytorch import TorchEngine, learning_rate_factor
from dfpo_core.errors import TrainingDiverged, UserError
from dfpo_core.guided import GuidedPolicy
from dfpo_core.models import directory_sha256, load_policy, save_policy
from dfpo_core.policy_losses.ppo_clip import kl_estimate
from dfpo_core.rewards import pool
from dfpo_core.sft import batch_indices, labelled
from dfpo_core.types import AdvantageInputs, CriticBatch, PolicyLossInputs, Rollout, last_token, masked_mean


@dataclass(frozen=True)
class StepDetails:
    """One step's rollout with what was thought of it at rollout time, for tables and figures; None without a critic."""

    step: int
    batch: Rollout
    texts: list[str]
    advantages: Tensor  # (B, T)
    realised: Tensor  # (B, T) undiscounted return-to-go
    returns: Tensor | None  # (B, T, K)
    values: Tensor | None  # (B, T)
    uncertainty: Tensor | None  # (B, T); also None at steps that are not saved


class Trainer:
    """The state of one training run: policy, frozen reference, critic, their optimizers, the generator of minibatches, the step."""

    def __init__(self, config: PipelineConfig, sft_checkpoint: str, rows: list[dict]):
        self.config, self.settings, self.rows = config, config.train, rows
        self.row_of = {row["row_id"]: row for row in rows}
        self.conversations = any(map(environments.converses, rows))
        self.algorithm = algorithms.resolve(self.settings)
        launch.check_shares(self.settings, distributed.world())
        self.device = distributed.device()
        torch.manual_seed(config.seed)
        self.policy, self.tokenizer = self._policy(sft_checkpoint)
        reference, _ = load_policy(sft_checkpoint, config.home_path)
        self.reference = reference.to(self.device).requires_grad_(False)
        self.prompt_tokens = prompts.encode(self.tokenizer, rows, config.prompt)
        self.critic = self.critic_backbone = self.critic_head = None
        if self.algorithm.critic_name:
            self._add_critic()
        self.guided = self._guided() if self.algorithm.guided else None
        self.vllm = self._vllm(sft_checkpoint) if self.settings.rollout_engine == "vllm" else None
        self.reference_tokens = self._reference_tokens()
        self.advantage = advantages.registry.get(self.algorithm.advantage_name)(self.algorithm.advantage_config)
        self.policy_loss, self.policy_loss_engine = self._policy_loss()
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.reward = rewards.create(self.settings.reward, config.rewards)
        self.steps_done = 0
        self.history: list[dict[str, float]] = []
        pool.take_failures()  # the count of failed checks is this run's

    def _engine(self, module: torch.nn.Module, name: str, learning_rate: float):
        """A training engine around a module of the policy's size."""
        return engines.create(self.settings, module.to(self.device), name, learning_rate, self.bf16())

    def _policy(self, sft_checkpoint: str):
        """(engine of the policy, tokenizer)."""
        policy, tokenizer = load_policy(sft_checkpoint, self.config.home_path)
        if self.settings.lora.rank:
            lora.add(policy, self.settings.lora)
        if self.settings.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.hidden_size = policy.config.hidden_size
        tokens = rollout.ResponseTokens(policy, self.settings.temperature, self.settings.full_passes)
        return self._engine(tokens, "policy", self.settings.learning_rate), tokenizer

    def _add_critic(self) -> None:
        """The critic, and the engines of its parts: the head is small and whole in every process, whatever shards the backbone."""
        config, s = self.algorithm.critic_config, self.settings
        if self.algorithm.guided:
            config = config.model_copy(update={"temperature": s.temperature})
        head = critics.registry.get(self.algorithm.critic_name)(self.hidden_size, config)
        self.critic = CriticModel(self.reference, head, s.critic_layers).to(self.device)
        if s.gradient_checkpointing:
            self.critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.critic_backbone = self._engine(rollout.ResponseHidden(self.critic.backbone, s.full_passes), "critic", s.critic_learning_rate)
        self.critic_head = TorchEngine(head, "critic head", s.critic_head_learning_rate, s.weight_decay, s.max_grad_norm)

    def _reference_tokens(self) -> torch.nn.Module:
        """The frozen reference as it scores responses."""
        module = rollout.ResponseTokens(self.reference, self.settings.temperature, self.settings.full_passes)
        if self.settings.engine == "torch":
            return module
        from dfpo_core.engines.deepspeed import sharded

        return sharded(module, self.settings.zero_stage, self.bf16())

    def _vllm(self, checkpoint: str):
        from dfpo_core.engines.vllm import VLLMSampler

        return VLLMSampler(checkpoint, self.config, self.bf16())

    def _guided(self) -> GuidedPolicy:
        """The reference with the critic as its guide: what samples, is evaluated and written. Raises UserError for conversations."""
        if self.conversations:
            problem = f"{self.algorithm.name} answers in one turn, the rows are conversations"
            raise UserError("train.algorithm", problem, "use another algorithm")
        return GuidedPolicy(self.reference, self.critic)

    @contextmanager
    def acting(self, exact: bool = True) -> Iterator[torch.nn.Module]:
        """The policy as it stands, all its weights present; not `exact` is enough to sample with under `autocast`."""
        with self.policy.gathered(exact) as tokens:
            yield self.guided or tokens.model

    def _policy_loss(self):
        """(the loss or None, the engine of its own weights or None): only a loss that is a module has weights, FlowRL's log Z."""
        if self.algorithm.policy_loss_name is None:
            return None, None
        entry, config = policy_losses.registry.get(self.algorithm.policy_loss_name), self.algorithm.policy_loss_config
        if not issubclass(entry, torch.nn.Module):
            return entry(config), None
        loss = entry(config, self.hidden_size).to(self.device)
        return loss, TorchEngine(loss, "policy loss", loss.learning_rate, self.settings.weight_decay, self.settings.max_grad_norm)

    # --- one training step ---------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One rollout and the updates on it. Returns the step's metrics; raises TrainingDiverged on a non-finite loss."""
        started = time.perf_counter()
        batch, texts = self.sample()
        generated = time.perf_counter()
        everyone = batch.everywhere()
        token_rewards = self.token_rewards(everyone)
        metrics = (
            self.rollout_metrics(everyone)
            | self.sampler_metrics(everyone)
            | self.conversation_metrics(everyone, distributed.gather_list(texts))
        )
        old_hidden = self.critic_hidden(batch)
        own_returns, own_values = self.estimate(old_hidden)
        returns, values = (None if t is None else distributed.gather_rows(t) for t in (own_returns, own_values))
        if values is not None:
            metrics |= value_metrics(token_rewards, returns, values, everyone.mask)
        advantage = self.advantage(
            AdvantageInputs(token_rewards, everyone.rewards, everyone.mask, self.settings.samples_per_prompt, returns, values)
        )
        # From here on everything is this process's share of the batch again.
        token_rewards, advantages = (distributed.own_rows(t, batch.mask) for t in (token_rewards, advantage.advantages))
        if self.vllm and self.settings.importance_cap:
            advantages = advantages * importance_weights(batch, self.settings.importance_cap)
        updates: list[dict[str, float]] = []
        for prompts_chosen in self.minibatches():
            update = {}
            if self.policy_loss and (self.critic is None or self.steps_done >= self.settings.critic_warmup_steps):
                update |= self.update_policy(batch, advantages, prompts_chosen)
            if self.critic is not None:
                update |= self.update_critic(batch, token_rewards, old_hidden, own_returns, prompts_chosen)
            updates.append(update)
        seconds = time.perf_counter() - started
        metrics |= advantage.metrics
        if updates:
            metrics |= {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}
        metrics["rollout/tokens_per_second"] = everyone.token_count / (generated - started)
        metrics["train/step_seconds"] = seconds
        self.steps_done += 1
        self.last = self.details(batch, texts, token_rewards, own_returns, own_values, advantages, old_hidden)
        return metrics

    def sample(self) -> tuple[Rollout, list[str]]:
        """Responses to this process's share of the step's prompts with both rewards, and their texts."""
        s, share = self.settings, distributed.share(self.settings.prompts_per_step)
        chosen = batch_indices(len(self.rows), s.prompts_per_step, self.steps_done, self.config.seed)[share]
        ids, mask = rollout.pad_left([self.prompt_tokens[i] for i in chosen], self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        guided_tokens = self.guided_tokens() if self.guided else None
        first = share.start * s.samples_per_prompt
        with self.autocast(), self.sampler() as sample, distributed.together(TrainingDiverged):
            generation, texts = rollout.converse(
                sample,
                self.tokenizer,
                [self.rows[i] for i in chosen],
                ids,
                mask,
                samples_per_prompt=s.samples_per_prompt,
                max_new_tokens=s.max_new_tokens,
                max_turns=s.max_turns,
                max_conversation_tokens=s.max_conversation_tokens,
                temperature=s.temperature,
                streams=rollout.sampling_streams(self.config.seed, self.steps_done, first, len(chosen) * s.samples_per_prompt),
                guided_tokens=guided_tokens,
            )
        rows = [self.rows[i] for i in chosen for _ in range(s.samples_per_prompt)]
        ids_of = [row["row_id"] for row in rows]
        noisy = noise.reward_noise(self.judged(rows, texts), ids_of, texts, s.reward_noise, self.config.seed, self.steps_done)
        batch = Rollout(
            prompt_ids=ids,
            prompt_mask=mask,
            response_ids=generation.response_ids,
            mask=generation.mask,
            attention_mask=generation.attention_mask,
            log_probs=generation.log_probs,
            sampler_log_probs=generation.log_probs,
            reference_log_probs=torch.zeros_like(generation.log_probs),
            entropy=generation.entropy,
            rewards=torch.tensor(noisy, dtype=torch.float32, device=self.device),
            clean_rewards=torch.tensor(rewards.score(rows, texts, "answer", self.config.rewards), dtype=torch.float32, device=self.device),
            row_ids=tuple(row["row_id"] for row in rows),
            samples_per_prompt=s.samples_per_prompt,
            critic_mask=self.critic_mask(generation.mask, guided_tokens),
        )
        # The cached decode and the batched pass differ by rounding, so both sides of every ratio come from the batched pass.
        batch = replace(batch, reference_log_probs=self.score_tokens(self.reference_tokens, batch))
        if self.vllm:
            log_probs, entropy = self.score(self.policy, batch)
            return replace(batch, log_probs=log_probs, entropy=entropy), texts
        if s.epochs * s.minibatches > 1 and not self.guided:
            batch = replace(batch, log_probs=self.score_tokens(self.policy, batch))
        return batch, texts

    @contextmanager
    def sampler(self) -> Iterator[Callable[..., rollout.Generation]]:
        """What samples responses with the policy's weights as they stand. vLLM has its own copy of them: none stay gathered meanwhile."""
        with self.acting(exact=False) as policy:
            if not self.vllm:
                yield partial(rollout.generate, policy)
                return
            self.vllm.load(lora.merged_state(policy).items())
        yield self.vllm

    def guided_tokens(self) -> Tensor:
        """(B,) tokens of each response that the guided policy samples before the reference goes on: uniform, none and all included."""
        count = self.settings.prompts_per_step * self.settings.samples_per_prompt
        drawn = torch.randint(self.settings.max_new_tokens + 1, (count,), generator=self.generator, device=self.device)
        return drawn[distributed.share(count)]

    def critic_mask(self, mask: Tensor, guided_tokens: Tensor | None) -> Tensor:
        """(B, T) 1 on the tokens that the critic learns from: behind a switch only, as the critic is one of the reference's returns."""
        if guided_tokens is None:
            return mask
        return mask * (torch.arange(mask.shape[1], device=self.device) >= guided_tokens[:, None])

    def judged(self, rows: list[dict], texts: list[str]) -> list[float]:
        """The reward against the label; 0 where there is no label (noise.missing: zero)."""
        known = [i for i, row in enumerate(rows) if row["label"] is not None]
        scores = self.reward.score([rows[i] for i in known], [texts[i] for i in known], "label") if known else []
        result = [0.0] * len(rows)
        for i, value in zip(known, scores, strict=True):
            result[i] = value
        return result

    @torch.no_grad()
    def score(self, tokens, batch: Rollout) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the sampled tokens, entropies), both (B, T), of a model that reads them, a ResponseTokens or its engine."""
        with self.autocast():
            parts = [tokens(*part.sequences)[:2] for part in self.micro_batches(batch)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def score_tokens(self, tokens, batch: Rollout) -> Tensor:
        """The log-probabilities of `score`."""
        return self.score(tokens, batch)[0]

    def token_rewards(self, batch: Rollout) -> Tensor:
        """r_t = -beta KL_t + 1[t = T] R, (B, T); the sequence reward sits on the last valid token."""
        reward = last_token(batch.mask) * batch.rewards[:, None]
        if self.settings.kl_in == "reward" and self.settings.kl_coefficient:
            kl = kl_estimate(batch.log_probs, batch.reference_log_probs, self.settings.kl_estimator)
            reward = reward - self.settings.kl_coefficient * kl * batch.mask
        return reward

    def critic_hidden(self, batch: Rollout) -> Tensor | None:
        """(B, T, H and more) what the critic's head reads before this step's updates, or None without a critic that estimates returns."""
        if self.critic is None or self.guided:
            return None
        with torch.no_grad(), self.autocast():
            return torch.cat([self.critic_reads(part) for part in self.micro_batches(batch)])

    def critic_reads(self, part: Rollout) -> Tensor:
        """(B, T, H and more) what the critic's head reads of a micro-batch; the policy's confidence is that of the rollout."""
        hidden = self.critic_backbone(*part.sequences)
        return self.critic.reads(hidden, part.log_probs, part.entropy, part.mask)

    def preference(self, hidden: Tensor, part: Rollout) -> Tensor:
        """(B, T) by how much the guide, of hidden states (B, T, H), thinks more of the sampled tokens than the reference does."""
        own, _ = rollout.token_log_probs(self.reference, hidden, part.response_ids, self.settings.temperature)
        return own - part.reference_log_probs

    @torch.no_grad()
    def estimate(self, hidden: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(return samples (B, T, K), values (B, T)) of the rollout-time critic."""
        if hidden is None:
            return None, None
        return self.critic.head.sample_returns(hidden), self.critic.head.value(hidden)

    def update_policy(self, batch: Rollout, advantage: Tensor, chosen: Tensor) -> dict[str, float]:
        """One optimizer step of the policy on the prompts `chosen`."""
        minibatch, advantage = batch.select(chosen), self.rows_of(advantage, chosen)
        single = self.settings.epochs * self.settings.minibatches == 1
        token_count = distributed.total(minibatch.token_count)
        metrics: dict[str, float] = {}
        for part, last in self.parts(len(chosen)):
            micro = minibatch.select(part)
            with self.autocast():
                log_probs, entropy, prompt_hidden = self.policy(*micro.sequences)
            output = self.policy_loss(
                PolicyLossInputs(
                    log_probs=log_probs,
                    entropy=entropy,
                    # With one update a rollout the sampling policy is this very policy: the ratio is 1 by definition.
                    old_log_probs=log_probs.detach() if single else micro.log_probs,
                    reference_log_probs=micro.reference_log_probs,
                    advantages=self.rows_of(advantage, part),
                    mask=micro.mask,
                    rewards=micro.rewards,
                    token_count=token_count,
                    sequence_count=len(minibatch.row_ids) * distributed.world(),
                    samples_per_prompt=self.settings.samples_per_prompt,
                    max_new_tokens=self.settings.max_new_tokens * (self.settings.max_turns if self.conversations else 1),
                    prompt_hidden=prompt_hidden,
                )
            )
            self.policy.backward(output.loss, last)
            metrics = {key: metrics.get(key, 0.0) + value for key, value in output.metrics.items()}
        s, metrics = self.settings, distributed.totals(metrics)
        factor = learning_rate_factor(self.steps_done, s.steps, s.warmup_steps, s.schedule)
        metrics |= {"policy/gradient_norm": self.policy.step(factor), "policy/learning_rate": s.learning_rate * factor}
        if self.policy_loss_engine:
            metrics["policy/loss_gradient_norm"] = self.policy_loss_engine.step(factor)
        return metrics

    def update_critic(self, batch: Rollout, token_rewards: Tensor, old_hidden: Tensor, returns: Tensor, chosen: Tensor) -> dict[str, float]:
        """One optimizer step of the critic on the prompts `chosen`; the targets use the rollout-time hidden states."""
        minibatch = batch.select(chosen)
        per_row = [None if t is None else self.rows_of(t, chosen) for t in (token_rewards, old_hidden, returns)]
        token_count = max(1.0, distributed.total(float(minibatch.critic_mask.sum())))
        # One seed an update, so that the critic draws the same flow times for every micro-batch and their losses add up.
        seed = torch.randint(2**31, (1,), generator=self.generator, device=self.device).item()
        metrics: dict[str, float] = {}
        for part, last in self.parts(len(chosen)):
            micro = minibatch.select(part)
            levels = torch.Generator().manual_seed(seed)
            micro_rewards, micro_hidden, micro_returns = (None if t is None else self.rows_of(t, part) for t in per_row)
            with self.autocast():
                hidden = self.critic_reads(micro)
                preference = self.preference(hidden, micro) if self.guided else None
            output = self.critic.head.loss(
                CriticBatch(hidden, micro_hidden, micro_rewards, micro.critic_mask, token_count, micro_returns, levels, preference)
            )
            self.critic_backbone.backward(output.loss, last)  # through the head, whose gradients it adds to
            metrics = {key: metrics.get(key, 0.0) + value for key, value in output.metrics.items()}
        norms = {"critic/gradient_norm": self.critic_backbone.step(), "critic/head_gradient_norm": self.critic_head.step()}
        self.critic.head.after_step()
        return distributed.totals(metrics) | norms

    # --- pieces of a step ----------------------------------------------------------------------------------------------------

    def autocast(self):
        return rollout.autocast(self.config.precision, self.hidden_size, self.device)

    def bf16(self) -> bool:
        return rollout.uses_bf16(self.config.precision, self.hidden_size, self.device)

    def parts(self, prompt_count: int) -> list[tuple[Tensor, bool]]:
        """Micro-batches of so many prompts: their positions, and whether it is the last."""
        split = torch.arange(prompt_count, device=self.device).split(self.settings.micro_batch_prompts)
        return [(part, i + 1 == len(split)) for i, part in enumerate(split)]

    def rows_of(self, tensor: Tensor, prompts_chosen: Tensor) -> Tensor:
        """The rows of a (B, ...) tensor that belong to the given prompts."""
        grouped = tensor.unflatten(0, (-1, self.settings.samples_per_prompt))
        return grouped[prompts_chosen].flatten(0, 1)

    def micro_batches(self, batch: Rollout) -> list[Rollout]:
        return [batch.select(part) for part, _ in self.parts(len(batch.prompt_ids))]

    def minibatches(self) -> list[Tensor]:
        """Indices of this process's prompts in each optimizer step: a fresh permutation an epoch, cut into equal parts.

        None where nothing is trained.
        """
        if self.policy_loss is None and self.critic is None:
            return []
        s, parts = self.settings, []
        share = distributed.share(s.prompts_per_step)
        for _ in range(s.epochs):
            order = torch.randperm(s.prompts_per_step, generator=self.generator, device=self.device)
            own = order[(order >= share.start) & (order < share.stop)] - share.start
            parts.extend(own.chunk(s.minibatches))
        return parts

    def rollout_metrics(self, batch: Rollout) -> dict[str, float]:
        lengths = batch.mask.sum(-1)
        ended = (batch.response_ids == self.tokenizer.eos_token_id).logical_and(last_token(batch.mask) > 0).any(-1).float()
        kl = kl_estimate(batch.log_probs, batch.reference_log_probs, "k1")
        return {
            "reward/noisy": batch.rewards.mean().item(),
            "reward/clean": batch.clean_rewards.mean().item(),
            "policy/kl_to_sft": masked_mean(kl, batch.mask).item(),
            "policy/entropy": masked_mean(batch.entropy, batch.mask).item(),
            "rollout/response_length": lengths.mean().item(),
            "rollout/truncated_fraction": 1.0 - ended.mean().item(),
            "reward/failed_checks": float(sum(pool.take_failures().values())),
        }

    def sampler_metrics(self, batch: Rollout) -> dict[str, float]:
        """How far the probabilities of vLLM are from the policy's. Empty where the policy itself samples."""
        if not self.vllm:
            return {}
        difference, cap = batch.sampler_log_probs - batch.log_probs, self.settings.importance_cap
        cut = (-difference).exp() > (cap or torch.inf)
        return {
            "rollout/sampler_kl": masked_mean(difference, batch.mask).item(),
            "rollout/sampler_difference": masked_mean(difference.abs(), batch.mask).item(),
            "rollout/truncated_weights": masked_mean(cut.float(), batch.mask).item(),
        }

    def conversation_metrics(self, batch: Rollout, texts: list[str]) -> dict[str, float]:
        """How the step's conversations went: turns of the policy, and the mean of every rate. Empty without conversations."""
        rows = [self.row_of[row_id] for row_id in batch.row_ids]
        talks = [(row, text) for row, text in zip(rows, texts, strict=True) if environments.converses(row)]
        if not talks:
            return {}
        found: dict[str, list[float]] = {"turns": [float(text.count(environments.TURN) + 1) for _, text in talks]}
        for row, text in talks:
            for name, rate in environments.play(row, text)[0].rates().items():
                found.setdefault(f"{name}_completion", []).append(rate)
        return {f"rollout/{name}": sum(values) / len(values) for name, values in found.items()}

    @torch.no_grad()
    def details(self, batch, texts, token_rewards, returns, values, advantage, hidden) -> StepDetails:
        """What the tables and figures of this step need."""
        shown = hidden is not None and self.is_saved(self.steps_done)
        uncertainty = self.critic.head.uncertainty(hidden) if shown else None
        realised = returns_to_go(token_rewards)
        return StepDetails(self.steps_done, batch, texts, advantage, realised, returns, values, uncertainty)

    def is_saved(self, step: int) -> bool:
        """Whether the state after `step` steps is saved, and its details logged."""
        return step % self.settings.save_every == 0 or step == self.settings.steps

    def sample_rows(self, details: StepDetails) -> list[dict[str, Any]]:
        """One response a prompt, as rows of a table."""
        table, batch = [], details.batch
        for i in range(0, len(details.texts), batch.samples_per_prompt):
            row, valid = self.row_of[batch.row_ids[i]], batch.mask[i] > 0
            table.append(
                {
                    "step": details.step,
                    "row_id": batch.row_ids[i],
                    "question": row["question"],
                    "response": environments.transcript(row, details.texts[i]),
                    "label": row["label"],
                    "answer": row["answer"],
                    "reward": batch.rewards[i].item(),
                    "clean_reward": batch.clean_rewards[i].item(),
                    "advantage": details.advantages[i][valid].mean().item(),
                    "value": None if details.values is None else details.values[i][valid].mean().item(),
                }
            )
        return table

    # --- resuming ------------------------------------------------------------------------------------------------------------

    def engines(self) -> dict[str, Any]:
        """Every training engine, by the folder of its checkpoint."""
        named = {
            "policy": self.policy,
            "critic": self.critic_backbone,
            "critic_head": self.critic_head,
            "policy_loss": self.policy_loss_engine,
        }
        return {name: engine for name, engine in named.items() if engine}

    def state(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What a resumed run needs beside the engines."""
        return {
            "identity": identity,
            "step": self.steps_done,
            "next_row": self.steps_done * self.settings.prompts_per_step,
            "advantage": self.advantage.state_dict() if hasattr(self.advantage, "state_dict") else {},
            "generator": self.generator.get_state(),
            "rng": checkpoint.rng_state(),
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any], identity: dict[str, Any], uri: str) -> None:
        """Continue from `state`. Raises UserError naming the first setting in which it differs from this run."""
        for key, value in identity.items():
            if state["identity"].get(key) != value:
                message = f"the checkpoint at {uri} was made with another {key}"
                raise UserError("train.checkpoint_uri", message, "name another place, or remove that checkpoint")
        checkpoint.load_engines(uri, self.engines())
        if state["advantage"]:
            self.advantage.load_state_dict(state["advantage"])
        self.generator.set_state(state["generator"])
        checkpoint.set_rng_state(state["rng"])
        self.steps_done, self.history = state["step"], state["history"]


def importance_weights(batch: Rollout, cap: float) -> Tensor:
    """min(p_policy / p_sampler, cap) of each sampled token, without gradient: (B, T).

    Truncated importance sampling between training and rollout engine (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"). Masked positions get 1.
    """
    log_ratio = torch.where(batch.mask > 0, batch.log_probs - batch.sampler_log_probs, torch.zeros_like(batch.log_probs))
    return log_ratio.exp().clamp(max=cap)


def returns_to_go(token_rewards: Tensor) -> Tensor:
    """Undiscounted sum of the rewards from each token on: (B, T) -> (B, T)."""
    return token_rewards.flip(-1).cumsum(-1).flip(-1)


def value_metrics(token_rewards: Tensor, returns: Tensor, values: Tensor, mask: Tensor) -> dict[str, float]:
    """Explained variance of the undiscounted return-to-go by `values` (B, T), and the level and spread of the estimates."""
    realised = returns_to_go(token_rewards)
    valid = mask > 0
    variance = realised[valid].var(unbiased=False)
    residual = (realised - values)[valid].var(unbiased=False)
    # A batch in which every return is equal has nothing to explain.
    explained = (1.0 - residual / variance).item() if variance > 1e-12 else 0.0
    return {
        "critic/explained_variance": explained,
        "critic/value_mean": values[valid].mean().item(),
        "critic/value_spread": returns.std(-1, unbiased=False)[valid].mean().item(),
    }


def identity_of(config: PipelineConfig, sft_checkpoint: str) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that it continues."""
    values = config.model_dump(
        mode="json", exclude={"name", "home", "architecture", "tracking", "cluster", "evaluate", "promote", "data", "sft", "rewards"}
    )
    values["train"] = {k: v for k, v in values["train"].items() if k not in ("steps", "save_every", "checkpoint_uri")}
    flat = {f"{section}.{key}": v for section in ("train", "noise", "prompt") for key, v in values.pop(section).items()}
    return values | flat | {"sft checkpoint": directory_sha256(sft_checkpoint)}


def checkpoint_uri(config: PipelineConfig, pipeline_run_id: str) -> str:
    """Where the resumable state of this pipeline run lies: a retried pod has the same run id, so it finds what the first one saved."""
    template = config.train.checkpoint_uri or str(config.home_path / "checkpoints" / "{run}")
    return template.replace("{run}", pipeline_run_id)


def run(
    config: str | PipelineConfig,
    parent_run_id: str,
    pipeline_run_id: str,
    data: str,
    sft_checkpoint: str,
    policy_output: str,
    critic_output: str,
) -> tuple[dict[str, float], str]:
    """The step: train from `sft_checkpoint` on `data/train.parquet`, resuming from train.checkpoint_uri where one exists.

    Writes the policy (HF format) and the critic; returns the last step's metrics and the id of the MLflow run.
    """
    config = PipelineConfig.model_validate_json(config) if isinstance(config, str) else config
    arguments = {
        "pipeline_run_id": pipeline_run_id,
        "data": str(data),
        "sft_checkpoint": str(sft_checkpoint),
        "policy_output": str(policy_output),
        "critic_output": str(critic_output),
    }
    with tracking.step_run(config, "train", parent_run_id) as step_run:
        if train_job.wanted(config):
            folder = checkpoint_uri(config, pipeline_run_id).rstrip("/") + "-job"
            return train_job.train(config, folder, step_run.run_id, arguments), step_run.run_id
        count = launch.processes(config)
        if count > 1:
            return launch.train(config, count, step_run.run_id, arguments), step_run.run_id
        return work(config, step_run, **arguments), step_run.run_id


def work(
    config: PipelineConfig, step_run, pipeline_run_id: str, data: str, sft_checkpoint: str, policy_output: str, critic_output: str
) -> dict[str, float]:
    """The step's work in one of its processes: `run` says what it does. Returns the last step's metrics."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    rows = labelled(data, ("row_id", "question", "answer", "label"), keep_missing=config.noise.missing == "zero")
    step_run.log_dataset(str(Path(data) / "train.parquet"), "train", "training", {"noise": config.noise.kind})
    uri = checkpoint_uri(config, pipeline_run_id)
    trainer = Trainer(config, sft_checkpoint, rows)
    step_run.log_params({"algorithm": trainer.algorithm.name, "checkpoint_uri": uri, "processes": distributed.world()})
    loop(trainer, uri, identity_of(config, sft_checkpoint), step_run)
    first = distributed.rank() == 0
    with trainer.acting() as policy:
        if first:
            save_policy(policy, trainer.tokenizer, policy_output)
    step_run.log_artifacts(policy_output, "policy")
    if trainer.critic and not trainer.guided:  # a guide is a part of the policy
        description = {"name": trainer.algorithm.critic_name, "config": trainer.algorithm.critic_config.model_dump(mode="json")}
        with trainer.critic_backbone.gathered() as hidden:
            if first:
                save_critic(hidden.backbone, trainer.critic.head, Path(critic_output), description)
        step_run.log_artifacts(critic_output, "critic")
    elif first:
        Path(critic_output).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    if first and uri != config.train.checkpoint_uri:
        checkpoint.remove(uri)  # named after this pipeline run, so nothing can continue from it
    return trainer.history[-1]


def loop(trainer: Trainer, uri: str, identity: dict[str, Any], step_run) -> None:
    """Run the remaining steps, log each, save every `save_every`, plot the curves."""
    from tqdm import tqdm

    state = checkpoint.load(uri)
    if state:
        trainer.load_state(state, identity, uri)
        del state
        # A retried step is a new MLflow run: it gets the curves of the run that it continues.
        for number, metrics in enumerate(trainer.history, 1):
            step_run.log_metrics(metrics, number)
        step_run.log_params({"resumed_from_step": trainer.steps_done})
    settings = trainer.settings
    bar = tqdm(
        total=settings.steps,
        initial=trainer.steps_done,
        desc=f"train ({trainer.algorithm.name})",
        disable=True if distributed.rank() else None,
    )
    with bar:
        while trainer.steps_done < settings.steps:
            try:
                metrics = trainer.step()
            except TrainingDiverged as error:
                where = f"{uri}/diverged"
                checkpoint.save(where, trainer.steps_done, trainer.state(identity), trainer.engines())
                raise TrainingDiverged(
                    f"training stopped at step {trainer.steps_done + 1}: {error}; what it had is saved at {where}; "
                    "lower train.learning_rate or train.critic_learning_rate"
                ) from None
            trainer.history.append(metrics)
            step_run.log_metrics(metrics, trainer.steps_done)
            bar.set_postfix(reward=f"{metrics['reward/noisy']:.2f}", clean=f"{metrics['reward/clean']:.2f}", refresh=False)
            bar.update()
            if trainer.is_saved(trainer.steps_done):
                checkpoint.save(uri, trainer.steps_done, trainer.state(identity), trainer.engines())
                if distributed.rank() == 0:
                    log_details(trainer, step_run)
    if distributed.rank() == 0:
        step_run.log_figure("learning_curves.png", figures.learning_curves(trainer.history))


def log_details(trainer: Trainer, step_run) -> None:
    """The last step's samples as a table; the critic's view of its first response and its calibration as figures."""
    number, details = f"step-{trainer.steps_done:05d}", trainer.last
    step_run.log_table(f"samples/{number}.json", trainer.sample_rows(details))
    if details.returns is None:
        return
    valid = details.batch.mask[0] > 0
    tokens = [trainer.tokenizer.decode([token]) for token in details.batch.response_ids[0][valid].tolist()]
    row = trainer.row_of[details.batch.row_ids[0]]
    title = f"{row['question'].strip()[-60:]}   reward {details.batch.rewards[0].item():.0f}, step {trainer.steps_done}"
    one = [t[0][valid].cpu().numpy() for t in (details.returns, details.values, details.advantages, details.uncertainty)]
    step_run.log_figure(f"value_fan/{number}.png", figures.value_fan(tokens, *one, title))
    every = details.batch.mask > 0
    arrays = [t[every].cpu().numpy() for t in (details.returns, details.values, details.realised)]
    step_run.log_figure(f"calibration/{number}.png", figures.calibration(*arrays))
