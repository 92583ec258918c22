from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mmphi.cli import main, parse
from mmphi.config.smoke import smoke
from mmphi.describe import MOST_CHANGED
from mmphi.errors import SettingsError
from mmphi.stages import STAGES, load_settings


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from mmphi.cli import main; main(['--help']);"
        "heavy = {'torch', 'mlflow', 'transformers', 'numpy', 'pandas'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for name in STAGES:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("words", ["'ask', '--image', 'no.jpg', 'hi'", "'chat', '--image', 'no.jpg'"])
def test_an_image_that_is_not_there_is_reported_without_torch(words):
    code = (
        f"import sys; from mmphi.cli import main; assert main([{words}]) == 2;"
        "sys.exit(bool({'torch', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stage_help_loads_no_torch_and_lists_every_setting():
    code = (
        "import sys; from mmphi.cli import main; main(['projector', '--help-all']);"
        "sys.exit(bool({'torch', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    from mmphi.config.projector import ProjectorSettings

    for key, field in ProjectorSettings.model_fields.items():
        (line,) = [x for x in done.stdout.splitlines() if x.strip().split(" ")[0] == f"--{key}"]
        assert field.description in line
    assert "--learning_rate" in done.stdout
    assert f"[{load_settings('tiny').projector.steps} steps]" in done.stdout
    assert "float > 0, <= 1" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage(stage, capsys):
    assert main([stage, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"mmphi {stage}: {STAGES[stage].help}")
    assert "\n  --" in shown


def test_help_begins_with_what_is_changed_most_and_the_rest_is_one_option_away(capsys):
    for stage, names in MOST_CHANGED.items():
        assert main([stage, "--help"]) == 0
        short = capsys.readouterr().out
        assert short.count("\n  --") == len(names) == len(set(names))
        assert main([stage, "--help-all"]) == 0
        whole = capsys.readouterr().out
        further = int(re.search(r"(\d+) further settings: mmphi \w+ --help-all", short)[1])
        assert whole.count("\n  --") == len(names) + further
        listed = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
        assert all(f"  {option} " in whole for option in listed)


def test_a_smoke_run_is_small_and_what_is_given_stays():
    for preset in ("tiny", "text", "small", "phi2", "speech", "spoken-scenes"):
        settings = load_settings(preset, {}, "projector", expand=False)
        small = smoke(settings)
        assert (small.projector.steps, small.pretrain.steps, small.evaluate.max_images) == (4, 4, 8)
        assert small.data.max_images == 32
        assert small.name == f"{preset} smoke"
        assert small.projector.layers == settings.projector.layers
    given = smoke(load_settings("text", {"steps": "20"}, "pretrain", expand=False), {"pretrain.steps"})
    assert (given.pretrain.steps, given.pretrain.stop) == (20, "steps 20")
    budget = smoke(load_settings("text", {"stop": "loss 5"}, "pretrain", expand=False), {"pretrain.stop"})
    assert budget.pretrain.stop == "loss 5"
    kept = smoke(load_settings("tiny", {"steps": "7"}, "projector"), {"projector.steps"})
    assert kept.projector.steps == 7
    assert smoke(load_settings("tiny", {"scenes.train_images": "9"})).scenes.train_images == 9
    assert parse(["--smoke", "--layers", "2"]) == ({"smoke": "true"}, {"layers": "2"})


def test_parse():
    options, overrides = parse(["--preset", "small", "--layers=3", "--force", "--vision.pool", "2", "--no-build"])
    assert options == {"preset": "small", "force": "true", "no_build": "true"}
    assert overrides == {"layers": "3", "vision.pool": "2"}
    assert parse(["--force=false"]) == ({}, {})
    assert parse(["--force", "false"]) == ({}, {})
    assert parse(["--force", "true", "--layers", "3"]) == ({"force": "true"}, {"layers": "3"})
    assert parse(["--learning-rate", "-1"]) == ({}, {"learning_rate": "-1"})
    for bad in (["layers"], ["--preset"], ["--preset", "--force"], ["--force=maybe"], ["--"]):
        with pytest.raises(SettingsError):
            parse(bad)


def test_a_setting_that_is_true_or_false_may_stand_alone():
    for words in (["--store-only", "--max_tokens", "7"], ["--max_tokens", "7", "--store_only"]):
        _, overrides = parse(words)
        chosen = load_settings("tiny", overrides, "textgen").textgen
        assert chosen.store_only is True
        assert chosen.max_tokens == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["projector", "--layers", "--force"], "--layers has no value"),
        (["projector", "--force", "--layers"], "give one: --layers VALUE"),
        (["projecto"], "did you mean projector?"),
        (["projector", "--layers", "0"], "nearest valid value is 1"),
        (["projector", "--preset", "tinny"], "did you mean tiny"),
        (["projector", "--steps", "many"], "must be a whole number"),
        (["benchmark", "nothing"], "there is no benchmark 'nothing'"),
    ],
)
def test_mistakes_end_with_two_and_a_hint(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_option_of_a_command_names_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["ask", "what is this?", "--imgae", "photo.jpg"])
    assert caught.value.code == 2
    assert "there is no option --imgae; did you mean --image?" in capsys.readouterr().err


