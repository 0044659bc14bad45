"""Model references: each form loads, each mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfpo_core import models
from dfpo_core.errors import UserError


def test_scratch_tiny_is_the_same_model_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, tokenizer = models.load_policy("scratch:tiny", Path("unused"))
    assert torch.equal(torch.get_rng_state(), before)
    second, _ = models.load_policy("scratch:tiny", Path("unused"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert 250_000 < sum(p.numel() for p in first.parameters()) < 350_000


def test_the_character_tokenizer_round_trips_every_printable_character():
    tokenizer = models.character_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text)


def test_a_saved_policy_loads_back_with_the_same_logits(tmp_path):
    model, tokenizer = models.load_policy("scratch:tiny", tmp_path)
    models.save_policy(model, tokenizer, tmp_path / "policy")
    loaded, loaded_tokenizer = models.load_policy(str(tmp_path / "policy"), tmp_path)
    ids = torch.tensor([tokenizer.encode("12 + 3 =")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert (loaded_tokenizer.eos_token_id, loaded_tokenizer.padding_side) == (tokenizer.eos_token_id, "left")


def test_a_tokenizer_loads_without_its_model(tmp_path):
    model, tokenizer = models.load_policy("scratch:tiny", tmp_path)
    models.save_policy(model, tokenizer, tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").unlink()
    for reference in ("scratch:tiny", str(tmp_path / "policy")):
        assert models.load_tokenizer(reference, tmp_path).encode("12 + 3 =") == tokenizer.encode("12 + 3 =")
    (tmp_path / "policy" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="model: cannot load the tokenizer of"):
        models.load_tokenizer(str(tmp_path / "policy"), tmp_path)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("scratch:huge", "unknown preset"),
        ("pkg:nothing", "unknown package"),
        ("/no/such/model.gguf", "no file"),
        ("/no/such/folder", "no directory"),
        ("./not-here", "no directory"),
        ("what is this", "no model reference"),
    ],
)
def test_a_reference_that_cannot_work_is_refused_in_one_line(reference, problem):
    with pytest.raises(UserError, match=problem) as raised:
        models.check_reference(reference)
    assert str(raised.value).startswith("model: ") and "\n" not in str(raised.value)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        models.check_reference(str(tmp_path))


def test_a_hub_id_is_accepted_without_a_network():
    models.check_reference("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_hub_model_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment when it is imported
    with pytest.raises(UserError, match="model: cannot load 'nobody/nothing'"):
        models.load_policy("nobody/nothing", tmp_path)


def test_a_broken_gguf_is_one_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot read"):
        models.load_policy(str(tmp_path / "broken.gguf"), tmp_path / "home")
    assert not list((tmp_path / "home").rglob("*.safetensors"))
