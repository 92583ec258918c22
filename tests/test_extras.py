"""The base installation trains, evaluates and answers; what is missing of the rest is said with its command."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmphi.cli import main
from mmphi.extras import extras, missing_package

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("serve", "audio", "textgen", "reports")
MODULES = {"openai-whisper": "whisper", "markdown-it-py": "markdown_it", "silero-vad": "silero_vad"}
BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def declared(name: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[<>=]", each)[0] for each in project["optional-dependencies"][name]]


def optional_modules() -> list[str]:
    # MLflow and torch bring these themselves.
    brought = {"fastapi", "uvicorn", "jinja2"}
    names = {name for extra in OPTIONAL for name in declared(extra)} - brought
    return sorted(MODULES.get(name, name) for name in names)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = BLOCKED.format(names=optional_modules())
    return subprocess.run([sys.executable, "-c", start + code, *arguments], capture_output=True, text=True, check=False)


def test_the_library_and_the_trained_stages_need_the_base_alone(tmp_path: Path) -> None:
    done = run(
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import mmphi.training.pretrain_callback, mmphi.training.contrastive, mmphi.stages.merge\n"
        "import ablations.run, ablations.worker, mmphi.serving.ask, mmphi.training.projector, mmphi.training.adapter\n"
        "import test_api; model = test_api.joined(); model.fit(test_api.PAIRS, **test_api.QUICK)\n"
        "print(sorted(model.evaluate(test_api.PAIRS))[0])",
        *map(str, (ROOT / "tests", ROOT / "tests" / "stages")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test/")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["serve", "--port", "1"], "serve"),
        (["demo"], "serve"),
        (["report", "--study", "x"], "reports"),
        (["transcribe", "--path", "FOLDER/spoken.csv"], "audio"),
    ],
)
def test_a_command_whose_packages_are_missing_says_what_to_install(
    command: list[str], extra: str, tmp_path: Path, empty_store: str
) -> None:
    (tmp_path / "one.wav").write_bytes(b"RIFF")
    (tmp_path / "spoken.csv").write_text("audio,transcript\none.wav,one\n")
    words = [word.replace("FOLDER", str(tmp_path)) for word in command]
    done = run("import sys; from mmphi.cli import main; sys.exit(main(sys.argv[1:]))", *words)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"pip install '\S+\[{extra}\]'", done.stderr)
    assert "Traceback" not in done.stderr


def test_every_optional_package_has_its_extra() -> None:
    found = extras()
    for extra in OPTIONAL:
        for name in declared(extra):
            assert found[name.lower().replace("_", "-")] == extra
    assert missing_package(ModuleNotFoundError("x", name="whisper.audio")).endswith("[audio]'")
    assert missing_package(ModuleNotFoundError("x", name="mmphi.nothing")) == ""


def test_a_mistake_of_the_code_stays_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'mmphi.gone'", name="mmphi.gone")

    monkeypatch.setattr("mmphi.cli._command", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["status"])
