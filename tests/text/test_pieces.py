"""Tokenizers in the style of SentencePiece: a prompt has the tokens of its text as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from test_chat_template import MISTRAL, SILENT, TURNS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmphi.text.pieces import PromptEncoder, PromptPiece
from mmphi.text.prompt import Prompt

WORDS = ["a", "dog", "in", "the", "snow", "what", "is", "it", "where", "and", "no", "INST", "user", "assistant"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=12)) + "\n[INST] what? [/INST] it.\n" for i in range(200)]
TEXTS.append("é </s> <s> <image>,")
# As files of Llama 2 and Mistral have it; as newer ones do; and with a marker after every special token.
KINDS = ("prepend", "first", "always")


def sentencepiece(kind: str) -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids(prompt: Prompt, turns: list[tuple[str, str | None]], **how: Any) -> list[int]:
    return [number for part in prompt.parts(turns, **how) for number in part.ids]


def text_of(tokenizer: Any, numbers: Sequence[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(numbers)).replace("▁", " ")


def messages(turns: list[tuple[str, str | None]]) -> list[dict[str, str | None]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text is not None
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_tokens_of_its_text(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = MISTRAL
    text = tokenizer.apply_chat_template(messages(TURNS), tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = Prompt(tokenizer)
    assert prompt.encoder.joins
    assert ids(prompt, TURNS) == expected
    assert ids(prompt, [*TURNS[:2], ("and?", None)]) == expected[: len(ids(prompt, [*TURNS[:2], ("and?", None)]))]


# Llama 2: a space before the token that ends an answer.
LLAMA2 = MISTRAL.replace("{{ m['content'] }}{{ eos_token }}", "{{ m['content'] }} {{ eos_token }}")
# Phi-3: tokens that take the white space after them.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [LLAMA2, PHI3])
@pytest.mark.parametrize("side", ["rstrip", "lstrip"])
def test_ends_of_answers_have_the_tokens_of_the_text(kind: str, template: str, side: str) -> None:
    tokenizer = sentencepiece(kind)
    if template is PHI3:
        tokens = [AddedToken(f"<|{name}|>", special=True, **{side: True}) for name in ("user", "assistant", "end")]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    text = tokenizer.apply_chat_template(messages(TURNS), tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = Prompt(tokenizer)
    found = ids(prompt, TURNS)
    assert found == expected[: len(found)]
    assert text_of(tokenizer, expected[len(found) :]).strip() == ""
    asked = ids(prompt, [*TURNS[:2], ("and?", None)])
    assert found[: len(asked)] == asked
    assert found[-len(prompt.end) :] == list(prompt.end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["plain", "phi"])
def test_lines_have_the_tokens_of_their_text(kind: str, style: Any) -> None:
    tokenizer = sentencepiece(kind)
    prompt = Prompt(tokenizer, style)
    text = {"plain": "what is it?\na dog", "phi": "Instruct: what is it?\nOutput: a dog"}[style]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids(prompt, [("what is it?", "a dog")]) == [1, *expected, 2]
    asked = ids(prompt, [("what is it?", None)])
    assert [1, *expected][: len(asked)] == asked
    (answer,) = [part for part in prompt.parts([("what is it?", "a dog")]) if part.supervised]
    assert text_of(tokenizer, answer.ids[:-1]).strip() == "a dog"
    assert asked + list(answer.ids) == [1, *expected, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_texts_from_outside_stay_text(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = MISTRAL
    found = ids(Prompt(tokenizer), [("what </s> is <s> it?", "a </s> dog")])
    assert (found.count(1), found.count(2)) == (1, 1)
    assert text_of(tokenizer, found).replace("  ", " ") == "<s> [INST] what </s> is <s> it? [/INST] a </s> dog</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_image_the_text_goes_on(kind: str) -> None:
    """Of texts around features those before are the tokens of the text, and those after as after a special token."""
    tokenizer = sentencepiece(kind)
    parts = Prompt(tokenizer, "plain").parts([("what is <image> it?", "a dog")], images=1)
    before = [number for part in parts[:2] for number in part.ids]
    assert parts[2].span == "image"
    assert before == [1, *tokenizer("what is ", add_special_tokens=False)["input_ids"]]
    after = [number for part in parts[3:] for number in part.ids]
    assert [2, *after] == tokenizer("</s> it?\na dog</s>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_transcript_are_the_tokens_of_the_words_typed(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = MISTRAL
    prompt = Prompt(tokenizer)
    heard = prompt.parts([("so <audio>, no?", None)], audio=["what is it"])
    assert [number for part in heard for number in part.ids] == ids(prompt, [("so what is it, no?", None)])
    (spelled,) = [part for part in heard if part.spelled]
    assert text_of(tokenizer, spelled.ids).strip() == "what is it"


@pytest.mark.parametrize("kind", KINDS)
def test_random_pieces_have_the_tokens_of_their_text(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    encoder, draw = PromptEncoder(tokenizer), random.Random(0)
    for _ in range(200):
        texts = ["".join(draw.choices(["a", " dog", "\n", " ", "é", "[INST]", "snow", ""], k=4)) for _ in range(5)]
        parts = encoder.parts([PromptPiece(text, template=draw.random() < 0.5) for text in texts])
        found = [number for part in parts for number in part.ids]
        assert found == tokenizer("".join(texts), add_special_tokens=False)["input_ids"]


def test_a_template_without_a_way_to_ask_has_the_tokens_of_its_text() -> None:
    tokenizer = sentencepiece("prepend")
    tokenizer.chat_template = SILENT
    expected = tokenizer("user: what is it?\nassistant: a dog", add_special_tokens=False)["input_ids"]
    assert ids(Prompt(tokenizer), [("what is it?", "a dog")]) == [*expected, 2]
