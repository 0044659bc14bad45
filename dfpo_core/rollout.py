"""Rollouts: sampling responses with a KV cache, and teacher-forced passes over them that share each prompt's computation.

The response to a conversation is sampled turn by turn, with what its environment says in between.

Prompts are left-padded, responses right-padded. What sequences begin with in common is computed once: the prefix of all prompts,
then each prompt of a group of responses. Keys and values are repeated, with gradients flowing back through the repetition, so the
result is the same as running every (prompt, response) pair in full.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from dfpo_core import environments
from dfpo_core.data.prompts import reply_tokens
from dfpo_core.errors import TrainingDiverged


@dataclass(frozen=True)
class Generation:
    """Sampled responses: all tensors (B, T)."""

    response_ids: Tensor  # int64; pad after the end
    mask: Tensor  # float, 1 on sampled tokens, each EOS included
    attention_mask: Tensor  # float, 1 on these and on what was said to the policy
    log_probs: Tensor  # of the sampled tokens under the sampling distribution
    entropy: Tensor  # of the sampling distribution, nats


def uses_bf16(precision: str, hidden_size: int, device: torch.device | str = "cpu") -> bool:
    """Whether products are in bf16: `auto` means a GPU with bf16, or a CPU with bf16 matrix units and a model wide enough to use them."""
    if precision != "auto":
        return precision == "bf16"
    # On a CPU below a width of about 256 the casts cost more than the narrower products save.
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.is_bf16_supported() if on_gpu else hidden_size >= 256 and torch.cpu._is_avx512_bf16_supported()


def autocast(precision: str, hidden_size: int, device: torch.device | str = "cpu"):
    """bf16 autocast where `uses_bf16` says so."""
    wanted = uses_bf16(precision, hidden_size, device)
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16) if wanted else nullcontext()


def pad_left(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, longest) int64, padded on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def pad_right(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids int64, mask float32), both (rows, longest), padded on the right."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1.0] * len(s) + [0.0] * (width - len(s)) for s in sequences])
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """(rows, L) position of each token, counted from the first real one; 0 on padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def common_prefix(prompt_ids: Tensor, prompt_mask: Tensor) -> int:
    """Tokens that every prompt begins with, at most one less than the shortest prompt has."""
    length = prompt_mask.sum(-1, keepdim=True)
    shortest = int(length.min())
    columns = torch.arange(shortest, device=prompt_ids.device)
    left_aligned = prompt_ids.gather(1, prompt_ids.shape[1] - length + columns)
    same = (left_aligned == left_aligned[:1]).all(0)
    return min(int(same.long().cumprod(0).sum()), shortest - 1)


