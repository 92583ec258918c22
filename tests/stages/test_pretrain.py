from __future__ import annotations

import json

import pytest
import torch
from builders import context

from mmphi.config import LanguageSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.models.language.language_model import load_language_model
from mmphi.pipeline.stage import Result
from mmphi.stages import Settings, pretrain, scenes
from mmphi.stages.pretrain_scenes import scene_samples
from mmphi.stages.scenes import ScenesSettings
from mmphi.training.pretraining import model_config

SMALL = {"layers": 2, "width": 32, "heads": 2, "steps": 8, "batch_size": 8, "max_length": 128, "vocabulary": 320}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    settings = Settings(scenes=ScenesSettings(train_images=8, validation_images=1, test_images=1, texts=400))
    scenes.run(context(scenes.STAGE, folder, settings))
    return Result("scenes", "key", "run", folder)


def test_scenes_as_words(tmp_path, drawn, recorder):
    settings = Settings(pretrain=PretrainSettings(**SMALL))
    metrics = pretrain.run(context(pretrain.STAGE, tmp_path, settings, upstream={"scenes": drawn}, tracker=recorder))
    assert metrics["val/answer_loss"] < recorder.series("train/loss")[1]
    found = load_language_model(LanguageSettings(), tmp_path, torch.device("cpu"))
    assert found.model.config.num_hidden_layers == 2
    assert len(found.tokenizer) <= 320
    again = load_language_model(LanguageSettings(model=str(tmp_path / "language")), None, torch.device("cpu"))
    ids = torch.arange(30)[None]
    assert torch.equal(found.model(ids).logits, again.model(ids).logits)


def test_answers_only_are_learned_or_everything(drawn):
    from builders import byte_tokenizer

    from mmphi.text.prompt import Prompt

    tokenizer = byte_tokenizer()
    row = json.loads((drawn.path / "corpus.jsonl").read_text().splitlines()[0])
    chosen = PretrainSettings(max_length=400)
    for answers_only in (True, False):
        (sample,) = scene_samples([row], Prompt(tokenizer, "plain"), chosen, answers_only=answers_only)
        learned = tokenizer.decode(sample.input_ids[sample.supervised].tolist())
        text = "".join(answer + "<|endoftext|>" for _, answer in row["turns"])
        assert (learned == text) == answers_only
        assert learned.endswith(text)


def test_a_model_begins_as_it_is_asked_to(tmp_path, drawn):
    shape = {"initializer_range": 0.1, "partial_rotary_factor": 1.0}
    chosen = PretrainSettings(**{**SMALL, "steps": 1, "learning_rate": 1e-9, **shape})
    pretrain.run(context(pretrain.STAGE, tmp_path, Settings(pretrain=chosen), upstream={"scenes": drawn}))
    model = load_language_model(LanguageSettings(), tmp_path, torch.device("cpu")).model
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.config.rope_parameters["partial_rotary_factor"] == 1.0
    usual = model_config(PretrainSettings(**SMALL), 100, 0)
    assert (usual.initializer_range, usual.rope_parameters["partial_rotary_factor"]) == (0.02, 0.5)
