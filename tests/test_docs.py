"""Links of the documentation resolve, its code blocks are valid, and generated pages are up to date."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import yaml

from mmphi import cli
from mmphi.config.overrides import full_name
from mmphi.config.presets import presets_folder
from mmphi.errors import MmphiError
from mmphi.stages import STAGES, Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "experiments/LOG.md")]
PAGES = [*(page for page in TOP if page.is_file()), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
UNCHECKED = re.compile(r"<!-- not checked: \S.* -->\s*\Z")
OPERATORS = set("();<>|&")
MAX_README_LINES = 200


def load_script(path: Path) -> ModuleType:
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate: Any = load_script(ROOT / "docs" / "generate.py")
parser_of = cache(generate.parser_of)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: Language after the fence; empty if it has none.
        text: Content without indentation.
        line: Line of its fence, from 1 on.
    """

    language: str
    text: str
    line: int


def blocks(markdown: str, *, unchecked: bool = False) -> Iterator[Block]:
    """Yields the fenced blocks of a page, without those that are marked as not checked."""
    for match in FENCE.finditer(markdown):
        if unchecked or not UNCHECKED.search(markdown[: match.start()]):
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
            yield Block(match["language"], text, markdown.count("\n", 0, match.start()) + 1)


def prose(markdown: str) -> str:
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", markdown)


def anchors(markdown: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", prose(markdown), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(1 for each in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
        found.add(f"{slug}-{count}" if count else slug)
    return found


def broken_links(page: Path, markdown: str) -> list[str]:
    """Returns the relative links of a page whose file or anchor does not exist."""
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(markdown))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        exists = path.exists() and path.is_relative_to(ROOT)
        if exists and anchor and path.suffix == ".md":
            exists = anchor in anchors(markdown if path == page else path.read_text())
        if not exists:
            broken.append(target)
    return broken


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yields the words of every command of a shell block, without comments and variables before the command."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= OPERATORS:
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def check_settings(words: list[str], stage: str) -> None:
    """Check that the preset and the settings of a command exist.

    Raises:
        MmphiError: If one does not.
    """
    options, overrides = cli.parse(words)
    preset = options.get("preset", "tiny")
    if not preset.endswith(".yaml") and not (presets_folder() / f"{preset}.yaml").is_file():
        raise MmphiError(f"there is no preset {preset}")
    for key in overrides:
        full_name(Settings, key, stage)


def check_own(function: str, words: list[str], *, settings: bool = False) -> None:
    """Check that the options of a command with a parser of its own exist; other options are settings for some commands.

    Raises:
        MmphiError: If one does not exist.
    """
    if words[:1] in (["--help"], ["-h"]):
        return
    parser, output = parser_of(function), io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            _, rest = parser.parse_known_args(words) if settings else (parser.parse_args(words), [])
    except SystemExit as error:
        raise MmphiError(output.getvalue()) from error
    check_settings(rest, "")


def check_mmphi(words: list[str]) -> None:
    """Check that an ``mmphi`` command, its options and its settings exist.

    Args:
        words: Words after ``mmphi``.

    Raises:
        MmphiError: If one does not exist.
    """
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h"):
        return
    if name == "benchmark":
        if not rest or rest[0] not in cli.benchmarks():
            raise MmphiError(f"there is no benchmark {rest[:1]}")
        check_own(cli.BENCHMARKS.get(rest[0], f"mmphi.benchmarks.{rest[0]}:main"), rest[1:])
    elif name == "evaluate" and any(word.startswith("--harness") for word in rest):
        check_own(generate.HARNESS, rest)
    elif name == cli.GENERATORS:
        check_settings(rest, "textgen")
    elif name in cli.OWN or name in cli.COMMANDS:
        check_own((cli.OWN | cli.COMMANDS)[name], rest, settings=name == "ablate")
    elif name in STAGES or name == "status":
        check_settings(rest, name)
    else:
        raise MmphiError(f"there is no command {name}")


def check_mlflow_run(words: list[str]) -> None:
    """Check that the entry point and the parameters of ``mlflow run .`` exist.

    Raises:
        MmphiError: If one does not.
    """
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    given = dict(itertools.pairwise(words))
    entry = given.get("-e", "main")
    if entry not in entry_points:
        raise MmphiError(f"there is no entry point {entry}")
    pairs = [word for before, word in itertools.pairwise(words) if before == "-P"]
    own = entry_points[entry]["parameters"]
    positional = [pair.partition("=")[2] for pair in pairs if pair.partition("=")[0] in set(own) - {"preset"}]
    others = [f"--{pair}" for pair in pairs if pair.partition("=")[0] not in set(own) - {"preset"}]
    check_mmphi(["projector" if entry == "main" else entry, *positional, *others])


