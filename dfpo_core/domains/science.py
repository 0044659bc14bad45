"""Science: multiple choice (ARC, MMLU-STEM, SuperGPQA, GPQA, a part of HLE) and short answers (SimpleQA, the rest of HLE).

Checked against public code that reads them: ids, configurations, splits and columns of allenai/ai2_arc, cais/mmlu, m-a-p/SuperGPQA,
Idavidrein/gpqa, cais/hle and basicv8vc/SimpleQA (a copy of OpenAI's CSV). GPQA and HLE are gated: the hub wants a token (HF_TOKEN)
whose owner has accepted their terms. Not checked: how every one of HLE's choice questions spells its options; those that do not
follow its usual layout ("Answer Choices:", then a line an option) are left out and counted.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from dfpo_core.config import ExampleConfig, PromptConfig
from dfpo_core.domains import DataSet, Domain, LeftOut, Split, registry

MMLU_STEM = (
    "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
    "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
    "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
)  # fmt: skip
_GPQA_OPTIONS = "answer", "wrong_1", "wrong_2", "wrong_3"
_HLE_OPTION = re.compile(r"^\s*\(?([A-Z])[.)]\s+(.+)$")


def _gpqa(row: dict[str, Any]) -> dict[str, Any]:
    """Options in an order that depends on the question alone: the hub lists the right one first."""

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{name} {row['question']}".encode()).digest()

    order = sorted(_GPQA_OPTIONS, key=draw)
    return row | {"choices": [str(row[name]).strip() for name in order], "answer": order.index("answer"), "labels": None}


def _hle(row: dict[str, Any]) -> dict[str, Any]:
    """Text questions only; a choice question's options are taken out of its text."""
    if row.get("image"):
        raise LeftOut("a question about a picture")
    if row["kind"] != "multipleChoice":
        return row | {"reward": "exact"}
    question, mark, listed = str(row["question"]).rpartition("Answer Choices:")
    options = [_HLE_OPTION.match(line) for line in listed.splitlines() if line.strip()]
    if not mark or len(options) < 2 or not all(options):
        raise LeftOut("a choice whose options do not stand one a line")
    choices, labels = [option[2].strip() for option in options], [option[1] for option in options]
    return row | {"question": question.strip(), "choices": choices, "labels": labels, "reward": "choice"}


@registry.register("science")
class Science(Domain):
    """Questions of natural science and engineering, with options or with a short answer."""

    reward = "choice"
    prompt = PromptConfig(
        system="You answer science questions.",
        answer_format={
            "choice": "Reply with the letter of the right option only.",
            "exact": "Reply with the answer only, in as few words as possible.",
        },
        examples=[
            ExampleConfig(
                question="Which of these is a conductor of electricity?",
                choices=["glass", "copper", "dry wood", "rubber"],
                answer="B",
                reward="choice",
            ),
            ExampleConfig(question="What is the chemical symbol of sodium?", answer="Na", reward="exact"),
        ],
        max_prompt_tokens=1024,
    )
    data_sets = {
        "arc_challenge": DataSet(
            about="grade-school science questions that retrieval gets wrong",
            hub="allenai/ai2_arc",
            licence="CC BY-SA 4.0",
            reward="choice",
            splits={"train": Split("train", "arc_challenge_train"), "test": Split("test", "arc_challenge_test")},
            configs=("ARC-Challenge",),
            columns={"id": "id", "question": "question", "choices": "choices", "answer": "answerKey"},
        ),
        "arc_easy": DataSet(
            about="the other half of ARC",
            hub="allenai/ai2_arc",
            licence="CC BY-SA 4.0",
            reward="choice",
            splits={"train": Split("train", "arc_easy_train"), "test": Split("test", "arc_easy_test")},
            configs=("ARC-Easy",),
            columns={"id": "id", "question": "question", "choices": "choices", "answer": "answerKey"},
        ),
        "mmlu_stem": DataSet(
            about="the 19 subjects of MMLU that are science, technology, engineering or mathematics",
            hub="cais/mmlu",
            licence="MIT",
            reward="choice",
            splits={"test": Split("test", "mmlu_stem"), "validation": Split("validation", "mmlu_stem_validation")},
            configs=("all",),
            subjects=MMLU_STEM,
        ),
        "super_gpqa": DataSet(
            about="graduate-level questions of 285 disciplines, up to ten options",
            hub="m-a-p/SuperGPQA",
            licence="ODC-BY",
            reward="choice",
            splits={"test": Split("train", "super_gpqa")},
            columns={"id": "uuid", "question": "question", "choices": "options", "answer": "answer_letter", "subject": "discipline"},
        ),
        "gpqa": DataSet(
            about="198 graduate-level questions (diamond) that search engines do not answer",
            hub="Idavidrein/gpqa",
            licence="CC BY 4.0",
            reward="choice",
            splits={"test": Split("train", "gpqa_diamond")},
            configs=("gpqa_diamond",),
            columns={
                "id": "Record ID",
                "question": "Question",
                "answer": "Correct Answer",
                **{f"wrong_{number}": f"Incorrect Answer {number}" for number in (1, 2, 3)},
            },
            convert=_gpqa,
        ),
        "hle": DataSet(
            about="Humanity's Last Exam, the questions without a picture",
            hub="cais/hle",
            licence="MIT",
            reward="exact",
            splits={"test": Split("test", "hle")},
            columns={"id": "id", "question": "question", "answer": "answer", "kind": "answer_type", "subject": "category"},
            convert=_hle,
        ),
        "simple_qa": DataSet(
            about="short questions of fact",
            hub="basicv8vc/SimpleQA",
            licence="MIT",
            reward="exact",
            splits={"test": Split("test", "simple_qa")},
            columns={"question": "problem", "answer": "answer"},
        ),
    }
    train = ({"kind": "dataset", "name": "arc_challenge"},)
    id_test = ({"kind": "dataset", "name": "arc_challenge"},)
    ood_test = tuple({"kind": "dataset", "name": name} for name in ("mmlu_stem", "super_gpqa", "gpqa", "hle", "simple_qa"))
