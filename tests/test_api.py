"""The library: a user's own encoder, language model and data in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import small
import torch
from builders import byte_tokenizer, tiny_language
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import mmphi
from mmphi.api import Model
from mmphi.config.projector import ProjectorSettings
from mmphi.data.features import FeatureStore
from mmphi.data.in_memory import examples_of, image_reference
from mmphi.errors import DataError, ImageError, ModelError, SettingsError, TrainingError
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector_kinds import KINDS
from mmphi.stages.shared_models import read

COLORS = {"red": (200, 40, 40), "green": (40, 160, 40), "blue": (40, 60, 200), "grey": (120, 120, 120)}
PAIRS = [(Image.new("RGB", (20, 20), color), name) for name, color in COLORS.items()]
QUICK: dict[str, Any] = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "progress": False}


class Patches(nn.Module):
    """The mean color of each of 2 x 2 patches, scaled: features (N, 4, 3)."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255


def joined(**options: Any) -> Model:
    options = {"vision": Patches(), "preprocess": pixels_of, "max_length": 64, **options}
    language = tiny_language()
    return mmphi.join(language.model, tokenizer=byte_tokenizer(), **options)


def test_a_module_and_pairs_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, seen = joined(), []
    before = model.loss(PAIRS)
    trained = model.fit(PAIRS, validation=PAIRS, eval_every=10, logger=lambda *given: seen.append(given), **QUICK)
    assert trained.steps == 30
    assert trained.figures["val/loss"] == pytest.approx(model.loss(PAIRS), rel=1e-3)
    assert model.loss(PAIRS) < before - 0.5
    assert {step for values, step in seen if "val/loss" in values} >= {10, 20, 30}
    answers = {model.ask("", image, max_new_tokens=6) for image, _ in PAIRS}
    assert len(answers) > 1
    as_messages = [{"role": "user", "content": [{"type": "image", "image": PAIRS[0][0]}]}]
    assert model.chat(as_messages, max_tokens=6) == model.ask("", PAIRS[0][0], max_new_tokens=6)
    assert "".join(model.stream(as_messages, max_tokens=6)) == model.ask("", PAIRS[0][0], max_new_tokens=6)
    assert model.image_features(PAIRS[0][0], PAIRS[1][0]).shape == (2, 4, 3)
    assert model.evaluate(PAIRS)["test/loss"] == pytest.approx(model.loss(PAIRS), rel=1e-3)
    assert list(tmp_path.iterdir()) == []  # Nothing is written unless it is asked for.


