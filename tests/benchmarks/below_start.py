"""Whether runs of a study that end below their start are worse than it, or were asked the wrong questions: asked more of them.

    python tests/benchmarks/below_start.py pipelines/configs/robustness_confirmation.yaml votes.dfpo.6 votes.dfpo.11 -o below_start.json

Trains each cell again, as the study does (on the same machine the same run), and asks its first and last policy `--questions` in-domain
questions that are neither in its training set nor its test set. Won and lost are the questions that only the last or only the first
policy answers right; their difference has the standard error of paired answers (McNemar 1947).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dfpo_core import comparison
from dfpo_core.data import prepare
from dfpo_core.tracking import exit_codes, git_commit


def ask(study: comparison.ComparisonConfig, key: str, checkpoint: str, questions: int) -> dict:
    """The record of one cell: accuracy in its study, and of more questions, at the start and the end, in points."""
    cell = comparison.find_cell(study, key)
    config = comparison.cell_config(study, cell, checkpoint)
    own = prepare.prepared_tables(config.data, config.seed)
    known = {question for split in ("train", "id_test") for question in own[split]["question"].to_pylist()}
    more = config.data.model_copy(update={"id_test": [source.model_copy(update={"size": questions}) for source in config.data.id_test]})
    rows = [row for row in prepare.prepared_tables(more, config.seed + 9000)["id_test"].to_pylist() if row["question"] not in known]
    answered = []

    def look(trainer) -> None:
        with trainer.acting() as policy:
            answered.append(np.array(comparison.greedy_scores(policy, trainer.tokenizer, config, rows)))

    curve = comparison.run_cell(study, cell, checkpoint, look)["curve"]
    difference = 100 * (answered[-1] - answered[0])
    return {
        "cell": key,
        "in_the_study": [100 * curve[0]["id_test"], 100 * curve[-1]["id_test"]],
        "questions": len(rows),
        "start": 100 * answered[0].mean(),
        "end": 100 * answered[-1].mean(),
        "won": int((difference > 0).sum()),
        "lost": int((difference < 0).sum()),
        "difference": difference.mean(),
        "standard_error": difference.std(ddof=1) / np.sqrt(len(rows)),
        "commit": git_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="YAML file")
    parser.add_argument("cells", nargs="+", help="keys of cells, as their files are named")
    parser.add_argument("--questions", type=int, default=10000)
    parser.add_argument("-o", "--output", required=True, help="JSON file, written cell by cell")
    parsed = parser.parse_args()
    study, records = comparison.load(parsed.study), []
    for key in parsed.cells:
        comparison.find_cell(study, key)  # a wrong key is named before anything is trained
    checkpoint = comparison.warm_start(study)
    for key in parsed.cells:
        records.append(ask(study, key, checkpoint, parsed.questions))
        Path(parsed.output).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(records[-1]), flush=True)


if __name__ == "__main__":
    with exit_codes():
        main()
