"""Three steps of training in every engine, run by torchrun in two processes, or plainly in one; test_distributed.py reads the results.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/sharded_training.py WARM OUTPUT CASE=JSON ..
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dfpo_core import checkpoint, distributed, train  # noqa: E402
from dfpo_core.models import load_policy, save_policy  # noqa: E402
from tests.training import rows_of_sums, tiny_config  # noqa: E402

STEPS, SAVED_AFTER = 3, 2


def trained(folder: Path, warm: str, settings: dict) -> dict:
    """Metrics of every step, of the last one again after resuming, and the log-probabilities of what was saved of the policy."""
    config = tiny_config(folder, settings, precision=settings.pop("precision", "fp32"))
    uri = str(folder / "state")
    trainer, curve = train.Trainer(config, warm, rows_of_sums()), []
    for step in range(STEPS):
        curve.append(trainer.step())
        if step + 1 == SAVED_AFTER:
            checkpoint.save(uri, trainer.steps_done, trainer.state({}), trainer.engines())
    batch, _ = trainer.sample()
    with trainer.acting() as policy:
        weights = {name: p.detach().clone() for name, p in policy.state_dict().items()}
        if distributed.rank() == 0:
            save_policy(policy, trainer.tokenizer, folder / "policy")
    other = train.Trainer(config, warm, rows_of_sums())
    other.load_state(checkpoint.load(uri), {}, uri)
    resumed = [other.step() for _ in range(STEPS - SAVED_AFTER)]
    with other.acting() as policy:
        same = all(torch.equal(p, weights[name]) for name, p in policy.state_dict().items())
    scores = trainer.score_tokens(trainer.policy, batch)
    distributed.barrier()
    loaded, _ = load_policy(str(folder / "policy"), folder)
    difference = (trainer.score_tokens(train.rollout.ResponseTokens(loaded, 1.0), batch) - scores).abs().max().item()
    return {"curve": curve, "resumed": resumed, "same_weights": same, "saved_difference": difference, "world": distributed.world()}


def main() -> None:
    warm, output, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.join()
    results = {}
    for case in cases:
        name, settings = case.split("=", 1)
        results[name] = trained(Path(output) / name, warm, json.loads(settings))
    if distributed.rank() == 0:
        (Path(output) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
