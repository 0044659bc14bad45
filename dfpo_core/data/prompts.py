"""A question becomes prompt tokens: the tokenizer's own chat template where it has one, else `system`, newline, question, newline.

Many chat templates insert a system prompt of their own when none is given (SmolLM2's does). That is the format the model was tuned
on, so an empty `prompt.system` leaves it in place; `prompt.system` replaces it.
"""

from __future__ import annotations

from typing import Any

from dfpo_core.config import PromptConfig
from dfpo_core.errors import UserError


def user_turn(row: dict[str, Any], config: PromptConfig) -> str:
    """The text a person would type: the template around the question, options one a line under it."""
    question = row["question"]
    if row.get("choices"):
        options = zip(row["choice_labels"], row["choices"], strict=True)
        question = "\n".join([question, *(f"{label}. {choice}" for label, choice in options)])
    return config.template.replace("{question}", question)


def encode(tokenizer: Any, rows: list[dict[str, Any]], config: PromptConfig) -> list[list[int]]:
    """Token ids of every prompt, ready for the first response token; not padded.

    Args:
        tokenizer: a transformers tokenizer, with or without a chat template.
        rows: data rows with `row_id`, `question` and, for choices, `choices` and `choice_labels`.

    Raises:
        UserError: a prompt longer than `max_prompt_tokens` (names the row), or a chat template that refuses a system prompt.
    """
    if not rows:
        return []
    turns = [user_turn(row, config) for row in rows]
    if tokenizer.chat_template:
        prompts = tokenizer(_chat_texts(tokenizer, turns, config.system), add_special_tokens=False)["input_ids"]
    else:
        system = f"{config.system}\n" if config.system else ""
        prompts = [_open_ended(tokenizer, ids) for ids in tokenizer([f"{system}{turn}\n" for turn in turns])["input_ids"]]
    too_long = [(row["row_id"], len(ids)) for row, ids in zip(rows, prompts, strict=True) if len(ids) > config.max_prompt_tokens]
    if too_long:
        row_id, length = max(too_long, key=lambda pair: pair[1])
        problem = f"{len(too_long)} of {len(rows)} prompts are longer than {config.max_prompt_tokens} tokens, row {row_id!r} has {length}"
        raise UserError("prompt.max_prompt_tokens", problem, f"set it to at least {length}, or remove the rows")
    return prompts


def _chat_texts(tokenizer: Any, turns: list[str], system: str) -> list[str]:
    from jinja2.exceptions import TemplateError

    opening = [{"role": "system", "content": system}] if system else []
    conversations = [[*opening, {"role": "user", "content": turn}] for turn in turns]
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        fix = "leave prompt.system empty and put the instruction into prompt.template"
        raise UserError("prompt.system", f"the model's chat template refuses it ({error})", fix) from None


def _open_ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end-of-text token that some tokenizers append: behind it nothing follows."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
