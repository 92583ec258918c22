from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, example, tiny_language

from mmphi.config.shared import VisionSettings
from mmphi.data.schema import ImageRef
from mmphi.errors import ModelError
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision.vision_encoder import VisionReference


@pytest.fixture
def model():
    torch.manual_seed(2)
    return Multimodal(tiny_language(), Projector(ProjectorConfig(RandomFeatures.width, 32)), RandomFeatures())


def ref(name: str) -> ImageRef:
    return ImageRef(name, Path(name))


PROMPTS = [
    (ref("a"), ""),
    (ref("b"), "what is it?"),
    (None, "two and two?"),
    (ref("c"), "a much longer question? " * 3),
]


def test_batched_answers_equal_single_ones(model):
    single = [model.generate([p], max_new_tokens=12)[0] for p in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=12, batch_size=4) == single
    assert model.generate(PROMPTS, max_new_tokens=12, batch_size=3) == single
    assert len({a.text for a in single}) > 1


def test_an_image_alone_is_asked_about_as_in_training(model):
    own = model.language, model.projector, model.features
    asks = Multimodal(*own, vision=VisionReference(VisionSettings(), "random", question="what is it?"))
    alone, asked = asks.open_prompt(ref("b"), ""), model.open_prompt(ref("b"), "what is it?")
    assert alone.input_ids.tolist() == asked.input_ids.tolist()
    for image, question in ((ref("b"), "why?"), (None, "")):
        same = asks.open_prompt(image, question), model.open_prompt(image, question)
        assert same[0].input_ids.tolist() == same[1].input_ids.tolist()


def test_samples_are_repeatable_and_near_zero_greedy(model):
    greedy = model.generate(PROMPTS, max_new_tokens=8)
    cold = model.sample(PROMPTS, 2, 1e-4, max_new_tokens=8)
    assert cold == [[answer, answer] for answer in greedy]
    state = torch.get_rng_state()
    warm = model.sample(PROMPTS, 3, 1.0, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(group) for group in warm] == [3] * len(PROMPTS)
    assert len({answer.text for answer in warm[0]}) > 1
    assert model.sample(PROMPTS, 3, 1.0, max_new_tokens=8, seed=1) == warm
    assert model.sample(PROMPTS, 3, 1.0, max_new_tokens=8, seed=2) != warm


def test_samples_follow_the_models_distribution(model):
    """First tokens of many samples against the softmax of the logits, divided by the temperature."""
    image, question = PROMPTS[1]
    language = model.language
    drawn = [a.text for a in model.sample([(image, question)], 400, 0.7, max_new_tokens=1, batch_size=400)[0]]
    from mmphi.text.tokenized_example import SpanContent, join_spans

    sample = join_spans(language.prompt.parts([(question, None)], images=1), [SpanContent("image", image, 4)])
    ids = torch.from_numpy(sample.input_ids).long()[None]
    places = {"image": torch.arange(sample.spans[0].start, sample.spans[0].start + 4)}
    with torch.inference_mode():
        embeddings = model.packed.embed(ids, {"image": model.features.rows([image])}, places)
        chances = (language.model(inputs_embeds=embeddings).logits[0, -1] / 0.7).softmax(-1)
    likeliest = chances[:256].argmax()
    text = language.tokenizer.decode([int(likeliest)], skip_special_tokens=True).strip()
    share = sum(d == text for d in drawn) / len(drawn)
    assert share == pytest.approx(float(chances[likeliest]), abs=0.08)


def test_generation_equals_a_plain_greedy_loop(model):
    """Without cache, padding or generate(): the arg max of the whole sequence's logits, token by token."""
    language = model.language
    end = language.tokenizer.eos_token_id
    from mmphi.text.tokenized_example import SpanContent, join_spans

    for image, question in PROMPTS[:3]:
        parts = language.prompt.parts([(question, None)], images=int(image is not None))
        sample = join_spans(parts, [SpanContent("image", image, 4)] if image else [])
        ids = torch.from_numpy(sample.input_ids).long()[None]
        places = [i for span in sample.spans for i in range(span.start, span.start + span.length)]
        features = {"image": model.features.rows([image] if image else [])}
        embeddings = model.packed.embed(ids, features, {"image": torch.tensor(places, dtype=torch.long)})
        said = []
        for _ in range(10):
            token = int(language.model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax())
            if token == end:
                break
            said.append(token)
            grown = language.model.get_input_embeddings()(torch.tensor([[token]]))
            embeddings = torch.cat([embeddings, grown], dim=1)
        answer = model.generate([(image, question)], max_new_tokens=10)[0]
        assert answer.text == language.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert answer.ended == (len(said) < 10)


def test_an_answer_that_ends_says_so(model):
    head = model.language.model.get_output_embeddings()
    with torch.no_grad():
        head.bias[model.language.tokenizer.eos_token_id] += 1000
    (answer,) = model.generate([(ref("a"), "")])
    assert answer.ended
    assert answer.text == ""


def test_losses_depend_on_the_image_shown(model):
    examples = [example(i, f"a dog runs{i}") for i in range(3)]
    right = model.losses(examples)
    assert right[1] == 3 * 12
    swapped = model.losses(examples, [e.images for e in reversed(examples)])
    assert swapped[1] == right[1]
    assert swapped[0] != pytest.approx(right[0], rel=1e-6)
    one_by_one = sum(model.losses([e])[0] for e in examples)
    assert right[0] == pytest.approx(one_by_one, rel=1e-5)


def test_projector_of_another_width_is_refused():
    with pytest.raises(ModelError, match="width 9, not 12"):
        Multimodal(tiny_language(), Projector(ProjectorConfig(9, 32)), RandomFeatures())


def test_answers_stop_at_any_of_the_ends(model):
    """The prompt's own, and those of the model's generation configuration."""
    language = model.language
    language.model.generation_config.eos_token_id = [7, 9]
    assert set(language.ends) == {language.tokenizer.eos_token_id, 7, 9}
    with torch.no_grad():
        language.model.get_output_embeddings().bias[9] += 1000
    (answer,) = model.generate([(ref("a"), "")])
    assert answer.ended
    assert answer.text == ""
