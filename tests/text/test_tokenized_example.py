"""Spans: several images in one conversation, each where its question says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, byte_tokenizer, encode, of_length, tiny_language

from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.data.tokenized_dataset import image_inputs
from mmphi.models.multimodal import Multimodal
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import pack
from mmphi.text.prompt import Prompt

TWO = tuple(ImageRef(name, Path(name)) for name in "ab")
END = "<|endoftext|>"


def compare(*questions: str, images: tuple[ImageRef, ...] = TWO) -> Example:
    return Example("1", images, tuple(Turn(q, f"answer {i}") for i, q in enumerate(questions)), "photos")


def written(example: Example, style: str = "plain", max_length: int = 400) -> str:
    """A sequence as text, images by their names in brackets."""
    prompt = Prompt(byte_tokenizer(), style)
    sample = encode(example, prompt, 4, max_length)
    shown, place = [], 0
    for span in sample.spans:
        shown += [prompt.tokenizer.decode(sample.input_ids[place : span.start].tolist()), f"[{span.reference.id}]"]
        place = span.start + span.length
    return "".join([*shown, prompt.tokenizer.decode(sample.input_ids[place:].tolist())])


def test_images_stand_where_the_questions_say() -> None:
    assert written(compare("<image> or <image>?")) == f"{END}[a] or [b]?\nanswer 0{END}"
    assert written(compare("what is <image>?", "and\n<image>")) == (
        f"{END}what is [a]?\nanswer 0{END}\nand\n[b]\nanswer 1{END}"
    )
    assert written(compare("<image> or <image>?"), "phi") == f"{END}Instruct: [a] or [b]?\nOutput: answer 0{END}"


def test_images_that_no_question_places_come_first() -> None:
    assert written(compare("which is larger?")) == f"{END}[a][b]\nwhich is larger?\nanswer 0{END}"
    one_mark = compare("what does <image> mean in HTML?")
    assert written(one_mark) == f"{END}[a][b]\nwhat does <image> mean in HTML?\nanswer 0{END}"


def test_turns_that_do_not_fit_take_their_images_with_them() -> None:
    example = compare("first <image>?", "second <image>?")
    assert written(example, max_length=40) == f"{END}second [b]?\nanswer 1{END}"
    assert written(compare("first?", "second?"), max_length=40) == f"{END}[a][b]\nsecond?\nanswer 1{END}"


@pytest.fixture
def model() -> Multimodal:
    language = tiny_language()
    torch.manual_seed(1)
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    return Multimodal(language, projector, RandomFeatures(), 400)


def test_several_images_packed_equal_alone(model: Multimodal) -> None:
    examples = [
        compare("<image> or <image>?"),
        compare("both?"),
        compare("<image>", "<image>"),
        compare("one", images=()),
    ]
    samples = [encode(e, model.language.prompt, 4, 400) for e in examples]
    together = model.packed(**pack(samples, model.sources))
    alone = [model.packed(**pack([sample], model.sources)) for sample in samples]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-5)


def test_order_of_images_matters_to_the_model(model: Multimodal) -> None:
    example = compare("<image> or <image>?")
    right, _ = model.losses([example])
    swapped, _ = model.losses([example], [TWO[::-1]])
    assert abs(right - swapped) > 1e-3


def test_answers_about_several_images_batched_equal_single(model: Multimodal) -> None:
    prompts = [(TWO, "<image> or <image>?"), (TWO[0], "what?"), (None, "hello"), (TWO, "which?")]
    batched = model.generate(prompts, max_new_tokens=6)
    assert batched == [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_embeddings_are_the_projected_features_in_their_places(model: Multimodal) -> None:
    sample = encode(compare("x<image>y<image>"), model.language.prompt, 4, 400)
    rows = pack([sample], model.sources)
    embedded = model.packed.embed(rows["input_ids"], rows["features"], rows["places"])[0]
    for span in sample.spans:
        expected = model.projector(RandomFeatures().rows([span.reference]))
        torch.testing.assert_close(embedded[span.start : span.start + span.length], expected)


def test_two_kinds_of_features_have_places_of_their_own() -> None:
    """What audio will need: another kind of span, another width, another length, one mechanism."""
    from mmphi.text.pieces import PromptPart
    from mmphi.text.tokenized_example import SpanContent, join_spans

    class Sounds:
        width = 5

        def length(self, name: str) -> int:
            return len(name)

        def rows(self, names: list[str]) -> torch.Tensor:
            rows = [torch.full((len(name), 5), float(ord(name[0]))) for name in names]
            return torch.cat([torch.zeros(0, 5), *rows]).half()

    language = tiny_language()
    sources = {"image": RandomFeatures(), "audio": Sounds()}
    parts = [
        PromptPart((1,)),
        PromptPart(span="audio"),
        PromptPart((2,)),
        PromptPart(span="image"),
        PromptPart(span="audio"),
        PromptPart((3, 4), True),
    ]
    inputs = [*image_inputs(TWO[:1], of_length()), SpanContent("audio", "abc", 3), SpanContent("audio", "z", 1)]
    sample = join_spans(parts, inputs)
    assert [(s.kind, s.start, s.length) for s in sample.spans] == [("audio", 1, 3), ("image", 5, 4), ("audio", 9, 1)]
    image, audio = Projector(ProjectorConfig(12, 32)), Projector(ProjectorConfig(5, 32, layers=1))
    model = PackedVLM(language.model, image=image, audio=audio)
    rows = pack([sample], sources)
    embedded = model.embed(rows["input_ids"], rows["features"], rows["places"])[0]
    torch.testing.assert_close(embedded[1:4], audio(Sounds().rows(["abc"])))
    torch.testing.assert_close(embedded[9:10], audio(Sounds().rows(["z"])))
    model(**rows).backward()
    assert all(p.grad is not None for p in [*image.parameters(), *audio.parameters()])