def test_what_is_saved_loads_in_another_process(tmp_path: Path) -> None:
    model = joined()
    model.fit(PAIRS, **QUICK)
    model.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import test_api, mmphi\n"
        "model = mmphi.load(sys.argv[1], vision=test_api.Patches(), preprocess=test_api.pixels_of)\n"
        "print(model.loss(test_api.PAIRS), model.ask('', test_api.PAIRS[0][0], max_new_tokens=6))"
    )
    paths = [str(Path(__file__).parent), str(Path(small.__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loss, _, answer = done.stdout.strip().partition(" ")
    assert float(loss) == pytest.approx(model.loss(PAIRS), rel=1e-3)
    assert answer == model.ask("", PAIRS[0][0], max_new_tokens=6)
    with pytest.raises(ModelError, match=r"(?s)Patches.*pass it again"):
        mmphi.load(tmp_path / "saved")
    with pytest.raises(ModelError, match="its features differ"):
        mmphi.load(tmp_path / "saved", vision=Patches(2.0), preprocess=pixels_of)
    (tmp_path / "saved" / "mmphi.json").write_text('{"format": 3}')
    with pytest.raises(ModelError, match=r"(?s)has format 3, not 1 or 2.*update mmphi"):
        mmphi.load(tmp_path / "saved")


def test_a_loaded_model_goes_on_learning(tmp_path: Path) -> None:
    model = joined()
    model.fit(PAIRS, **QUICK | {"steps": 5})
    model.save_pretrained(tmp_path / "saved")
    again = mmphi.load(tmp_path / "saved", vision=Patches(), preprocess=pixels_of)
    before = again.loss(PAIRS)
    again.fit(PAIRS, **QUICK)
    assert again.loss(PAIRS) < before
    with pytest.raises(SettingsError, match="layers: the projector exists already"):
        again.fit(PAIRS, layers=3)


def test_the_stage_and_the_library_train_the_same_weights(small_chain: Path, tmp_path: Path) -> None:
    with small.built("projector", small_chain, tmp_path / "store") as pipeline:
        settings = small.settings()
        stages = {name: pipeline.build(name, settings) for name in ("scenes", "pretrain", "embed", "projector")}
        language = pipeline.build("pretrain", settings).path / "language"
    chosen = settings.projector
    assert isinstance(chosen, ProjectorSettings)
    examples, _ = read(lambda _: settings.data, {"scenes": stages["scenes"]})  # type: ignore[arg-type]  # Sections alone.
    torch.set_num_threads(1)
    own = chosen.model_dump(exclude={"features"})
    shape = {
        name: own.pop(name)
        for name in ("layers", "width", "activation", "norm", "dropout", "standardize", "parameters")
    }
    model = mmphi.join(language, FeatureStore(stages["embed"].path), max_length=chosen.max_length, **shape)
    model.fit(examples, **own)
    expected = load_file(stages["projector"].path / "projector.safetensors")
    found = model.projector.state_dict() if model.projector is not None else {}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_an_adapter_is_trained_on_a_projectors_model() -> None:
    model = joined()
    with pytest.raises(ModelError, match="the projector is not trained yet"):
        model.fit(PAIRS, adapter=True)
    model.fit(PAIRS, **QUICK | {"steps": 5})
    before = model.loss(PAIRS)
    model.fit(PAIRS, adapter=True, rank=4, **QUICK)
    assert model.loss(PAIRS) < before
    with pytest.raises(ModelError, match="has an adapter already"):
        model.fit(PAIRS, adapter=True)


def test_forms_of_rows(tmp_path: Path) -> None:
    image = Image.new("RGB", (9, 9), (1, 2, 3))
    path = tmp_path / "one.png"
    image.save(path)
    user = [{"type": "text", "text": "which?"}, {"type": "image", "image": image}]
    rows = [
        (image, "a square"),
        (path, "which?", "a square"),
        (None, "two and two?", "four"),
        ([image, np.array(image)], "both"),
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "a square"}]},
        {
            "image": image,
            "conversations": [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "1"}],
        },
    ]
    examples = examples_of(rows)
    assert [len(e.images) for e in examples] == [1, 1, 0, 2, 1, 1]
    assert [e.turns[0].answer for e in examples] == ["a square", "a square", "four", "both", "a square", "1"]
    pictures = {e.images[0].id for e in examples if e.images and e.images[0].content}
    assert len(pictures) == 1  # One picture is one image, however it comes.
    assert image_reference(np.array(image)).id in pictures


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("a",), "row 1: a row is"),
        ((Image.new("RGB", (9, 9)), ""), "row 1: the answer is empty"),
        ((3, "three"), "int is not a path, bytes, PIL image"),
        ((np.zeros((4, 4, 3)), "floats"), "uint8, this one is float64"),
        ({"text": "x"}, "row 1: no list called conversations or messages"),
    ],
)
def test_rows_that_cannot_be_used(row: Any, words: str) -> None:
    with pytest.raises((DataError, ImageError), match=words):
        examples_of([PAIRS[0], row])


def test_tensors_are_pixels_of_an_encoder_without_preprocessing() -> None:
    model = joined(preprocess=None)
    pairs = [(pixels_of(image), name) for image, name in PAIRS]
    model.fit(pairs, **QUICK)
    assert model.ask("", pairs[0][0], max_new_tokens=4) == model.ask("", pairs[0][0], max_new_tokens=4)
    with pytest.raises(ModelError, match=r"Patches has no preprocessing"):
        model.ask("", PAIRS[0][0])
    with pytest.raises(ImageError, match="the pixels have the shapes"):
        model.fit([(torch.rand(3, 8, 8), "one"), (torch.rand(3, 9, 9), "two")], **QUICK)


class Odd(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 3}, "no setting 'layer' for this encoder"),
        ({"vision": Odd()}, r"Odd gives \(1, 3, 8, 8\) for 1 images"),
        ({"vision": 3}, "vision is a int"),
        ({"vision": "timm/vit_tinny"}, "did you mean .*vit_tiny"),
        ({"preprocess": lambda image: torch.zeros(3)}, r"preprocess gives shape \(3,\)"),
        ({"projector": nn.Linear(3, 5)}, "not .2, 32."),
        ({"projector": nn.Linear(3, 32), "layers": 2}, "layers cannot be combined with projector"),
    ],
)
def test_parts_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ModelError, SettingsError), match=words):
        joined(**options)