def check_command(words: list[str]) -> None:
    """Check a command of a shell block, if it is one of mmphi, MLflow or make.

    Raises:
        MmphiError: If it, an option or a setting does not exist.
    """
    name = words[0].rpartition("/")[2]
    if name == "mmphi":
        check_mmphi(words[1:])
    elif name in ("python", "python3", "torchrun") and "mmphi" in words and words[words.index("mmphi") - 1] == "-m":
        check_mmphi(words[words.index("mmphi") + 1 :])
    elif words[:3] == ["mlflow", "run", "."]:
        check_mlflow_run(words[3:])
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        missing = [word for word in words[1:] if "=" not in word and word not in targets]
        if missing:
            raise MmphiError(f"the Makefile has no target {missing}")


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    assert broken_links(ROOT / name, (ROOT / name).read_text()) == []


def test_broken_links_are_found() -> None:
    page = ROOT / "docs" / "index.md"
    text = (
        "# A `b` & c\n\n[a](#a-b--c) [b](#b) [c](none.md) [d](../README.md#results) [e](../README.md#none) `[f](g)`\n"
    )
    assert broken_links(page, text) == ["#b", "none.md", "../README.md#none"]


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile(name: str) -> None:
    for block in blocks((ROOT / name).read_text()):
        if block.language == "python":
            compile("\n" * block.line + block.text, name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_shell_blocks_exist(name: str) -> None:
    wrong = []
    for block in blocks((ROOT / name).read_text()):
        for words in shell_commands(block.text) if block.language in ("sh", "bash", "shell") else ():
            try:
                check_command(words)
            except MmphiError as error:
                wrong.append(f"line {block.line}: {shlex.join(words)}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "mmphi projektor",
        "A=1 mmphi projector --layerz 3",
        "cd x && mmphi projector --preset none",
        "mmphi serve --prot 1 | head",
        "mmphi benchmark nothing",
        "mmphi benchmark projector --stepz 3",
        "mmphi ablate control --projector.layerz 3",
        "mmphi evaluate --harness lmms-eval --task pope",
        "mlflow run . -e projektor",
        "mlflow run . -P layerz=3",
        "mlflow run . -e report -P kind=nothing",
        "torchrun --nproc-per-node 2 -m mmphi projektor",
        "make nothing",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    (*_, words) = [words for words in shell_commands(f"{line}  # a comment") if words != ["head"]]
    with pytest.raises(MmphiError):
        check_command(words)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_blocks_with_settings_load(name: str, tmp_path: Path) -> None:
    """The files that sources name are created, because settings must name existing ones."""
    for block in blocks((ROOT / name).read_text()):
        content = yaml.safe_load(block.text) if block.language == "yaml" else None
        if not isinstance(content, dict) or not set(content) & {"extends", *Settings.model_fields}:
            continue
        for source in (content.get("data") or {}).get("sources", ()):
            for key in ("path", "images"):
                if key in source:
                    (tmp_path / source[key]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "my.yaml").write_text(block.text)
        assert load_settings(str(tmp_path / "my.yaml"), {}, "projector", expand=False)


def test_objects_of_the_python_page_exist() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    names = re.findall(r"^::: (\S+)$", page, re.M)
    assert names
    assert [name for name in names if not isinstance(pkgutil.resolve_name(name), type | FunctionType)] == []


def test_unchecked_blocks_are_skipped() -> None:
    text = "```python\n(\n```\n\n<!-- not checked: a part of a line -->\n```python\n)\n```\n"
    assert [block.text for block in blocks(text)] == ["(\n"]
    assert [block.line for block in blocks(text, unchecked=True)] == [1, 6]


def test_generated_pages_are_up_to_date() -> None:
    """Otherwise ``python docs/generate.py`` writes them."""
    assert [path.name for path, text in generate.pages().items() if path.read_text() != text] == []


def test_generated_pages_have_every_setting_and_command() -> None:
    settings, commands = (path.read_text() for path in generate.pages())
    parts = {part.partition("\n")[0]: part for part in settings.split("\n## ")}
    for name in generate.all_fields(Settings):
        section, _, own = name.partition(".")
        assert f"| `{own or name}` |" in parts[section if own else "Top level"]
    for name in [*cli.OWN, *cli.COMMANDS, cli.GENERATORS, *(f"benchmark {each}" for each in cli.benchmarks())]:
        assert f"\n## mmphi {name}\n" in commands


def test_every_page_is_in_the_index() -> None:
    """Tutorials and the lab notebook have indexes of their own."""
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [path for top in ("how-to", "reference", "explanation") for path in (ROOT / "docs" / top).glob("*.md")]
    assert [path.name for path in pages if f"]({path.parent.name}/{path.name})" not in index] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES
