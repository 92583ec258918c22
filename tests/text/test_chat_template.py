"""Chat templates as published models bring them, written small: training and inference see one prompt."""

from __future__ import annotations

from typing import Any

import pytest
from builders import byte_tokenizer

from mmphi.errors import ModelError
from mmphi.text.chat_template import TODAY
from mmphi.text.llava_chat_template import llava_template
from mmphi.text.prompt import Prompt

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}" + OPEN + "{{ m['role'] }}\n{{ m['content'] }}" + CLOSE + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + OPEN + "assistant\n{% endif %}"
)
# Qwen3: an empty block of thoughts before the last answer, and where thoughts are turned off.
QWEN3 = (
    "{% for m in messages %}" + OPEN + "{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}" + CLOSE + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + OPEN + "assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The same without a way to turn thoughts off.
THINKING = QWEN3.replace("enable_thinking is defined and enable_thinking is false", "false")
# DeepSeek-R1's distilled models: thoughts are opened to ask, and are not part of the history.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>') | last }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Mistral: a space before an answer of the history, none after the prompt.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Zephyr's older relatives: no way to ask for an answer.
SILENT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }} ({{ strftime_now(\"%Y\") }})\n" + CHATML
TEMPLATES = {
    "thinking": THINKING,
    "chatml": CHATML,
    "qwen3": QWEN3,
    "r1": R1,
    "mistral": MISTRAL,
    "silent": SILENT,
    "dated": DATED,
}
TURNS: list[tuple[str, str | None]] = [("what is it?", "a dog"), ("where?", "in the snow"), ("and?", "no more")]


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE, "<|User|>", "<|Assistant|>"]})
    tokenizer.chat_template = template
    return tokenizer


def ids(prompt: Prompt, turns: list[tuple[str, str | None]], **how: Any) -> list[int]:
    return [number for part in prompt.parts(turns, **how) for number in part.ids]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("images", [0, 1])
def test_an_answer_is_asked_for_as_it_was_trained_on(name: str, images: int) -> None:
    """What inference begins with is what stands before the answer in training, in every turn."""
    prompt = Prompt(tokenizer_with(TEMPLATES[name]))
    whole = ids(prompt, TURNS, images=images)
    for count, (question, answer) in enumerate(TURNS):
        asked = ids(prompt, [*TURNS[:count], (question, None)], images=images)
        assert whole[: len(asked)] == asked
        assert answer is not None
        followed = prompt.tokenizer.decode(whole[len(asked) :])
        assert followed.lstrip(" ").startswith(answer)


@pytest.mark.parametrize(
    ("name", "options"), [("chatml", {}), ("qwen3", {"enable_thinking": False}), ("r1", {}), ("mistral", {})]
)
def test_a_question_is_asked_as_the_template_asks_it(name: str, options: dict[str, bool]) -> None:
    """The template's own text, with thoughts turned off where it knows how."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = [{"role": "user", "content": "what is it?"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert tokenizer.decode(ids(Prompt(tokenizer), [("what is it?", None)])) == expected


def test_a_template_that_cannot_ask_is_asked_by_what_it_writes_before_answers() -> None:
    tokenizer = tokenizer_with(SILENT)
    asked = ids(Prompt(tokenizer), [("what is it?", None)])
    assert tokenizer.decode(asked) == "user: what is it?\nassistant:"


def test_todays_date_is_not_part_of_a_prompt() -> None:
    tokenizer = tokenizer_with(DATED)
    text = tokenizer.decode(ids(Prompt(tokenizer), [("what is it?", None)]))
    assert text.startswith(f"{TODAY:%d %b %Y} ({TODAY:%Y})\n")


@pytest.mark.parametrize("name", ["chatml", "qwen3", "thinking", "r1", "mistral", "dated"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_export_writes_the_same(name: str, count: int) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    prompt = Prompt(tokenizer)
    turns = [*TURNS[: count - 1], (TURNS[count - 1][0], None)]
    expected = tokenizer.decode(ids(prompt, turns))
    tokenizer.chat_template = llava_template(prompt)
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_a_template_that_cannot_ask_is_not_exported() -> None:
    with pytest.raises(ModelError, match="does not ask for answers"):
        llava_template(Prompt(tokenizer_with(SILENT)))


def test_a_template_that_drops_answers_is_refused() -> None:
    with pytest.raises(ModelError, match="does not write a question and its answer"):
        Prompt(tokenizer_with("{{ messages[0]['content'] }}{% if add_generation_prompt %}:{% endif %}"))


def test_digests_of_templates_that_are_not_changed_are_as_before() -> None:
    """Else every stored encoding of such a model would be made again."""
    for name in TEMPLATES:
        template = Prompt(tokenizer_with(TEMPLATES[name])).template
        assert template is not None
        assert bool(template.changes) == (name != "chatml")
