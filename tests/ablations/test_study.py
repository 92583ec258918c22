from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ablations.commands import ablate, parse_levels
from ablations.driver import RevisedStudy
from ablations.run import fewest_seeds, summary, too_few_seeds
from ablations.search import Range, Search
from ablations.study import Study, load, names, settings_of
from ablations.trials import verdict_trials
from mmphi.config import presets
from mmphi.errors import MmphiError, SettingsError
from reports.paired_tests import smallest_p

STUDY = Study(
    question="Which?",
    factor="projector.layers",
    levels={"one": 1, "two": 2},
    baseline="two",
    fixed={"projector.optimizer": "adamw"},
    nuisance={"projector.learning_rate": [1e-3, 1e-2]},
    tuning_seeds=(1000, 1001),
    seeds=2,
    tokens=500,
)

BOTH = {"projector.layers": 1, "projector.width": 8}


@pytest.mark.parametrize("name", names())
def test_every_study_that_comes_with_mmphi_can_be_run(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("MMPHI_TEXT", "MMPHI_SPOKEN"):
        monkeypatch.setenv(variable, str(tmp_path))
    called, study = load(name)
    assert called == name
    study.check()
    assert study.declaration()["settings"]["language.model"] == "pretrain"


@pytest.mark.parametrize(
    "name", ["clip_variant", "data_mixture", "image_tokens", "lora_rank", "projector_depth", "projector_kind"]
)
def test_studies_on_another_preset(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MMPHI_LLAVA", "MMPHI_COCO"):
        monkeypatch.setenv(variable, str(tmp_path))
    called, study = load(name, "phi2")
    assert called == f"{name}.phi2"
    for level in study.levels:
        assert study.settings(level).language.model == "microsoft/phi-2"


@pytest.mark.parametrize("preset", ["speech", "speech-phi2"])
def test_links_on_models_that_are_pretrained(preset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MMPHI_SPOKEN", "MMPHI_MODELS"):
        monkeypatch.setenv(variable, str(tmp_path))
    called, study = load("audio_link", preset)
    assert called == f"audio_link.{preset}"
    for level in study.levels:
        assert study.settings(level).speech.audio_input == level
    assert ("soft" in study.levels) == (preset == "speech-phi2")  # Only Phi-2's token ids are Whisper's.


def test_published_clips_are_ones_that_open_clip_has() -> None:
    import open_clip

    _, study = load("clip_variant", "phi2")
    for value in study.levels.values():
        assert value["vision.pretrained"] in open_clip.list_pretrained_tags_by_model(value["vision.model"])


def test_a_study_is_a_small_file(tmp_path: Path) -> None:
    """The example of the documentation: a study in under 20 lines, run by its path."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "studies.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "STUDY" in block]
    assert len(example.splitlines()) < 20
    path = tmp_path / "activation.py"
    path.write_text(example)
    name, study = load(str(path))
    study.check()
    assert name == "activation"
    assert study.settings("relu").projector.activation == "relu"
    assert study.settings("relu", seed=3).projector.seed == 3
    with pytest.raises(SettingsError, match="no study file"):
        load(str(tmp_path / "none.py"))
    path.write_text("x = 1\n")
    with pytest.raises(SettingsError, match="defines no STUDY"):
        load(str(path))


def test_what_a_trial_changes() -> None:
    settings = STUDY.settings("one", 7, {"projector.learning_rate": 0.01})
    assert settings.projector.layers == 1
    assert settings.projector.seed == 7
    assert settings.projector.learning_rate == 0.01
    assert settings.projector.supervised_tokens == 500
    assert settings_of("tiny", {}, "projector").projector.supervised_tokens == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "three"}, "the baseline 'three' is not among the levels"),
        ({"seeds": 0}, "0 seeds: nothing would be run"),
        ({"levels": {"two": 2, "it's": 1}}, "contains quotes or line breaks"),
        ({"levels": {"two": 2}}, "a study of one level compares nothing"),
        (
            {"levels": {"two": 2, "both": {"projector.layers": 1, "projector.width": 8}}},
            "the factor is projector.layers",
        ),
        (
            {"fields": ("projector.layers",), "levels": {"two": {}, "x": {"vision.pool": 2}}},
            "vision.pool, which the fac",
        ),
        ({"levels": {"two": 2, "none": 0}}, "projector.layers"),
        ({"factor": "projector.layer"}, r"projector.layers"),
        ({"fixed": {"projector.layers": 2}}, "is the factor and also in `fixed`"),
        ({"fixed": {"projector.supervised_tokens": 9}}, "the study's budget"),
        ({"fixed": {"projector.steps": 9}}, "but the budget is 500 tokens"),
        ({"tuning_seeds": (1,)}, "are for tuning and for the verdict"),
        ({"stage": "projecter"}, "there is no stage"),
        ({"fixed": {"vision.pool": 3, "projector.optimizer": "adamw"}}, "vision.pool"),
    ],
)
def test_what_cannot_be_a_comparison(changes: dict[str, object], said: str) -> None:
    with pytest.raises(MmphiError, match=said):
        replace(STUDY, **changes).check()


def test_unknown_names(empty_store: str) -> None:
    with pytest.raises(SettingsError, match=r"no study 'projector_dept'\n  did you mean projector_depth"):
        ablate(["projector_dept"])
    with pytest.raises(SettingsError, match=r"no level 'nine layers'\n  the levels are 1 layer, 2 layers"):
        ablate(["projector_depth", "--levels", "nine layers"])
    with pytest.raises(SettingsError, match="there is no setting"):
        ablate(["projector_depth", "--projector.layerss", "3"])
    with pytest.raises(SettingsError, match="has levels and seeds, not --trials"):
        ablate(["projector_depth", "--trials", "3"])
    with pytest.raises(SettingsError, match="has a space, not --levels"):
        ablate(["projector_settings", "--levels", "a"])
    with pytest.raises(SettingsError, match=r"projector\.seed takes the paired seeds"):
        ablate(["control", "--seed", "3"])
    with pytest.raises(SettingsError, match="0 seeds"):
        ablate(["control", "--seeds", "0"])


def test_verdicts_come_in_rounds() -> None:
    verdicts = list(verdict_trials({"one": {"a": 1}, "two": {"a": 2}}, 2))
    assert [(c.number, c.level) for c in verdicts] == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]


def test_control_shares_nothing_with_its_pair() -> None:
    _, control = load("control")
    first, second = (control.settings(level, control.seed(level, 3)) for level in control.levels)
    assert (first.projector.seed, second.projector.seed) == (3, 503)
    assert first.model_copy(update={"projector": second.projector}) == second


def test_searches_that_cannot_be() -> None:
    search = Search("Which?", {"projector.layers": Range(1, 3), "projector.learning_rate": Range(1e-4, 1e-2, log=True)})
    search.check()
    kinds = {name: type(d).__name__ for name, d in search.distributions().items()}
    assert kinds == {"projector.layers": "IntDistribution", "projector.learning_rate": "FloatDistribution"}
    for changes, said in (
        ({"trials": 0}, "finds nothing"),
        ({"seeds": (0,)}, "wilcoxon compares trials"),
        ({"objectives": {"val/loss": "minimize", "seconds": "minimize"}}, "cannot prune by 2 objectives"),
        ({"space": {"projector.layers": Range(0, 3)}}, "projector.layers"),
    ):
        with pytest.raises(SettingsError, match=said):
            replace(search, **changes).check()


def test_levels_whose_names_have_commas_are_named() -> None:
    study = replace(STUDY, levels={"rank 64": 1, "rank 64, rsLoRA": 2, "rank 2": 3})
    assert parse_levels(study, "rank 2,rank 64, rsLoRA") == ["rank 2", "rank 64, rsLoRA"]
    assert parse_levels(study, "rank 64, rsLoRA, rank 64") == ["rank 64, rsLoRA", "rank 64"]
    with pytest.raises(SettingsError, match=r"no level 'rsLoRA'\n  the levels are rank 64; rank 64, rsLoRA; rank 2"):
        parse_levels(study, "rsLoRA")


def test_a_study_file_is_found_from_where_mlflow_run_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow run` starts its command in the project's folder."""
    (tmp_path / "called").mkdir()
    (tmp_path / "called" / "mine.py").write_text("from ablations.studies.control import STUDY\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "caller_folders", lambda: iter([tmp_path / "none", tmp_path / "called"]))
    with pytest.raises(SettingsError, match="no study file"):
        load("mine.py")
    monkeypatch.setenv("MLFLOW_RUN_ID", "a run")
    assert load("mine.py")[0] == "mine"


def test_summary_counts_every_trial_and_names_steps_outside_the_budget() -> None:
    tuned = replace(STUDY, nuisance={"projector.learning_rate": (1e-3, 1e-2)}, tuning_seeds=(1000, 1001))
    text = summary(
        RevisedStudy(replace(tuned, seeds=6, tokens=3000, fixed={**tuned.fixed, "projector.alignment_steps": "250"}))
    )
    levels = len(STUDY.levels)
    assert f"{levels} levels x 6 seeds = {6 * levels} verdict trials" in text
    assert f"{4 * levels} tuning trials" in text
    assert "3,000 supervised tokens each" in text
    assert "250 warm-up steps each, which the token budget does not count" in text


def test_too_few_seeds_for_any_verdict_are_warned_about() -> None:
    levels = {"one": 1, "two": 2, "three": 3}
    few = RevisedStudy(replace(STUDY, levels=levels, baseline="one", seeds=2))
    assert "2 seeds and 2 comparisons the smallest possible p value is 1:" in too_few_seeds(few)
    fewest = fewest_seeds(2)
    assert (smallest_p(fewest) * 2 < 0.05, smallest_p(fewest - 1) * 2 < 0.05) == (True, False)
    assert f"{fewest} seeds are the fewest" in too_few_seeds(few)
    assert not too_few_seeds(RevisedStudy(replace(few.study, seeds=fewest)))
    assert "3 draws" in too_few_seeds(RevisedStudy(replace(few.study, seeds=12, replicates=3)))


def test_a_study_file_with_former_names_is_that_with_current_ones(tmp_path: Path) -> None:
    code = "from ablations.study import Study\nSTUDY = Study(question='q', factor='projector.{}', baseline='a',"
    code += " levels={{'a': 1, 'b': 2}}, nuisance={{'projector.{}': [0.1, 0.2]}}, replicate=('projector.seed',),"
    code += " metric='test/{}', direction='maximize', also={{'test/{}': 'gain'}})"
    for name, words in {
        "former": ("views", "warmup", "ended", "hearing_gain"),
        "current": ("num_augmentations", "warmup_ratio", "eos_rate", "audio_gain"),
    }.items():
        (tmp_path / f"{name}.py").write_text(code.format(*words))
    former, current = (load(str(tmp_path / f"{name}.py"))[1] for name in ("former", "current"))
    assert former == current
    assert former.declaration() == current.declaration()
