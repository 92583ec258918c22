"""``mmphi benchmark textgen``: every side draws all its texts, and what is shown is what was measured."""

import json

import pytest
from builders import byte_tokenizer, tiny_language

from mmphi.benchmarks.textgen import show, sides_here
from mmphi.cli import main
from mmphi.errors import SettingsError

pytestmark = pytest.mark.slow


def test_every_side_draws_and_is_shown_beside_the_usual_loop(tmp_path, capsys):
    tiny_language(initializer_range=0.05).model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--documents", "8", "--batch", "4", "--max_tokens", "8", "--rounds", "1"]
    told = tmp_path / "figures.json"
    assert main(["benchmark", "textgen", "--model", str(tmp_path / "model"), "--json", str(told), *options]) == 0
    found = json.loads(told.read_text())
    assert list(found) == list(sides_here(2))
    for figures in found.values():
        (each,) = figures
        assert 8 <= each["tokens"] <= 64
        assert each["tokens_per_s"] > 0
    lines = capsys.readouterr().out.splitlines()
    names = ["side", "generate", "transformers", "slots", "generate", "slots"]
    assert [line.split()[0] for line in lines] == names
    assert [line.split()[-4] for line in lines if line.startswith("generate")] == ["1.00x", "1.00x"]


def test_a_side_is_compared_with_generate_in_as_many_processes(capsys):
    rates = {"generate": 10.0, "slots": 12.0, "generate x 2": 18.0, "slots x 2": 27.0}
    figures = {name: [{"tokens_per_s": rate, "tokens": 8.0, "memory_gb": 1.0}] for name, rate in rates.items()}
    show(figures, {"generate": 1, "slots": 1, "generate x 2": 2, "slots x 2": 2})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[-4] for line in lines] == ["1.00x", "1.20x", "1.00x", "1.50x"]


def test_less_than_one_is_refused(capsys):
    assert main(["benchmark", "textgen", "--batch", "0"]) != 0
    assert "one at least" in capsys.readouterr().err


def test_what_is_measured_here():
    assert sides_here(1) == {"generate": ("generate", 1), "transformers": ("transformers", 1), "slots": ("slots", 1)}


def test_an_error_of_a_side_is_told(tmp_path):
    with pytest.raises((RuntimeError, SettingsError), match="nothing"):
        main(["benchmark", "textgen", "--model", str(tmp_path / "nothing"), "--rounds", "1"])
