"""A question becomes prompt tokens: the tokenizer's own chat template where it has one, else plain text.

Many chat templates insert a system prompt of their own when none is given (SmolLM2's does). That is the format the model was tuned
on, so an empty `prompt.system` leaves it in place; `prompt.system` replaces it. Worked examples are earlier turns of the conversation.
Plain text is the system prompt, then for each example its question, a newline, its answer and an empty line, then the question and a
newline. Nothing is ever cut.
"""

from __future__ import annotations

import string
from typing import Any

from dfpo_core import environments
from dfpo_core.config import ExampleConfig, PromptConfig
from dfpo_core.errors import UserError

_BATCH = 1024


def user_turn(row: dict[str, Any], config: PromptConfig) -> str:
    """The text a person would type: the template around the question, with the options and the answer format on lines under it.

    The first turn of a conversation has the environment's briefing above it.

    Args:
        row: `question`, `reward` where answer formats are configured, for choices `choices` and `choice_labels`, for conversations
            `metadata`.
    """
    lines = [row["question"]]
    if row.get("metadata") and environments.converses(row):
        lines = [environments.briefing(row), "", *lines]
    if row.get("choices"):
        lines += [f"{label}. {choice}" for label, choice in zip(row["choice_labels"], row["choices"], strict=True)]
    if form := config.answer_format and config.answer_format.get(row["reward"]):
        lines.append(form)
    return config.template.replace("{question}", "\n".join(lines))


def example_turns(row: dict[str, Any], config: PromptConfig) -> list[tuple[str, str]]:
    """(user turn, answer) of every worked example that is shown to a row."""
    chosen = [example for example in config.examples if example.reward in ("", row.get("reward"))]
    return [(user_turn(_as_row(example, row), config), example.answer) for example in chosen]


def _as_row(example: ExampleConfig, row: dict[str, Any]) -> dict[str, Any]:
    labels = example.labels or list(string.ascii_uppercase[: len(example.choices)])
    return {"question": example.question, "choices": example.choices, "choice_labels": labels, "reward": row.get("reward")}


def encode(tokenizer: Any, rows: list[dict[str, Any]], config: PromptConfig) -> list[list[int]]:
    """Token ids of every prompt, ready for the first response token; not padded.

    Args:
        tokenizer: a transformers tokenizer, with or without a chat template.
        rows: data rows with `row_id`, `question`, `reward` and, for choices, `choices` and `choice_labels`.

    Raises:
        UserError: a prompt longer than `max_prompt_tokens` (names the row), or a chat template that refuses a system prompt.
    """
    prompts = tokenize(tokenizer, rows, config)
    too_long = [(row["row_id"], len(ids)) for row, ids in zip(rows, prompts, strict=True) if len(ids) > config.max_prompt_tokens]
    if too_long:
        raise too_long_error(too_long, len(rows), config)
    return prompts


def too_long_error(too_long: list[tuple[str, int]], rows: int, config: PromptConfig) -> UserError:
    """One line about prompts that are too long, given as (row id, tokens)."""
    row_id, length = max(too_long, key=lambda pair: pair[1])
    problem = f"{len(too_long)} of {rows} prompts are longer than {config.max_prompt_tokens} tokens, row {row_id!r} has {length}"
    return UserError("prompt.max_prompt_tokens", problem, f"set it to at least {length}, or prompt.too_long to drop")


def tokenize(tokenizer: Any, rows: list[dict[str, Any]], config: PromptConfig) -> list[list[int]]:
    """Token ids of every prompt, of whatever length. Raises UserError where the chat template refuses a system prompt."""
    prompts: list[list[int]] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        if tokenizer.chat_template:
            prompts += tokenizer(_chat_texts(tokenizer, part, config), add_special_tokens=False)["input_ids"]
        else:
            prompts += [_open_ended(tokenizer, ids) for ids in tokenizer([_plain_text(row, config) for row in part])["input_ids"]]
    return prompts


def reply_tokens(tokenizer: Any, replies: list[str], ended: list[bool]) -> list[list[int]]:
    """Tokens between one turn of the policy and its next: what is said to it, in the form of the chat template or as plain lines.

    Args:
        ended: whether the turn before has its EOS; where it was cut off, the template's end of a turn is a part of the reply.
    """
    opening, closing = _around_reply(tokenizer)
    end = tokenizer.eos_token
    for special in tokenizer.all_special_tokens:  # a text must not end the turn that it stands in
        replies = [reply.replace(special, "") for reply in replies]
    openings = [opening.removeprefix(end) if there and opening.startswith(end) else opening for there in ended]
    texts = [f"{before}{reply}{closing}" for before, reply in zip(openings, replies, strict=True)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _around_reply(tokenizer: Any) -> tuple[str, str]:
    """The template's text before and behind the user's second turn, from the end of the policy's first one on."""
    if not tokenizer.chat_template:
        return "\n", "\n"
    turns = [{"role": role, "content": f"[{role} {number}]"} for number, role in enumerate(("user", "assistant", "user"))]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    opening, _, closing = text.partition(turns[1]["content"])[2].partition(turns[2]["content"])
    return opening, closing


def _plain_text(row: dict[str, Any], config: PromptConfig) -> str:
    system = f"{config.system}\n" if config.system else ""
    examples = "".join(f"{turn}\n{answer}\n\n" for turn, answer in example_turns(row, config))
    return f"{system}{examples}{user_turn(row, config)}\n"


def _chat_texts(tokenizer: Any, rows: list[dict[str, Any]], config: PromptConfig) -> list[str]:
    from jinja2.exceptions import TemplateError

    opening = [{"role": "system", "content": config.system}] if config.system else []
    conversations = []
    for row in rows:
        turns = [(role, text) for pair in example_turns(row, config) for role, text in zip(("user", "assistant"), pair, strict=True)]
        turns.append(("user", user_turn(row, config)))
        conversations.append([*opening, *({"role": role, "content": text} for role, text in turns)])
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        fix = "leave prompt.system empty and put the instruction into prompt.template"
        raise UserError("prompt.system", f"the model's chat template refuses it ({error})", fix) from None


def _open_ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end-of-text token that some tokenizers append: behind it nothing follows."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