def test_unknown_settings_and_values_out_of_bounds() -> None:
    with pytest.raises(SettingsError, match=r"(?s)no setting 'step'.*did you mean steps"):
        joined().fit(PAIRS, step=3)
    with pytest.raises(SettingsError, match=r"(?s)steps = 0, but it must be .*nearest valid value is 1"):
        joined().fit(PAIRS, steps=0)
    with pytest.raises(SettingsError, match="logger is 'wandb'"):
        joined().fit(PAIRS, logger="wandb", **QUICK)


def test_a_projector_of_ones_own_is_trained_and_not_saved(tmp_path: Path) -> None:
    model = joined(projector=nn.Linear(3, 32))
    before = model.loss(PAIRS)
    model.fit(PAIRS, **QUICK)
    assert model.loss(PAIRS) < before
    with pytest.raises(ModelError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "mmphi.json").exists()


def test_a_run_of_mlflow_is_recorded_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with mlflow.start_run() as run:
        joined().fit(PAIRS, logger="mlflow", log_every=1, **QUICK)
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert {"train/loss", "projector/parameters"} <= set(metrics)


def test_a_training_resumes_from_its_folder(tmp_path: Path) -> None:
    with small.interrupted_after(10):
        joined().fit(PAIRS, folder=tmp_path / "run", save_every=5, **QUICK)
    resumed, whole = joined(), joined()
    resumed.fit(PAIRS, folder=tmp_path / "run", save_every=5, **QUICK)
    whole.fit(PAIRS, **QUICK)
    assert resumed.loss(PAIRS) == pytest.approx(whole.loss(PAIRS), abs=1e-6)


