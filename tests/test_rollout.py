"""Sampling and teacher-forced passes, against full forward passes without a cache or shared prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfpo_core import rollout
from dfpo_core.models import load_policy


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load_policy("scratch:tiny", Path("unused"))


@pytest.fixture(scope="module")
def sampled(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer.encode("the same start: " + text) for text in ("12+3=", "a much longer prompt", "1")]
    ids, mask = rollout.pad_left(prompts, tokenizer.pad_token_id)
    generation = sample(tiny, ids, mask, temperature=1.0, samples_per_prompt=4)
    return prompts, ids, mask, generation


def sample(tiny, ids, mask, temperature, samples_per_prompt, max_new_tokens=6):
    model, tokenizer = tiny
    return rollout.generate(
        model,
        ids,
        mask,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streams=rollout.sampling_streams(1, 0, 0, len(ids) * samples_per_prompt),
    )


def full_log_probs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probability of each response token from one unpadded, uncached pass."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_sampled_log_probs_equal_a_full_pass_over_each_sequence_alone(tiny, sampled):
    prompts, _, _, generation = sampled
    for row in range(12):
        length = int(generation.mask[row].sum())
        response = generation.response_ids[row, :length].tolist()
        expected = full_log_probs(tiny[0], prompts[row // 4], response)
        torch.testing.assert_close(generation.log_probs[row, :length], expected, atol=1e-4, rtol=0)


def test_greedy_generation_equals_repeated_argmax_of_full_passes(tiny):
    model, tokenizer = tiny
    prompt = tokenizer.encode("7 - 2 =")
    text = rollout.respond(model, tokenizer, [tokenizer.encode("longer prompt in the batch"), prompt], max_new_tokens=5, batch_size=2)[1][0]
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_the_mask_ends_at_the_first_end_token_even_where_pad_equals_it(tiny):
    model, tokenizer = tiny
    ids, mask = rollout.pad_left([tokenizer.encode("x")], tokenizer.pad_token_id)
    # Every token is declared the end, and the pad too: each response must be one token long, not zero.
    for token in range(len(tokenizer)):
        generation = rollout.generate(
            model, ids, mask, samples_per_prompt=1, max_new_tokens=3, temperature=0, eos_token_id=token, pad_token_id=token
        )
        if int(generation.response_ids[0, 0]) == token:
            assert generation.mask.tolist() == [[1.0]]
            return
    pytest.fail("no token was sampled first")


def test_a_finished_sequence_does_not_change_the_others(tiny):
    """With greedy decoding the texts are the same whether prompts share a batch or not."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode(text) for text in ("a", "bb", "ccc", "12 + 7", "zz z")]
    together = rollout.respond(model, tokenizer, prompts, max_new_tokens=8, batch_size=5)
    alone = [rollout.respond(model, tokenizer, [p], max_new_tokens=8, batch_size=1)[0] for p in prompts]
    assert together == alone


def test_shared_prompts_give_the_log_probs_and_gradients_of_full_sequences(tiny, sampled):
    model, _ = tiny
    prompts, ids, mask, generation = sampled
    assert rollout.common_prefix(ids, mask) == len("the same start: ")

    def gradients(log_probs):
        model.zero_grad()
        log_probs.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    hidden = rollout.response_hidden(model.base_model, ids, mask, generation.response_ids, generation.mask, 4)
    shared = rollout.token_log_probs(model, hidden, generation.response_ids)[0][generation.mask > 0]
    full = []
    for row in range(12):
        response = generation.response_ids[row, : int(generation.mask[row].sum())].tolist()
        full.append(full_log_probs(model, prompts[row // 4], response))
    torch.testing.assert_close(shared, torch.cat(full), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients(shared), gradients(torch.cat(full)), atol=1e-4, rtol=1e-4)
    model.zero_grad()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1, 2, 3, 4], [1, 2, 5]], 2), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [3, 2]], 0), ([[7], [7, 8]], 0)],
)
def test_the_common_prefix_leaves_every_prompt_a_token(rows, expected):
    assert rollout.common_prefix(*rollout.pad_left(rows, 0)) == expected


