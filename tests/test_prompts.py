"""Prompts, with real tokenizers built on the spot: one token a character, so lengths can be counted by hand."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dfpo_core.config import PromptConfig, parse_config
from dfpo_core.data.prompts import encode, tokenize, user_turn
from dfpo_core.errors import UserError

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<s>system:default\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0]['content'] }}"
ROWS = [{"row_id": "d/1", "question": "1+1?"}, {"row_id": "d/2", "question": "2 {x} 3?"}]
CHOICE = {"row_id": "d/3", "question": "Which?", "choices": ["a cat", "a dog"], "choice_labels": ["A", "B"]}


def characters(chat_template=None, append_eos=False):
    vocabulary = {"<eos>": 0, "<unk>": 1, **{chr(code): code for code in range(2, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", chat_template=chat_template)


def text(ids):
    return "".join(map(chr, ids))


def test_without_a_template_a_prompt_is_system_and_question_on_lines():
    assert [text(ids) for ids in encode(characters(), ROWS, PromptConfig())] == ["1+1?\n", "2 {x} 3?\n"]
    assert text(encode(characters(), ROWS, PromptConfig(system="Add.", template="Q: {question} A:"))[0]) == "Add.\nQ: 1+1? A:\n"


def test_an_end_of_text_token_that_the_tokenizer_appends_is_dropped():
    assert encode(characters(append_eos=True), ROWS, PromptConfig()) == encode(characters(), ROWS, PromptConfig())


def test_a_chat_template_is_used_with_its_own_system_prompt_or_ours():
    tokenizer = characters(CHATML)
    assert text(encode(tokenizer, ROWS, PromptConfig())[0]) == "<s>system:default\n<s>user:1+1?\n<s>assistant:"
    assert text(encode(tokenizer, ROWS, PromptConfig(system="Add."))[0]) == "<s>system:Add.\n<s>user:1+1?\n<s>assistant:"


def test_options_stand_under_the_question():
    assert user_turn(CHOICE, PromptConfig(template="{question}\nLetter:")) == "Which?\nA. a cat\nB. a dog\nLetter:"


FORMATS = {"number": "Reply with the number only.", "choice": "Reply with the letter only."}
EXAMPLES = [
    {"question": "2+2?", "answer": "4", "reward": "number"},
    {"question": "Pick.", "answer": "B", "choices": ["cat", "dog"], "reward": "choice"},
    {"question": "Any?", "answer": "yes"},
]


def test_an_answer_format_is_a_line_under_the_question_of_its_reward():
    config = PromptConfig(answer_format=FORMATS, template="Q: {question}\nA:")
    assert user_turn(ROWS[0] | {"reward": "number"}, config) == "Q: 1+1?\nReply with the number only.\nA:"
    assert user_turn(CHOICE | {"reward": "choice"}, config) == "Q: Which?\nA. a cat\nB. a dog\nReply with the letter only.\nA:"
    assert user_turn(ROWS[0] | {"reward": "exact"}, config) == "Q: 1+1?\nA:"


def test_examples_are_earlier_turns_of_the_conversation():
    config = PromptConfig(system="Add.", examples=EXAMPLES)
    row = ROWS[0] | {"reward": "number"}
    assert text(encode(characters(CHATML), [row], config)[0]) == (
        "<s>system:Add.\n<s>user:2+2?\n<s>assistant:4\n<s>user:Any?\n<s>assistant:yes\n<s>user:1+1?\n<s>assistant:"
    )
    assert text(encode(characters(), [row], config)[0]) == "Add.\n2+2?\n4\n\nAny?\nyes\n\n1+1?\n"


def test_examples_show_the_options_and_the_answer_format_of_their_reward():
    config = PromptConfig(answer_format=FORMATS, examples=EXAMPLES[:2])
    shown = text(encode(characters(), [CHOICE | {"reward": "choice"}], config)[0])
    assert shown == ("Pick.\nA. cat\nB. dog\nReply with the letter only.\nB\n\nWhich?\nA. a cat\nB. a dog\nReply with the letter only.\n")


def test_an_example_with_a_label_too_few_is_refused():
    data = {"train": [{"kind": "jsonl", "name": "x.jsonl"}]}
    example = {"question": "Pick.", "answer": "A", "choices": ["cat", "dog"], "labels": ["A"]}
    with pytest.raises(UserError, match="prompt.examples.0: needs as many labels as choices"):
        parse_config({"data": data, "prompt": {"examples": [example]}})


def test_a_prompt_of_any_length_is_the_whole_text():
    rows = [{"row_id": str(n), "question": "x" * n} for n in (1, 3000)]
    assert [len(ids) for ids in tokenize(characters(), rows, PromptConfig())] == [2, 3001]


def test_a_prompt_that_is_too_long_is_refused_with_its_row():
    assert len(encode(characters(), ROWS, PromptConfig(max_prompt_tokens=9))[1]) == 9
    with pytest.raises(UserError) as raised:
        encode(characters(), ROWS, PromptConfig(max_prompt_tokens=8))
    problem = "prompt.max_prompt_tokens: 1 of 2 prompts are longer than 8 tokens, row 'd/2' has 9"
    assert str(raised.value) == f"{problem}; set it to at least 9, or prompt.too_long to drop"


def test_a_template_without_a_system_role_is_named():
    assert text(encode(characters(NO_SYSTEM), ROWS, PromptConfig())[0]) == "1+1?"
    with pytest.raises(UserError, match="prompt.system: the model's chat template refuses it .no system role.; leave prompt.system empty"):
        encode(characters(NO_SYSTEM), ROWS, PromptConfig(system="Add."))


def test_no_rows_give_no_prompts():
    assert encode(characters(CHATML), [], PromptConfig()) == []