def test_neither_mlflow_nor_optuna_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import test_api\n"
        "for name in ('mlflow', 'optuna', 'mmphi.pipeline.build', 'mmphi.stages', 'mmphi.cli'):\n"
        "    sys.modules.pop(name, None)\n"
        "    sys.modules[name] = None\n"  # An import of it fails.
        "model = test_api.joined(); model.fit(test_api.PAIRS, **test_api.QUICK); print(model.loss(test_api.PAIRS))"
    )
    paths = [str(Path(__file__).parent), str(Path(small.__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_model_that_loads_is_one_that_can_be_trained(small_chain: Path, tmp_path: Path) -> None:
    with small.built("projector", small_chain, tmp_path) as pipeline:
        folder = pipeline.build("projector", small.settings()).path
    assert isinstance(mmphi.load(folder), Model)
    assert isinstance(Model.from_pretrained(folder), Multimodal)


def test_an_adapter_on_a_model_given_as_an_object_is_saved_and_loaded(tmp_path: Path) -> None:
    model = joined()
    model.fit(PAIRS, **QUICK | {"steps": 5})
    model.fit(PAIRS, adapter=True, rank=4, **QUICK | {"steps": 10})
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "language" / "model.safetensors")
    assert not any("lora_" in name or "base_layer" in name for name in names)
    again = mmphi.load(tmp_path / "saved", vision=Patches(), preprocess=pixels_of)
    assert again.loss(PAIRS) == pytest.approx(model.loss(PAIRS), rel=1e-3)


def test_an_adapter_changes_no_other_model_of_the_same_language_model() -> None:
    language = tiny_language().model
    one, two = (
        mmphi.join(language, Patches(), preprocess=pixels_of, tokenizer=byte_tokenizer(), max_length=64) for _ in "ab"
    )
    for model in (one, two):
        model.fit(PAIRS, **QUICK | {"steps": 5})
    before = two.loss(PAIRS)
    one.fit(PAIRS, adapter=True, rank=4, **QUICK)
    assert two.loss(PAIRS) == before
    assert one.loss(PAIRS) < before
    shared = {id(p) for p in two.language.model.parameters()}
    assert {id(p) for n, p in one.language.model.named_parameters() if "lora_" not in n} == shared


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    model = joined()
    model.fit(PAIRS, folder=tmp_path, **QUICK | {"steps": 3})
    with pytest.raises(TrainingError, match="holds another training"):
        joined().fit([(image, "other words") for image, _ in PAIRS], folder=tmp_path, **QUICK | {"steps": 3})
    with pytest.raises(TrainingError, match="holds another training"):
        joined().fit(PAIRS, folder=tmp_path, **QUICK | {"steps": 4})
    with pytest.raises(TrainingError, match="holds another training"):
        model.fit(PAIRS, folder=tmp_path, **QUICK | {"steps": 3})  # It would be taken for finished.


def test_fit_after_an_adapter_trains_the_projector_alone() -> None:
    model = joined()
    model.fit(PAIRS, **QUICK | {"steps": 5})
    model.fit(PAIRS, adapter=True, rank=4, projector_learning_rate=0.0, **QUICK | {"steps": 5})
    assert model.projector is not None
    adapter = {n: p.clone() for n, p in model.language.model.named_parameters() if "lora_" in n}
    before = {n: p.clone() for n, p in model.projector.named_parameters()}
    model.fit(PAIRS, **QUICK | {"steps": 5})
    assert all(torch.equal(p, adapter[n]) for n, p in model.language.model.named_parameters() if "lora_" in n)
    assert not any(torch.equal(p, before[n]) for n, p in model.projector.named_parameters())


def test_a_fit_that_fails_leaves_the_next_one_as_the_first() -> None:
    failed, clean = joined(standardize=True), joined(standardize=True)
    assert np.isfinite(failed.loss(PAIRS))  # Without statistics nothing is standardised yet.
    with pytest.raises(DataError, match="raise max_length"):
        failed.fit(PAIRS[:1], max_length=8, seed=1)
    with pytest.raises(DataError, match="no training example has an image"):
        failed.fit([(None, "a question", "an answer")])
    for model in (failed, clean):
        model.fit(PAIRS, max_length=64, seed=2, **QUICK)
    assert failed.loss(PAIRS) == clean.loss(PAIRS)
    with pytest.raises(DataError, match="raise max_length"):
        clean.fit(PAIRS, adapter=True, max_length=8)
    clean.fit(PAIRS, adapter=True, rank=4, **QUICK | {"steps": 2})


def test_the_argument_decides_the_split() -> None:
    examples, seen = examples_of(PAIRS), list[str]()
    joined().fit(examples[:2], validation=examples[2:], logger=lambda values, _: seen.extend(values), **QUICK)
    assert "val/loss" in seen


def test_former_names_of_settings() -> None:
    with pytest.warns(FutureWarning, match=r"projector\.whiten is called"):
        model = joined(whiten=True)
    model.fit(PAIRS, **QUICK | {"steps": 2})
    assert model.projector is not None
    assert model.projector.whitening is not None
    with pytest.raises(SettingsError, match="standardize: the projector exists already"):
        model.fit(PAIRS, whiten=True)
    with pytest.warns(FutureWarning, match="warmup_ratio"), pytest.raises(SettingsError, match="given twice"):
        joined().fit(PAIRS, warmup=0.1, warmup_ratio=0.2)


def test_a_model_whose_folder_was_moved_is_saved_whole(tmp_path: Path) -> None:
    model = joined()
    model.fit(PAIRS, **QUICK | {"steps": 2})
    model.save_pretrained(tmp_path / "one")
    again = mmphi.load(tmp_path / "one", vision=Patches(), preprocess=pixels_of)
    (tmp_path / "one").rename(tmp_path / "two")
    again.save_pretrained(tmp_path / "three")
    third = mmphi.load(tmp_path / "three", vision=Patches(), preprocess=pixels_of)
    assert third.loss(PAIRS) == pytest.approx(model.loss(PAIRS), rel=1e-3)


def test_an_image_in_memory_is_that_of_its_file(tmp_path: Path) -> None:
    model = joined()
    picture = Image.effect_mandelbrot((40, 20), (-2, -1, 1, 1), 30).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 6  # To be turned by 90 degrees.
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(tmp_path / "print.jpg")
    for name in ("turned.jpg", "print.jpg"):
        path = tmp_path / name
        features = model.image_features(path, path.read_bytes(), Image.open(path))
        assert torch.equal(features[0], features[1])
        assert torch.equal(features[0], features[2])


def test_augmentations_differ_from_image_to_image() -> None:
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    other = Image.effect_noise((64, 64), 30).convert("RGB")
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmphi.data.features.augmented_image", lambda image, name: names.append(name) or image)
        joined().fit([(picture, "one"), (other, "two")], num_augmentations=2, **QUICK | {"steps": 4})
    assert len(set(names)) == 2
    with pytest.raises(ImageError, match="cannot be augmented"):
        joined(preprocess=None).fit([(torch.rand(3, 8, 8), "one")], num_augmentations=2, **QUICK)


class Grid(nn.Module):
    """A feature for each 8 x 8 pixels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)


def test_pixels_of_another_size_than_the_encoder_was_tried_with() -> None:
    with pytest.raises(ImageError, match="give image_size"):
        joined(vision=Grid(), preprocess=None).image_features(torch.rand(3, 32, 32))
    joined(vision=Grid(), preprocess=None, image_size=32).fit([(torch.rand(3, 32, 32), "one")], **QUICK | {"steps": 2})


def test_nothing_to_measure_is_an_error_and_long_rows_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = joined()
    for rows in ([], [(PAIRS[0][0], "x" * 500)]):
        with pytest.raises(DataError, match="no conversation has an answer"):
            model.loss(rows)
    with caplog.at_level("WARNING", logger="mmphi"):
        model.fit([*PAIRS, (PAIRS[0][0], "x" * 500)], **QUICK | {"steps": 2})
    assert "1 of 5 training conversations have more than 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"audio": "x.wav", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]},
            "audio",
        ),
        ({"messages": [{"role": "user", "content": 3.5j}, {"role": "assistant", "content": "a"}]}, "row 0: "),
        (("nowhere.png", "a"), "row 0: there is no image nowhere.png"),
    ],
)
def test_rows_are_never_trained_on_in_part(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        examples_of([row])


def test_stored_features_are_no_part_of_a_saved_model(small_chain: Path, tmp_path: Path) -> None:
    with small.built("embed", small_chain, tmp_path / "store") as pipeline:
        store = FeatureStore(pipeline.build("embed", small.settings()).path)
    language = tiny_language()
    model = mmphi.join(language.model, store, tokenizer=byte_tokenizer())
    with pytest.raises(ModelError, match="stored features"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class FourByFour(nn.Module):
    """The mean color of each of 4 x 4 patches: features (N, 16, 3)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_projector_trains_answers_and_is_saved(kind: str, tmp_path: Path) -> None:
    model = joined(vision=FourByFour(), kind=kind, **{"resampler": {"queries": 3}}.get(kind, {}))
    before = model.loss(PAIRS)
    model.fit(PAIRS, contrastive_weight=0.2, contrastive_start=0.5, **QUICK)
    assert model.loss(PAIRS) < before - 0.5
    # Two images in one prompt: the engine, which reads prompts in parts, says what generating in one pass says.
    parts = [{"type": "image", "image": image} for image, _ in PAIRS[:2]]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "x"}]}]
    alone = [model.ask("x", image, max_new_tokens=6) for image, _ in PAIRS]
    batched = [answer.text for answer in model.generate([(image_reference(i), "x") for i, _ in PAIRS], 6)]
    assert alone == batched
    model.save_pretrained(tmp_path / "model")
    again = mmphi.load(tmp_path / "model", vision=FourByFour(), preprocess=pixels_of)
    assert again.loss(PAIRS) == pytest.approx(model.loss(PAIRS), rel=1e-5)
    assert again.chat(messages, max_tokens=6) == model.chat(messages, max_tokens=6)


def test_settings_of_another_kind_and_another_number_of_features_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"queries: a projector of kind mlp lacks this setting(.|\n)*kind='resampler'"
    ):
        joined(vision=FourByFour(), queries=5)
    model = joined(vision=FourByFour(), kind="pixel_shuffle")
    with pytest.raises(SettingsError, match="queries: a projector of kind pixel_shuffle lacks this setting"):
        model.fit(PAIRS, queries=5, **QUICK)
    with pytest.raises(ModelError, match="trained for 16 features per image, not 4"):
        Multimodal(model.language, model.projector, joined().features, 64)
    seen: dict[str, float] = {}
    model.fit(PAIRS, logger=lambda values, step: seen.update(values), **QUICK | {"steps": 2})
    assert seen["projector/image_tokens"] == 4


def test_misspelt_settings_of_join_name_the_nearest_one() -> None:
    for vision in (Patches(), "RN50"):
        with pytest.raises(SettingsError, match=r"(?s)no setting 'querys'.*did you mean queries"):
            joined(vision=vision, kind="resampler", querys=4)
    with pytest.raises(SettingsError, match=r"(?s)kind = 'resampelr'.*did you mean resampler"):
        joined(kind="resampelr")