def test_more_padding_changes_no_log_probability(tiny, sampled):
    model, _ = tiny
    _, ids, mask, generation = sampled
    wider = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    responses = torch.nn.functional.pad(generation.response_ids, (0, 2)), torch.nn.functional.pad(generation.mask, (0, 2))
    with torch.no_grad():
        narrow = rollout.response_hidden(model.base_model, ids, mask, generation.response_ids, generation.mask, 4)
        wide = rollout.response_hidden(model.base_model, *wider, *responses, 4)[:, : narrow.shape[1]]
    valid = generation.mask > 0
    torch.testing.assert_close(narrow[valid], wide[valid], atol=1e-5, rtol=0)


def test_entropy_is_that_of_the_tempered_distribution(tiny):
    from scipy.stats import entropy

    model, _ = tiny
    hidden = torch.randn(1, 2, model.config.hidden_size)
    with torch.no_grad():
        _, measured = rollout.token_log_probs(model, hidden, torch.zeros(1, 2, dtype=torch.long), temperature=0.5)
        logits = model.get_output_embeddings()(hidden) / 0.5
    expected = entropy(logits.double().softmax(-1).numpy()[0], axis=-1)
    assert measured[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_sampling_follows_the_models_distribution(tiny):
    """Counts of 4000 first tokens against the softmax: every expected count within 5 standard deviations."""
    model, tokenizer = tiny
    ids, mask = rollout.pad_left([tokenizer.encode("2+2=")], tokenizer.pad_token_id)
    generation = sample(tiny, ids, mask, temperature=0.7, samples_per_prompt=4000, max_new_tokens=1)
    with torch.no_grad():
        probabilities = (model(ids).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(generation.response_ids[:, 0], minlength=len(tokenizer))
    deviation = (4000 * probabilities * (1 - probabilities)).sqrt().clamp(min=1.0)
    assert ((counts - 4000 * probabilities).abs() < 5 * deviation).all()


# --- random numbers ---------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probabilities():
    """Against the exact inverse: the tokens' shares of an even grid of uniforms are their probabilities, to one part of the grid."""
    probabilities = torch.tensor([0.0, 0.125, 0.5, 0.0, 0.3, 0.075])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = rollout.draw(probabilities.expand(10_000, -1), grid)
    assert torch.bincount(tokens, minlength=6).tolist() == pytest.approx([0, 1250, 5000, 0, 3000, 750], abs=1)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_no_token_of_probability_zero_is_drawn_at_either_end(uniform):
    probabilities = torch.tensor([[0.0, 0.4, 0.6]])
    assert probabilities[0, rollout.draw(probabilities, torch.tensor([uniform], dtype=torch.float64))[0]] > 0


def test_streams_differ_by_seed_step_and_response_and_not_by_who_makes_them():
    values = {
        (seed, step, first + i): stream.random()
        for seed in (0, 1)
        for step in (0, 1)
        for first in (0, 3)
        for i, stream in enumerate(rollout.sampling_streams(seed, step, first, 3))
    }
    assert len(set(values.values())) == len(values) == 24
    assert rollout.sampling_streams(1, 1, 4, 1)[0].random() == values[1, 1, 4]


def test_a_sampled_response_does_not_depend_on_the_batch_it_is_in(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer.encode(text) for text in ("12+3=", "a much longer prompt", "1", "zz z")]
    settings = {"max_new_tokens": 8, "temperature": 1.0, "samples": 3, "seed": 5}
    together = rollout.respond(model, tokenizer, prompts, batch_size=4, **settings)
    assert together == rollout.respond(model, tokenizer, prompts, batch_size=1, **settings)
    assert len({text for texts in together for text in texts}) > 6
