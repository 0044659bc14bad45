"""Mathematics: generated arithmetic, GSM8K and MATH for training, competition and university questions out of domain.

Checked against public code that reads them: ids, splits and columns of openai/gsm8k, EleutherAI/hendrycks_math (seven configurations,
`solution` with the answer in \\boxed{}), HuggingFaceH4/MATH-500, HuggingFaceH4/aime_2024, math-ai/amc23, math-ai/minervamath.
Not checked: the licence of the last three, whose cards name none that could be seen, so their licence is left empty and the report
warns about it.
"""

from __future__ import annotations

from typing import Any

from dfpo_core.config import ExampleConfig, PromptConfig
from dfpo_core.domains import DataSet, Domain, Split, registry

# reasoning-gym families (one line each: {kind: reasoning_gym, name: FAMILY, size: N}) whose answer is one plain number
NUMBER_FAMILIES = "basic_arithmetic", "chain_sum", "gcd", "lcm", "leg_counting", "products", "simple_equations"

_MATH_SUBJECTS = "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"


def last_boxed(solution: str) -> str:
    """The content of the last \\boxed{...} or \\fbox{...} of a worked solution. Raises ValueError where there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        raise ValueError("the solution has no \\boxed{} answer")
    rest = solution[start:].partition("ox" if solution[start:].startswith("\\fbox") else "boxed")[2]
    if not rest.startswith("{"):  # \boxed 5, a spelling of a few old rows
        return rest.strip().split("$")[0].split()[0] if rest.strip() else ""
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    raise ValueError("the \\boxed{} answer is not closed")


def _from_solution(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"answer": last_boxed(str(row["answer"]))}


@registry.register("math")
class Math(Domain):
    """Word problems with a number for an answer, and competition problems with any LaTeX expression."""

    reward = "math"
    prompt = PromptConfig(
        system="You solve mathematics problems.",
        answer_format={
            "number": "Reason briefly, then end with the line: #### NUMBER",
            "math": "Reason step by step, and put the final answer within \\boxed{}.",
        },
        examples=[
            ExampleConfig(
                question="A box holds 4 rows of 6 eggs. 5 eggs are broken. How many are whole?",
                answer="4 * 6 = 24 eggs, and 24 - 5 = 19 of them are whole.\n#### 19",
                reward="number",
            ),
            ExampleConfig(
                question="Solve $2x - 1 = 0$ for $x$.",
                answer="Adding 1 gives $2x = 1$, so $x = \\frac{1}{2}$: \\boxed{\\frac{1}{2}}",
                reward="math",
            ),
        ],
        max_prompt_tokens=1024,
    )
    data_sets = {
        "gsm8k": DataSet(
            about="grade-school word problems",
            hub="openai/gsm8k",
            licence="MIT",
            reward="number",
            splits={"train": Split("train", "gsm8k_train"), "test": Split("test", "gsm8k_test")},
            configs=("main",),
        ),
        "math": DataSet(
            about="competition mathematics in seven subjects (hendrycks MATH)",
            hub="EleutherAI/hendrycks_math",
            licence="MIT",
            reward="math",
            splits={"train": Split("train", "math_train"), "test": Split("test", "math_test")},
            configs=_MATH_SUBJECTS,
            columns={"question": "problem", "answer": "solution", "subject": "type"},
            convert=_from_solution,
        ),
        "math500": DataSet(
            about="500 questions of MATH's test split",
            hub="HuggingFaceH4/MATH-500",
            licence="MIT",
            reward="math",
            splits={"test": Split("test", "math500")},
            columns={"id": "unique_id", "question": "problem", "answer": "answer"},
        ),
        "aime24": DataSet(
            about="the 30 questions of AIME 2024; answers are integers from 0 to 999",
            hub="HuggingFaceH4/aime_2024",
            licence="",
            reward="number",
            splits={"test": Split("train", "aime24")},
            columns={"question": "problem", "answer": "answer"},
        ),
        "amc23": DataSet(
            about="40 questions of AMC 12, 2023",
            hub="math-ai/amc23",
            licence="",
            reward="number",
            splits={"test": Split("test", "amc23")},
        ),
        "minerva_math": DataSet(
            about="272 university-level questions with LaTeX answers",
            hub="math-ai/minervamath",
            licence="",
            reward="math",
            splits={"test": Split("test", "minerva_math")},
        ),
    }
    train = ({"kind": "dataset", "name": "gsm8k"}, {"kind": "dataset", "name": "math"})
    id_test = ({"kind": "dataset", "name": "gsm8k"}, {"kind": "dataset", "name": "math500"})
    ood_test = tuple({"kind": "dataset", "name": name} for name in ("aime24", "amc23", "minerva_math"))
