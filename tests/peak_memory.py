"""The most memory that a training step really holds, by torch's profiler; as a script, in each of torchrun's processes.

torchrun .. tests/peak_memory.py OUTPUT NAME=CONFIG_JSON ..    bytes, one file a case and process: OUTPUT/NAME-RANK
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfpo_core import distributed, models, train  # noqa: E402
from dfpo_core.config import PipelineConfig, parse_config  # noqa: E402
from tests.training import rows_of_sums  # noqa: E402

PROMPT_TOKENS, RESPONSE_TOKENS = 41, 32


def untrained_model(folder: Path, values: dict) -> str:
    """A random model of the given shape, saved: no token is likely, so its responses run to their full length."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = models.character_tokenizer()
    kind = {name: value for name, value in values.items() if name != "model_type"}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **kind, **special))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    models.save_policy(model, tokenizer, folder / "model")
    return str(folder / "model")


def peak_of_a_step(config: PipelineConfig) -> int:
    """Bytes that torch's allocator holds at most in the second step of training, which finds the optimizers' state made."""
    rows = [row | {"question": f"{i:02}" + "x" * (PROMPT_TOKENS - 3)} for i, row in enumerate(rows_of_sums(16))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer = train.Trainer(config, config.model, rows)
        trainer.step()
        gc.collect()  # what making the engines left in cycles
        with record_function("second step"):
            trainer.step()
    assert {len(tokens) for tokens in trainer.prompt_tokens} == {PROMPT_TOKENS}
    assert trainer.last.batch.response_ids.shape[1] == RESPONSE_TOKENS
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (start,) = [event.start_ns() for event in events if event.name() == "second step"]
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held) if event.start_ns() >= start else 0
    return peak


def freed_where_it_is_counted(collective: Callable) -> Callable:
    """The collective, waited for, and left by gloo's thread before it returns: what that thread is the last to hold, it frees, and the
    profiler does not see that. Memory would seem to grow from step to step."""
    signature = inspect.signature(collective)

    def call(*arguments, **keywords):
        given = signature.bind(*arguments, **keywords).arguments
        asked = given.pop("async_op", False)
        work = collective(**given, async_op=True)
        work.wait()
        time.sleep(0.002)
        return work if asked else None

    return call


def main() -> None:
    output, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, freed_where_it_is_counted(getattr(torch.distributed, name)))
    distributed.join()
    for case in cases:
        name, config = case.split("=", 1)
        peak = peak_of_a_step(parse_config(json.loads(config)))
        gc.collect()  # nothing of this case is freed while the next one counts
        Path(output, f"{name}-{distributed.rank()}").write_text(str(peak))
    distributed.leave()


if __name__ == "__main__":
    main()