def test_help_of_a_text_names_the_stage_that_has_such_settings(capsys):
    assert main(["scenes", "--help-all", "lora"]) == 2
    assert "see `mmphi qlora --help-all lora`" in capsys.readouterr().err


def test_a_tab_in_yaml_is_explained_with_the_name_of_the_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("projector:\n\tsteps: 3\n")
    assert main(["projector", "--preset", str(path)]) == 2
    shown = capsys.readouterr().err
    assert 'in "mine.yaml", line 2' in shown
    assert "indent with spaces" in shown


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_none_is_refused(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--port", "99999"])
    assert caught.value.code == 2
    assert "'99999' is no port: a number from 0 to 65535" in capsys.readouterr().err


def test_a_file_may_extend_the_preset_of_its_name(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("extends: small\nprojector: {steps: 7}\n")
    settings = load_settings(str(path), {}, "projector", expand=False)
    assert settings.projector.steps == 7
    assert settings.light_clip.image_tower  # Of the preset.


def test_two_mistakes_are_two_lines_each_with_its_hint(capsys):
    assert main(["projector", "--layers", "99", "--steps", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 2 settings are wrong:"
    assert "projector.steps = 0" in lines[1] + lines[2]
    assert "projector.layers = 99" in lines[1] + lines[2]
    assert all("the nearest valid value is" in line for line in lines[1:])


def test_help_all_of_a_text_lists_only_settings_about_it(capsys):
    assert main(["projector", "--help-all", "Learning"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert any("--learning_rate" in row for row in rows)
    assert any("--lr_scheduler" in row for row in rows)  # By its description.
    assert all("learning" in row.lower() for row in rows)
    assert main(["projector", "--help-all", "vision"]) == 0
    assert "--vision.pool" in capsys.readouterr().out  # By its section.
    assert main(["projector", "--help-all", "zzz"]) == 2
    assert "no setting of projector contains 'zzz'" in capsys.readouterr().err


def test_status_draws_the_graph(empty_store, capsys):
    assert main(["scenes", "--train_images", "8", "--test_images", "2", "--texts", "5"]) == 0
    assert "mmphi ui" in capsys.readouterr().out
    change = ["--scenes.train_images", "8", "--scenes.test_images", "2", "--scenes.texts", "5"]
    assert main(["status", *change]) == 0
    out = capsys.readouterr().out
    assert "scenes" in out
    assert "finished  run " in out
    assert "missing   would take" in out
    assert "would take 0 B" not in out
    assert out.index("evaluate") < out.index("projector") < out.index("embed")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--force", "True"], {"force": "true"}),
        (["--force=YES", "--no-build", "no"], {"force": "true"}),
        (["--force", "0"], {}),
        (["--force"], {"force": "true"}),
    ],
)
def test_flags_are_true_or_false_in_any_spelling(words: list[str], expected: dict[str, str]) -> None:
    assert parse(words) == (expected, {})


def test_numbers_in_other_spellings_are_understood_in_hints() -> None:
    for name, typed, hint in (("steps", "1,600", "1600"), ("steps", "2.4e3", "2400"), ("learning_rate", "0,5", "0.5")):
        with pytest.raises(SettingsError, match=f"the nearest valid value is {hint}"):
            load_settings("tiny", {f"projector.{name}": typed})
    with pytest.raises(SettingsError, match="write --force=True"):
        parse(["force=True"])