def _prefill(backbone, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Any, Tensor]:
    """(hidden state of each prompt's last token (P, H), the cache, its attention mask (P, L)).

    What all prompts begin with (system prompt, template, few-shot examples) is computed once and its cache repeated.
    """
    cache = backbone.new_cache() if hasattr(backbone, "new_cache") else DynamicCache(config=backbone.config)
    position = positions(prompt_mask)
    shared = common_prefix(prompt_ids, prompt_mask) if len(prompt_ids) > 1 else 0
    if shared:
        prefix = prompt_ids[:1, prompt_ids.shape[1] - int(prompt_mask[0].sum()) :][:, :shared]
        backbone(input_ids=prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompt_ids))
    # The columns cut off hold the prefix of the longest prompt, and padding or a part of the prefix of the others: what is left
    # of it is masked.
    rest = ((position >= shared) & (prompt_mask > 0)).long()[:, shared:]
    attention = torch.cat([rest.new_ones(len(rest), shared), rest], 1)
    output = backbone(
        input_ids=prompt_ids[:, shared:],
        attention_mask=attention,
        position_ids=position[:, shared:],
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state[:, -1], output.past_key_values, attention


def response_hidden(
    backbone, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, attention_mask: Tensor, samples_per_prompt: int
) -> Tensor:
    """Last hidden states (B, T, H) at the positions that predict each response token.

    `prompt_ids`, `prompt_mask` (P, L) left-padded, `response_ids`, `attention_mask` (B, T) right-padded with
    B = P * samples_per_prompt.
    """
    first, cache, attention = _prefill(backbone, prompt_ids, prompt_mask)
    first = first.repeat_interleave(samples_per_prompt, 0)[:, None]
    if response_ids.shape[1] == 1:
        return first
    cache.batch_repeat_interleave(samples_per_prompt)
    attention = torch.cat([attention.repeat_interleave(samples_per_prompt, 0), attention_mask[:, :-1].long()], 1)
    rest = backbone(
        input_ids=response_ids[:, :-1],
        attention_mask=attention,
        position_ids=positions(attention)[:, prompt_ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], 1)


def full_response_hidden(
    backbone, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, attention_mask: Tensor, samples_per_prompt: int
) -> Tensor:
    """As `response_hidden`, by one pass over every sequence in full: with gradient checkpointing, where a cache would keep what is to be
    dropped, and with sharded weights, whose processes must make the same calls whatever their prompts have in common."""
    ids = torch.cat([prompt_ids.repeat_interleave(samples_per_prompt, 0), response_ids[:, :-1]], 1)
    attention = torch.cat([prompt_mask.repeat_interleave(samples_per_prompt, 0), attention_mask[:, :-1].long()], 1)
    # transformers checkpoints layers in training mode only.
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.training = torch.is_grad_enabled()
    output = backbone(input_ids=ids, attention_mask=attention, position_ids=positions(attention), use_cache=False)
    for layer in layers:
        layer.training = False
    return output.last_hidden_state[:, prompt_ids.shape[1] - 1 :]


class ResponseHidden(nn.Module):
    """Hidden states of given responses as a module's forward pass, which is what a training engine wraps.

    `full`: by `full_response_hidden`.
    """

    def __init__(self, backbone: nn.Module, full: bool = False):
        super().__init__()
        self.backbone, self.hidden = backbone, full_response_hidden if full else response_hidden

    def forward(self, *sequences) -> Tensor:
        """Rollout.sequences -> (B, T, H) fp32."""
        return self.hidden(self.backbone, *sequences).float()


class ResponseTokens(nn.Module):
    """A causal language model's view of given responses, as a module's forward pass."""

    def __init__(self, model: nn.Module, temperature: float = 1.0, full: bool = False):
        super().__init__()
        self.model, self.temperature, self.hidden = model, temperature, full_response_hidden if full else response_hidden

    def forward(self, *sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Rollout.sequences -> (log-probabilities (B, T), entropies (B, T), hidden state after the prompt (B, H))."""
        hidden = self.hidden(self.model.base_model, *sequences)
        response_ids = sequences[2]
        return *token_log_probs(self.model, hidden, response_ids, self.temperature), hidden[:, 0]


def token_log_probs(model, hidden: Tensor, response_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probability of each response token, entropy of its distribution), both (B, T) fp32, at the sampling temperature."""
    logits = model.get_output_embeddings()(hidden).float() / temperature
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, response_ids[..., None])[..., 0], entropy


def sampling_streams(seed: int, step: int, first: int, count: int) -> list[np.random.Generator]:
    """The random numbers of `count` responses, the `first`-th of step `step` and those after it: one counter-based stream each.

    What a response is sampled with depends on these three numbers alone: not on its batch, on the order, or on the process it is in.
    """
    return [np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, first + i])) for i in range(count)]


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B,) tokens of the distributions `probabilities` (B, V) by inversion: `uniform` (B,) float64 in [0, 1) is the share of mass below."""
    below = probabilities.double().cumsum(-1)
    token = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=probabilities.shape[-1] - 1)


@torch.no_grad()
def generate(
    model,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    streams: list[np.random.Generator] | None = None,
    guided_tokens: Tensor | None = None,
) -> Generation:
    """Sample `samples_per_prompt` responses a prompt, each with its own of `streams`; temperature 0 is greedy and takes none.

    Finished sequences leave the batch.

    The end is known from EOS being sampled, never from a pad id, so a tokenizer with pad == EOS works. With `guided_tokens` (B,) a guided
    policy leaves the rest of each response, after that many tokens, to its reference. Raises TrainingDiverged where the logits are not
    finite.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    batch = prompt_ids.shape[0] * samples_per_prompt
    device = prompt_ids.device
    response_ids = torch.full((batch, max_new_tokens), pad_token_id, device=device)
    mask, log_probs, entropy = (torch.zeros(batch, max_new_tokens, device=device) for _ in range(3))
    hidden, cache, attention = _prefill(backbone, prompt_ids, prompt_mask)
    hidden, attention = (x.repeat_interleave(samples_per_prompt, 0) for x in (hidden, attention))
    cache.batch_repeat_interleave(samples_per_prompt)
    alive = torch.arange(batch, device=device)
    sampled = temperature > 0
    if sampled:
        uniforms = torch.from_numpy(np.stack([stream.random(max_new_tokens) for stream in streams])).to(device)
    for t in range(max_new_tokens):
        logits = head(hidden).float()
        if guided_tokens is not None:
            logits = torch.where(t < guided_tokens[alive, None], logits, head.plain(hidden))
        step_log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
        if not torch.isfinite(step_log_probs.sum()):
            raise TrainingDiverged("the policy's logits are not finite")
        probabilities = step_log_probs.exp()
        token = draw(probabilities, uniforms[alive, t]) if sampled else step_log_probs.argmax(-1)
        response_ids[alive, t], mask[alive, t] = token, 1.0
        log_probs[alive, t] = step_log_probs.gather(-1, token[:, None])[:, 0]
        entropy[alive, t] = -(probabilities * step_log_probs).sum(-1)
        going = (token != eos_token_id).nonzero()[:, 0]
        if len(going) == 0 or t + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, attention, token = alive[going], attention[going], token[going]
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
        hidden = backbone(
            input_ids=token[:, None],
            attention_mask=attention,
            position_ids=positions(attention)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    length = t + 1
    mask = mask[:, :length]
    return Generation(response_ids[:, :length], mask, mask, log_probs[:, :length], entropy[:, :length])


@torch.no_grad()
def converse(
    sample: Callable[..., Generation],
    tokenizer,
    rows: list[dict[str, Any]],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    max_turns: int,
    max_conversation_tokens: int,
    temperature: float,
    streams: list[np.random.Generator] | None = None,
    guided_tokens: Tensor | None = None,
) -> tuple[Generation, list[str]]:
    """Responses to one row a prompt, and their texts. Those of a conversation go on while it does, within the limits.

    `sample` is `generate` with a model, or what does the same. A conversation's text is the policy's turns joined by environments.TURN.
    Other rows are answered as `sample` does, bit for bit.
    Every turn is a pass over what was said before it.
    """
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    first = sample(prompt_ids, prompt_mask, samples_per_prompt=samples_per_prompt, streams=streams, guided_tokens=guided_tokens, **sampling)
    texts = decode(tokenizer, first.response_ids, first.mask)
    rows = [row for row in rows for _ in range(samples_per_prompt)]
    talks = {i: environments.start(row) for i, row in enumerate(rows) if environments.converses(row)}
    if not talks:
        return first, texts
    contexts = [ids[real > 0].tolist() for ids, real in zip(prompt_ids, prompt_mask, strict=True) for _ in range(samples_per_prompt)]
    sequences = _sampled(first)  # (token, 1 where sampled, log-probability, entropy) of every token so far
    turns = {i: [texts[i].replace(environments.TURN, " ")] for i in talks}
    going = list(talks)
    for _ in range(max_turns - 1):
        replies = {i: talks[i].reply(turns[i][-1]) for i in going}
        going = [i for i in going if replies[i] is not None]
        ended = [sequences[i][-1][0] == tokenizer.eos_token_id for i in going]
        added = reply_tokens(tokenizer, [replies[i] for i in going], ended)
        room = {i: max_conversation_tokens - len(sequences[i]) - len(ids) for i, ids in zip(going, added, strict=True)}
        for i, ids in zip(going, added, strict=True):
            sequences[i] += [(token, 0.0, 0.0, 0.0) for token in ids] if room[i] >= max_new_tokens else []
        going = [i for i in going if room[i] >= max_new_tokens]
        if not going:
            break
        ids, mask = pad_left([contexts[i] + [token for token, *_ in sequences[i]] for i in going], tokenizer.pad_token_id)
        own = streams and [streams[i] for i in going]
        turn = sample(ids.to(prompt_ids.device), mask.to(prompt_ids.device), samples_per_prompt=1, streams=own, **sampling)
        for i, tokens, text in zip(going, _sampled(turn), decode(tokenizer, turn.response_ids, turn.mask), strict=True):
            sequences[i] += tokens
            turns[i].append(text.replace(environments.TURN, " "))
    texts = [environments.TURN.join(turns[i]) if i in turns else text for i, text in enumerate(texts)]
    return padded(sequences, tokenizer.pad_token_id, prompt_ids.device), texts


def _sampled(generation: Generation) -> list[list[tuple[int, float, float, float]]]:
    """(token, 1.0, log-probability, entropy) of each response's tokens."""
    lengths = generation.mask.sum(-1).long().tolist()
    columns = [t.tolist() for t in (generation.response_ids, generation.mask, generation.log_probs, generation.entropy)]
    return [list(zip(*(column[i][:n] for column in columns), strict=True)) for i, n in enumerate(lengths)]


def padded(sequences: list[list[tuple[int, float, float, float]]], pad: int, device: torch.device) -> Generation:
    """The Generation of unpadded sequences of (token, mask, log-probability, entropy)."""
    ids, attention_mask = pad_right([[token for token, *_ in sequence] for sequence in sequences], pad)
    rest = torch.zeros(3, *ids.shape)
    for i, sequence in enumerate(sequences):
        rest[:, i, : len(sequence)] = torch.tensor([values for _, *values in sequence]).T
    return Generation(*(t.to(device) for t in (ids, rest[0], attention_mask, rest[1], rest[2])))


def decode(tokenizer, response_ids: Tensor, mask: Tensor) -> list[str]:
    """Texts of responses of one turn, without what follows the end and without special tokens."""
    lengths = mask.sum(-1).long().tolist()
    return tokenizer.batch_decode([ids[:n] for ids, n in zip(response_ids.tolist(), lengths, strict=True)], skip_special_tokens=True)


def respond(
    model,
    tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    rows: list[dict[str, Any]] | None = None,
    max_turns: int = 1,
    max_conversation_tokens: int = 0,
    precision: str = "auto",
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[list[str]]:
    """Texts of `samples` responses to each prompt, in the order given. `progress` is told the prompts done after each batch.

    With the prompts' `rows`, those that are conversations are held to their end or to the limits, as `converse` does.
    """
    device = next(model.parameters()).device
    texts: list[list[str]] = [[] for _ in prompts]
    # Prompts of like length share a batch, so little is padded.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id)
        with autocast(precision, model.config.hidden_size, device):
            _, decoded = converse(
                partial(generate, model),
                tokenizer,
                [rows[i] if rows else {} for i in chosen],
                ids.to(device),
                mask.to(device),
                samples_per_prompt=samples,
                max_new_tokens=max_new_tokens,
                max_turns=max_turns,
                max_conversation_tokens=max_conversation_tokens,
                temperature=temperature,
                streams=[s for i in chosen for s in sampling_streams(seed, 0, i * samples, samples)] if temperature else None,
            )
        for row, i in enumerate(chosen):
            texts[i] = decoded[row * samples : (row + 1) * samples]
        if progress:
            progress(len(chosen))
    return texts
