"""Sequences end to end in one line are read as each is alone, whatever model reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import RandomFeatures, encode, example, tiny_language
from test_packing_check import COMMON, HEADS, ISOLATE, LEAK, build
from transformers import CohereConfig, Gemma2Config

from mmphi.models.language.language_model import LONG
from mmphi.models.language.packing_check import packing_error
from mmphi.models.multimodal import Multimodal
from mmphi.models.packed_vlm import PackedVLM, has_plain_head
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout, pack, packs, rows_of

ANSWERS = ["a dog", "two men on a bench", "snow", "b" * 60, "it rains", "ok"]
SCALED = CohereConfig(**COMMON, **HEADS, logit_scale=0.25)
CAPPED = Gemma2Config(**COMMON, **HEADS, head_dim=8, final_logit_softcapping=5.0)


def projected(language, layout):
    torch.manual_seed(1)
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    return PackedVLM(language.model, layout=Layout(layout), image=projector)


@pytest.mark.parametrize("config", [None, *ISOLATE[:2]], ids=["phi", "llama", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_rows(config, recompute):
    language = tiny_language()
    if config is not None:
        language = replace(language, model=build(config))
    samples = [encode(example(i, a, image=i != 2), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    found = {}
    for layout in ("alone", "rows", "line"):
        model = projected(language, layout).train()
        batch = pack(samples, {"image": RandomFeatures()}, layout=Layout(layout))
        with model.recomputing(recompute):
            loss = model(**batch)
            loss.backward()
        found[layout] = loss.item(), [p.grad for p in model.projectors.parameters()]
    for layout in ("alone", "rows"):
        assert found["line"][0] == pytest.approx(found[layout][0], rel=1e-5)
        for ours, theirs in zip(found["line"][1], found[layout][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert language.model.config._attn_implementation == "sdpa"


def test_on_a_processor_long_sequences_lie_in_a_line_and_others_in_rows():
    """What shares its beginning lies in rows too; each is read as it is where all lie in rows."""
    language, sources = tiny_language(), {"image": RandomFeatures()}
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    twice = [samples[0], encode(example(0, "two dogs"), language.prompt, 4, 200), *samples[1:]]
    mean = sum(map(len, samples)) // len(samples)
    rows = projected(language, "rows")
    for some, share, long, lines in (
        (samples, True, mean, True),
        (samples, True, mean + 1, False),
        (twice, False, mean - 2, True),
        (twice, True, mean - 2, False),
    ):
        layout = Layout("line", language.width, long)
        batch = pack(some, sources, layout=layout, share=share)
        assert ("borders" in batch) == lines
        model = projected(language, "line")
        model.layout = layout
        assert model(**batch).item() == pytest.approx(rows(**pack(some, sources)).item(), rel=1e-5)
    layout = Layout("line", language.width, mean)
    assert len(rows_of(samples, layout=layout)) == 1
    assert rows_of(samples, layout=replace(layout, long=mean + 1)) == rows_of(
        samples, layout=Layout(width=language.width)
    )
    assert "borders" not in pack(samples[:2], sources, layout=layout, rows=[[0], [1]])


def test_a_line_holds_no_padding_and_knows_its_borders():
    language = tiny_language()
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    lengths = [len(s) for s in samples]
    line = pack(samples, {"image": RandomFeatures()}, layout=Layout("line"))
    assert line["input_ids"].shape == (1, sum(lengths))
    assert (line["segments"] >= 0).all()
    assert line["borders"].diff().tolist() == lengths
    assert line["longest"] == max(lengths)
    some = list(packs(samples, {"image": RandomFeatures()}, 100, layout=Layout("line")))
    assert len(some) > 1
    assert sum(batch["input_ids"].numel() for batch in some) == sum(lengths)
    assert "borders" not in pack(samples, {"image": RandomFeatures()})


@pytest.mark.parametrize("config", [c for c in ISOLATE if not getattr(c, "sliding_window", None)])
def test_who_attends_inside_borders_is_found_out(config):
    language = replace(tiny_language(), model=build(config))
    assert packing_error(language.model, Layout("line")) < 1e-4
    assert language.layout(200, in_line=True).kind == "line"
    assert language.layout(LONG) == Layout("line", language.width, LONG)  # On a processor.
    assert language.layout(LONG - 1).kind == "rows"


@pytest.mark.parametrize("config", LEAK, ids=lambda c: c.model_type)
def test_who_does_not_is_packed_otherwise(config):
    language = replace(tiny_language(), model=build(config))
    assert packing_error(language.model, Layout("line")) > 1e-2
    assert language.layout(200, in_line=True).kind == "alone"


def test_attention_of_its_own_kind_keeps_rows():
    """What a model's eager attention does beside a softmax is not known to the attention inside borders."""
    language = tiny_language()
    language.model.set_attn_implementation("eager")
    assert language.layout(200, in_line=True).kind == "rows"


@pytest.mark.parametrize(
    ("config", "plain"), [(ISOLATE[0], True), (ISOLATE[1], True), (SCALED, False), (CAPPED, False)]
)
def test_heads_that_scale_or_cap_are_known(config, plain):
    model = build(config)
    assert has_plain_head(model) is plain
    language = replace(tiny_language(), model=model)
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    packed = projected(language, "rows")
    batch = pack(samples, {"image": RandomFeatures()})
    expected = F.cross_entropy(packed.logits(batch).float(), batch["targets"], reduction="sum")
    assert packed(**batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_plain_head_never_makes_all_logits():
    """Its own forward pass sees no position; the loss is computed in parts."""
    language, seen = tiny_language(), []
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    packed = projected(language, "rows")
    language.model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    packed(**pack(samples, {"image": RandomFeatures()})).backward()
    assert seen == [0]
    assert language.model.lm_head.weight.grad is None


def test_the_model_takes_what_its_language_model_does():
    language = tiny_language()
    model = Multimodal(language, Projector(ProjectorConfig(RandomFeatures.width, 32)), RandomFeatures(), 200)
    model.packed.layout = Layout("line")
    examples = [example(i, a, image=i != 2) for i, a in enumerate(ANSWERS)]
    nats, tokens = model.losses(examples)
    model.packed.layout = Layout("alone")
    alone, same = model.losses(examples)
    assert tokens == same
    assert nats == pytest.approx(alone, rel=1e-5)


def test_a_model_in_half_precision_is_left_to_it():
    """Under autocast its norms would copy all they are given; the loss is the same but for rounding."""
    language, seen = tiny_language(), []
    language.model.bfloat16()
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    language.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    packed, batch = projected(language, "line"), pack(samples, {"image": RandomFeatures()}, layout=Layout("line"))
    with torch.autocast("cpu", torch.bfloat16):
        packed(**batch).backward()
    assert seen[-1] is False
    exact, same = tiny_language(), pack(samples, {"image": RandomFeatures()})
    torch.testing.assert_close(packed(**batch), projected(exact, "rows")(**same), rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # An fp32 model needs it.
        exact.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        projected(exact, "rows")(**same)
    assert seen[-1] is True
