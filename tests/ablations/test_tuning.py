from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from ablations.study import Study, load, names
from ablations.trials import TrialResult, TrialSpec
from ablations.tuning import Tuning, next_value, tuning_of, tuning_trials
from mmphi.errors import SettingsError

RATE, WIDTH = "projector.learning_rate", "projector.width"
STUDY = Study(
    question="Which?",
    factor="projector.layers",
    levels={"one": 1, "two": 2},
    baseline="two",
    fixed={"projector.optimizer": "adamw"},
    nuisance={RATE: [1e-3, 3e-3]},
    tuning_seeds=(1000, 1001),
    seeds=2,
)


def ended(rate: float, *values: float | None) -> list[TrialResult]:
    """Outcomes of a value at the level ``one``, at as many seeds as there are."""
    cells = [TrialSpec("tuning", "one", number, {RATE: rate}) for number in STUDY.tuning_seeds]
    return [TrialResult(cell, value) for cell, value in zip(cells, values, strict=False)]


def tuned(study: Study, loss: Callable[[Mapping[str, Any]], float | None]) -> tuple[Tuning, list[Mapping[str, Any]]]:
    """The tuning of level ``one`` to its end, and the points in the order that they were tried."""
    outcomes: list[TrialResult] = []
    while (tuning := tuning_of(study, "one", outcomes)).missing:
        outcomes += [TrialResult(cell, loss(cell.nuisance)) for cell in tuning.missing]
    points = [o.cell.nuisance for o in outcomes]
    return tuning, [point for n, point in enumerate(points) if point not in points[:n]]


def test_all_levels_at_a_seed_before_the_next_seed() -> None:
    cells = list(tuning_trials(tuning_of(STUDY, level, []) for level in STUDY.levels))
    assert [(c.number, c.level, c.nuisance[RATE]) for c in cells] == [
        (number, level, rate) for number in (1000, 1001) for level in ("one", "two") for rate in (1e-3, 3e-3)
    ]
    assert len({c.name for c in cells}) == 8


def test_without_a_nuisance_setting_nothing_is_tried() -> None:
    assert tuning_of(replace(STUDY, nuisance={}), "one", []) == Tuning("one", {}, chosen={})


def test_the_least_mean_is_chosen() -> None:
    study = replace(STUDY, tuning_extensions=0)
    both = [*ended(1e-3, 1.0, 2.0), *ended(3e-3, 1.4, 1.5)]
    assert tuning_of(study, "one", both).chosen == {RATE: 3e-3}
    # One seed is still out; a value that failed once is not taken; a level at which all failed has none.
    out = tuning_of(study, "one", both[:3])
    assert out.chosen is None
    assert [cell.name for cell in out.missing] == [f"tuning/one/1001/{RATE}=0.003"]
    assert tuning_of(study, "one", [*ended(1e-3, 1.0, 2.0), *ended(3e-3, 0.1, None)]).chosen == {RATE: 1e-3}
    failed = tuning_of(study, "one", [*ended(1e-3, None, 1.0), *ended(3e-3, None, None)])
    assert (failed.chosen, list(failed.missing)) == (None, [])


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2e-3, [1e-3, 3e-3, 3.3e-4, 9e-3]),  # Which of the two first ones is better, an end it is.
        (2.5e-2, [1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2]),
        (1e-4, [1e-3, 3e-3, 3.3e-4, 1.1e-4, 3.7e-5]),
    ],
)
def test_values_are_added_until_the_best_lies_between_two(best: float, tried: list[float]) -> None:
    tuning, points = tuned(STUDY, lambda point: abs(math.log(point[RATE] / best)))
    rates = [point[RATE] for point in points]
    assert rates[:2] == tried[:2]
    assert set(rates) <= set(tried)
    assert tuning.chosen is not None
    place = sorted(rates).index(tuning.chosen[RATE])
    assert 0 < place < len(rates) - 1
    assert tuning.grid[RATE] == sorted(rates)


def test_values_are_added_up_to_the_limit() -> None:
    tuning, points = tuned(STUDY, lambda point: -point[RATE])
    assert [point[RATE] for point in points] == [1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2]
    assert tuning.chosen == {RATE: 8.1e-2}
    assert len(tuned(replace(STUDY, tuning_extensions=0), lambda point: -point[RATE])[1]) == 2
    # The setting takes no value over 1.
    tuning, points = tuned(replace(STUDY, nuisance={RATE: [0.1, 0.5]}), lambda point: -point[RATE])
    assert [point[RATE] for point in points] == [0.1, 0.5]


def test_a_value_that_fails_is_the_last_one() -> None:
    tuning, points = tuned(STUDY, lambda point: -point[RATE] if point[RATE] < 1e-2 else None)
    assert [point[RATE] for point in points] == [1e-3, 3e-3, 9e-3, 2.7e-2]
    assert tuning.chosen == {RATE: 9e-3}


def test_two_settings_are_extended_together_and_words_are_not() -> None:
    study = replace(
        STUDY, nuisance={RATE: [1e-3, 3e-3], WIDTH: [8, 16], "projector.lr_scheduler": ["cosine", "linear"]}
    )
    tuning, points = tuned(study, lambda p: abs(math.log(p[RATE] / 9e-3)) + abs(math.log(p[WIDTH] / 32)))
    assert tuning.grid[RATE] == [1e-3, 3e-3, 9e-3, 2.7e-2]
    assert tuning.grid[WIDTH] == [8, 16, 32, 64]
    assert tuning.grid["projector.lr_scheduler"] == ["cosine", "linear"]
    assert tuning.chosen == {RATE: 9e-3, WIDTH: 32, "projector.lr_scheduler": "cosine"}
    assert len(points) == 4 * 4 * 2


