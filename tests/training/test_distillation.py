"""What is said after hearing is compared with what is said after reading, token by token, however it is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import tiny_language

from mmphi.config.shared import TrainingSettings
from mmphi.data.schema import AudioRef, Example, Turn
from mmphi.models.audio.audio_features import EncoderFeatures
from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig
from mmphi.models.multimodal import Multimodal
from mmphi.text.packing import Layout
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.training.audio_conversations import audio_text_pairs
from mmphi.training.distillation import DistillationDataset, DistillationTask, collate_pairs, distillation_dataset

WORDS = ["a dog", "two cats in a tree", "snow", "a man who sings to a horse", "rain on the sea", "who knows"]


def frames(audio: AudioRef) -> torch.Tensor:
    count = 3 + 5 * int(audio.id)
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count)).half()


def listening() -> Multimodal:
    torch.manual_seed(3)
    speech = AudioProjector(AudioProjectorConfig("encoder", 24, 32, stack=4), scale=0.3)
    return Multimodal(tiny_language(), None, None, audio_source=EncoderFeatures(frames, 6, 4), speech=speech)


def conversations() -> list[Example]:
    return [
        Example(str(i), (), (Turn("say: <audio>", text),), "s", attributes={"said": text}, audio=(ref(i),))
        for i, text in enumerate(WORDS)
    ]


def ref(number: int) -> AudioRef:
    return AudioRef(str(number), Path(str(number)))


def divergence(
    model: Multimodal, heard: TokenizedExample, read: TokenizedExample, temperature: float, end_weight: float
) -> torch.Tensor:
    """Of one conversation, written out: whole sequences through the model, sums by hand."""
    embed = model.language.model.get_input_embeddings()
    (span,) = heard.spans
    assert model.speech is not None
    rows = model.speech(model.audio_source.rows([span.reference]))
    typed = embed(torch.from_numpy(heard.input_ids).long())
    given = torch.cat([typed[: span.start], rows, typed[span.start + span.length :]])
    total = torch.zeros(())
    ours = model.language.model(inputs_embeds=given[None]).logits[0]
    theirs = model.language.model(input_ids=torch.from_numpy(read.input_ids).long()[None]).logits[0]
    end = model.language.prompt.end[-1]
    ours, theirs = (x.double() / temperature for x in (ours, theirs))
    for i, j in zip(heard.supervised.nonzero()[0], read.supervised.nonzero()[0], strict=True):
        assert heard.input_ids[i] == read.input_ids[j]
        p, q = theirs[j - 1].softmax(-1), ours[i - 1].softmax(-1)
        weight = 1 + end_weight * bool(heard.input_ids[i] == end)
        total = total + weight * (p * (p.log() - q.log())).sum() * temperature**2
    return total


@pytest.mark.parametrize(("temperature", "end_weight"), [(1.0, 0.0), (2.0, 1.0)])
def test_loss_and_gradient_against_each_sequence_alone(temperature: float, end_weight: float) -> None:
    model = listening()
    heard, read = audio_text_pairs(model, conversations())
    assert len(heard) == len(WORDS)
    task = DistillationTask(model.packed, temperature, end_weight)
    batch = collate_pairs(heard, read, model.sources, model.language.prompt.end[-1])
    assert batch["with_audio"]["input_ids"].shape[0] < len(WORDS)  # Several share a row.
    loss = task(**batch)
    loss.backward()
    assert model.speech is not None
    packed = [p.grad.clone() for p in model.speech.parameters() if p.grad is not None]
    model.speech.zero_grad()
    expected = sum(divergence(model, h, r, temperature, end_weight) for h, r in zip(heard, read, strict=True))
    assert isinstance(expected, torch.Tensor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    alone = [p.grad for p in model.speech.parameters() if p.grad is not None]
    assert len(alone) == len(packed) == 4
    for one, two in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_nothing_is_learned_where_both_say_the_same() -> None:
    model = listening()
    _, read = audio_text_pairs(model, conversations())
    task = DistillationTask(model.packed, 2.0, 1.0)
    batch = collate_pairs(read, read, model.sources, model.language.prompt.end[-1])
    assert task(**batch).item() == pytest.approx(0, abs=1e-4)


def test_packs_of_a_step_are_the_step(tmp_path: Path) -> None:
    model = listening()
    heard, read = audio_text_pairs(model, conversations())
    end = model.language.prompt.end[-1]
    task = DistillationTask(model.packed, 2.0, 1.0)

    def losses(accumulation: int, alone: bool = False) -> list[float]:
        settings = TrainingSettings(steps=3, batch_size=4, gradient_accumulation_steps=accumulation, seed=5)
        steps = distillation_dataset(
            heard, read, model.sources, settings, end, layout=Layout("alone" if alone else "rows")
        )
        found = [(task(**steps[i]) / steps[i]["step_tokens"]).item() for i in range(len(steps))]
        return [sum(found[i : i + accumulation]) for i in range(0, len(found), accumulation)]

    whole = losses(1)
    assert losses(2) == pytest.approx(whole, rel=1e-4)
    assert losses(4) == pytest.approx(whole, rel=1e-4)
    assert losses(1, alone=True) == pytest.approx(whole, rel=1e-4)


def test_pairs_that_differ_are_a_mistake() -> None:
    model = listening()
    heard, read = audio_text_pairs(model, conversations())
    with pytest.raises(ValueError, match="different answers"):
        collate_pairs(heard, read[1:] + read[:1], model.sources, 256)
    steps = distillation_dataset(heard, read, model.sources, TrainingSettings(steps=1, batch_size=2), 256)
    with pytest.raises(ValueError, match="6 conversations in audio form, but 5 in text form"):
        DistillationDataset(steps.steps, read[1:], 256)
