"""``mmphi STAGE --key value``: the command line; answers for help without loading what is heavy."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mmphi.errors import MmphiError, SettingsError, Stopped

if TYPE_CHECKING:
    from mmphi.settings import Settings
    from mmphi.stage import Result

STAGES_HELP = {
    "scenes": "draw the embedded data: coloured shapes, captions, questions",
    "pretrain": "train a Phi-shaped language model from scratch",
    "light_clip": "train a small CLIP on the data's own captions",
    "embed": "compute the features of every image once, and store them",
    "projector": "train the layers between image features and the frozen language model",
    "evaluate": "measure a trained projector on any split and checkpoint",
}
BENCHMARKS = ("projector", "embed", "features")
USAGE = """usage: mmphi STAGE [--preset NAME] [--KEY VALUE ...] [--force] [--no-build]
       mmphi STAGE --help             every setting of a stage
       mmphi status [--preset NAME]   what is built, what is missing, what it would cost
       mmphi benchmark NAME           side by side with other implementations: {benchmarks}

stages (each builds what it needs, and reuses what is built):
{stages}

options:
  --preset NAME    a file in experiments/ (tiny, small, phi2, ...) or the path of a YAML file [tiny]
  --KEY VALUE      any setting: --learning_rate 1e-3, --vision.pool 2
  --force          build the stage anew, though it is there
  --no-build       build nothing; say what is missing

Results are kept in MLflow's store (MLFLOW_TRACKING_URI, else mlflow.db in this folder).
"""


def usage() -> str:
    """What ``mmphi --help`` prints."""
    stages = "\n".join(f"  {name:<12} {text}" for name, text in STAGES_HELP.items())
    return USAGE.format(stages=stages, benchmarks=", ".join(BENCHMARKS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 after an error that a person can mend; 130 or 143 after Ctrl-C or SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked_to_stop: list[int] = []

    def stop(number: int, _: object) -> None:
        asked_to_stop.append(number)
        raise Stopped("stopped; the same command goes on from the last checkpoint")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return _command(given)
    except MmphiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{error or 'interrupted'}", file=sys.stderr)
        return 143 if asked_to_stop else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = given
    if name == "benchmark":
        return _benchmark(rest)
    if name != "status" and name not in STAGES_HELP:
        import difflib

        near = difflib.get_close_matches(name, [*STAGES_HELP, "status", "benchmark"], n=1)
        hint = f"did you mean {near[0]}?" if near else "mmphi --help lists them"
        raise SettingsError(f"there is no command {name!r}", hint)
    options, overrides = parse(rest)
    preset = options.get("preset", "tiny")
    from mmphi.config import load_settings

    if "help" in options:
        from mmphi.describe import stage_help, status_help

        print(status_help() if name == "status" else stage_help(name, load_settings(preset, overrides, name)))
        return 0
    settings = load_settings(preset, overrides, name)
    if name == "status":
        from mmphi.describe import status

        print(status(settings))
        return 0
    return _stage(name, settings, overrides, force="force" in options, no_build="no_build" in options)


def parse(rest: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Options of the command line itself, and settings to change.

    Raises:
        SettingsError: If a word stands alone, or a key has no value.
    """
    flags = {"--force": "force", "--no-build": "no_build", "--help": "help", "-h": "help"}
    options: dict[str, str] = {}
    overrides: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            options[flags[word]] = "true"
            if words and words[0] in ("true", "false"):  # MLflow passes every parameter with a value.
                options = {k: v for k, v in options.items() if k != flags[word] or words[0] == "true"}
                words.pop(0)
            continue
        if not name.startswith("--"):
            raise SettingsError(f"{word!r} stands alone", "settings are given as --key value")
        if not equals:
            if not words:
                raise SettingsError(f"{word} has no value", f"give one: {word} VALUE")
            value = words.pop(0)
        key = name.removeprefix("--")
        if key in ("force", "no_build", "no-build"):
            if value == "true":
                options[key.replace("-", "_")] = "true"
        else:
            (options if key == "preset" else overrides)[key] = value
    return options, overrides


def _benchmark(rest: list[str]) -> int:
    if not rest or rest[0] not in BENCHMARKS:
        given = rest[0] if rest else "nothing"
        if given in ("-h", "--help"):
            print(f"usage: mmphi benchmark {{{','.join(BENCHMARKS)}}} [--help]")
            return 0
        raise SettingsError(f"there is no benchmark {given!r}", f"there are {', '.join(BENCHMARKS)}")
    run: Callable[[list[str]], int] = importlib.import_module(f"mmphi.benchmarks.{rest[0]}").main
    return run(rest[1:])


def _stage(name: str, settings: Settings, overrides: Mapping[str, str], *, force: bool, no_build: bool) -> int:
    import os

    from mmphi.config import AS_PRESET
    from mmphi.pipeline import Pipeline
    from mmphi.stages import STAGES

    label = " ".join(f"{k}={v}" for k, v in overrides.items() if v != AS_PRESET)
    pipeline = Pipeline(STAGES)
    result = pipeline.build(name, settings, force=force, no_build=no_build, label=label)
    if int(os.environ.get("RANK", "0")) == 0:
        _report(result, pipeline)
    return 0


def _report(result: Result, pipeline: object) -> None:
    from mmphi.describe import ending

    print(ending(result, pipeline))


if __name__ == "__main__":
    sys.exit(main())