def test_next_values() -> None:
    assert next_value(1e-3, 3e-3) == 9e-3
    assert next_value(3e-3, 1e-3) == 3.3e-4
    assert next_value(8, 16) == 32
    assert isinstance(next_value(8, 16), int)


@pytest.mark.parametrize(
    ("nuisance", "fixed", "message"),
    [
        ({RATE: [1e-3, 3e-3]}, {"projector.optimizer": "muon"}, "Muon trains the matrices"),
        ({"projector.muon_learning_rate": [0.01, 0.03]}, {"projector.optimizer": "adamw"}, "AdamW does not use it"),
        ({"projector.decay": [0.1, 0.3]}, {"projector.lr_scheduler": "cosine"}, "the schedule cosine does not use it"),
    ],
)
def test_a_setting_that_has_no_effect_is_not_tuned(nuisance: Any, fixed: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(STUDY, nuisance=nuisance, fixed=fixed).check()
    both = {RATE: [1e-3, 3e-3], "projector.muon_learning_rate": [0.01, 0.03]}
    replace(STUDY, nuisance=both, fixed={"projector.optimizer": "muon"}).check()


def test_what_is_tuned_on_is_not_judged() -> None:
    with pytest.raises(SettingsError, match="tuned on the validation split"):
        replace(STUDY, metric="val/loss").check()
    replace(STUDY, metric="val/loss", nuisance={}).check()


@pytest.mark.parametrize("looks", [(8,), (4, 2), (1,), (2, 2)])
def test_looks_come_before_the_end(looks: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="looks at"):
        replace(STUDY, seeds=8, looks=looks).check()
    replace(STUDY, seeds=8, looks=(4, 6)).check()


def test_what_is_drawn_again_is_a_setting_of_its_own() -> None:
    study = replace(STUDY, replicate=("pretrain.seed",), replicates=2, seeds=4)
    study.check()
    assert [study.settings("one", 5, draw=study.draw(n)).pretrain.seed for n in range(4)] == [0, 1, 0, 1]
    assert [replace(study, replicates=0).draw(n) for n in range(4)] == [0, 1, 2, 3]
    with pytest.raises(SettingsError, match=r"pretrain\.seed is in `replicate` and elsewhere"):
        replace(study, fixed={"pretrain.seed": 1}).check()
    with pytest.raises(SettingsError, match="is the factor"):
        replace(study, replicate=("projector.layers",)).check()


@pytest.mark.parametrize("name", names())
def test_studies_tune_with_three_seeds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPHI_TEXT", "text")
    monkeypatch.setenv("MMPHI_SPOKEN", "spoken")
    _, study = load(name)
    if isinstance(study, Study) and study.nuisance:
        assert len(study.tuning_seeds) >= 3
        assert study.tuning_extensions >= 1


def test_a_study_of_an_earlier_version_is_what_it_was() -> None:
    declaration = {name: value for name, value in STUDY.declaration().items() if name != "tuning_extensions"}
    assert Study.declared(declaration).tuning_extensions == 0
    assert Study.declared(STUDY.declaration()) == STUDY


def test_values_that_round_onto_others_are_not_added() -> None:
    for values in ([1, 2], [1010, 1024], [120, 124]):
        study = replace(STUDY, nuisance={WIDTH: values}, tuning_extensions=2)
        for best in (min, max):
            tuning, points = tuned(study, lambda point, best=best, values=values: abs(point[WIDTH] - best(values)))
            grid = list(tuning.grid[WIDTH])
            assert grid == sorted(set(grid))
            assert all(value > 0 for value in grid)
            assert len(points) == len(grid)
    tuning, points = tuned(replace(STUDY, nuisance={RATE: [1e-3, 1e-3, 3e-3]}), lambda point: point[RATE])
    assert tuning.grid[RATE] == sorted({point[RATE] for point in points})


def test_a_value_that_a_stage_refuses_is_not_added() -> None:
    """`accumulation` passes share a batch: fewer sequences than passes are refused by the stage, not by the setting."""
    study = replace(
        STUDY,
        fixed={"projector.optimizer": "adamw", "projector.gradient_accumulation_steps": 4},
        nuisance={"projector.batch_size": [4, 8]},
    )
    tuning, _ = tuned(study, lambda point: point["projector.batch_size"])
    assert tuning.grid["projector.batch_size"] == [4, 8]


def test_what_is_tuned_needs_seeds_and_values() -> None:
    with pytest.raises(SettingsError, match="no tuning seeds"):
        replace(STUDY, tuning_seeds=()).check()
    with pytest.raises(SettingsError, match="no values to try"):
        replace(STUDY, nuisance={RATE: []}).check()
    with pytest.raises(SettingsError, match="the unit is the draw"):
        replace(STUDY, replicate=("pretrain.seed",), replicates=2, seeds=8, looks=(4,)).check()


def test_an_optimizer_that_is_tuned_itself_refuses_no_rate() -> None:
    replace(STUDY, fixed={}, nuisance={RATE: [1e-3, 3e-3], "projector.optimizer": ["adamw", "muon"]}).check()
