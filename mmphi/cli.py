"""The command line ``mmphi STAGE --key value``; help does not import heavy packages."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import mmphi.benchmarks
from mmphi.allocator import keep_freed_memory
from mmphi.errors import MmphiError, SettingsError, Stopped
from mmphi.logs import show_log
from mmphi.pipeline.warning_filters import install_filters

if TYPE_CHECKING:
    from mmphi.stages import Settings

TERMINATED, INTERRUPTED, USER_ERROR = 143, 130, 2  # Exit codes.
LABEL_CHARACTERS = 80
ALL = "true"  # Value of a flag that is given without one.
FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # Case-insensitive.
# Commands that parse their own options; imported when they are called.
OWN = {
    "ask": "mmphi.serving.ask:main",
    "chat": "mmphi.serving.chat:main",
    "demo": "mmphi.serving.demo:main",
    "fetch": "mmphi.data.fetch:main",
    "register": "mmphi.tracking.register:main",
    "serve": "mmphi.serving.serve:main",
    "tts": "mmphi.data.tts:main",
    "ui": "mmphi.tracking.ui:main",
}
# Commands of packages that depend on this one; they are imported by name, because this package must not depend on them.
COMMANDS = {
    "ablate": "ablations.commands:ablate",
    "studies": "ablations.study_cli:studies",
    "compare": "ablations.study_cli:compare",
    "report": "reports.commands:report",
    "reference": "reports.reference_command:reference",
}
INTERACTIVE = ("ask", "chat", "demo", "serve", "ui")  # Commands with nothing to resume.
FORMER_COMMANDS = {"say": "tts"}
GENERATORS = "generators"
BENCHMARKS = {"ablation": "ablations.benchmarks.ablation:main"}

USAGE = """usage: mmphi STAGE [--preset NAME] [--KEY VALUE ...] [--force] [--no-build]
       mmphi STAGE --help             the settings of a stage that are changed most
       mmphi STAGE --help-all [TEXT]  all of them, or those whose name or description contains a text
       mmphi status [--preset NAME]   what is built, what is missing, what it would cost
       mmphi ask --image x.jpg "..."  a question to a trained model, typed or spoken
       mmphi chat                     a conversation with a trained model in the terminal
       mmphi demo                     a page in the browser: type, speak, show a photo; two models side by side
       mmphi serve                    a trained model behind OpenAI's HTTP interface
       mmphi generators --spool URL   generate text with a language model, into a spool for readers
       mmphi register RUN NAME        register a run's model as models:/NAME/1, also for `mlflow models serve`
       mmphi ui                       MLflow's pages, opened on the training runs
       mmphi ablate STUDY             run an ablation, or resume it
       mmphi studies [STUDY]          list studies and their progress; change them while they run
       mmphi compare STUDY            MLflow's pages of exactly these runs
       mmphi report ablation --study STUDY   the results of a study, as Markdown and HTML
       mmphi report pretraining       pretrained models compared with Phi-2, and the compute to reach it
       mmphi report benchmarks        scores of runs on published benchmarks, with published scores
       mmphi reference --lm X --text Y   the loss of any model on any text, stored for reports
       mmphi evaluate --harness lmms-eval --tasks pope --model RUN   published benchmarks, where lmms-eval is installed
       mmphi fetch llava|models FOLDER  download the data and models of presets
       mmphi tts TEXTS.csv FOLDER     synthesize sentences with espeak-ng in many voices, for training
       mmphi benchmark NAME           side by side with other implementations: {benchmarks}

stages (each builds what it needs, and reuses what is built):
{stages}

options:
  --preset NAME    a file in experiments/ (tiny, small, phi2, ...) or the path of a YAML file [tiny]
  --KEY VALUE      any setting: --learning_rate 1e-3, --vision.pool 2
  --force          build the stage again, even if it is finished
  --no-build       build nothing; say what is missing
  --smoke          every stage and the evaluation in a few steps, to see whether the whole run works

Results are kept in MLflow's store: MLFLOW_TRACKING_URI, else mlflow.db in this folder or the project's.
"""


def usage() -> str:
    """Returns the text of ``mmphi --help``."""
    from mmphi.stages import STAGES

    stages = "\n".join(f"  {stage.name:<12} {stage.help}" for stage in STAGES.values())
    return USAGE.format(stages=stages, benchmarks=", ".join(benchmarks()))


def benchmarks() -> list[str]:
    """Returns the names of all benchmarks."""
    names = (module.name for module in pkgutil.iter_modules(mmphi.benchmarks.__path__))
    return sorted([*(name for name in names if not name.startswith("_")), *BENCHMARKS])


def function(name: str) -> Callable[[list[str]], int | None]:
    """Returns a function, given as ``module:name``."""
    module, _, attribute = name.partition(":")
    found: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), attribute)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success; 2 after an error that the user can fix; 130 after Ctrl-C; 143 after SIGTERM.
    """
    keep_freed_memory()
    install_filters()
    show_log()
    words = list(sys.argv[1:] if arguments is None else arguments)
    resumes = not words or words[0] not in INTERACTIVE
    with _terminable("stopped; the same command resumes from there" if resumes else "stopped") as terminated:
        try:
            return _command(words)
        except MmphiError as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt as error:
            print(f"\n{error or 'interrupted'}", file=sys.stderr)
            return TERMINATED if terminated else INTERRUPTED
        except BrokenPipeError:  # The reader has closed the pipe, as in `mmphi ... | head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except ModuleNotFoundError as error:
            from mmphi.extras import missing_package

            install = missing_package(error)
            if not install:
                raise
            print(f"error: the package {error.name} is not installed\n  {install}", file=sys.stderr)
            return USER_ERROR
        except Exception as error:
            from mmphi.tracking.error_messages import store_error

            explained = store_error(error)
            if explained is None:
                raise
            print(f"error: {explained}", file=sys.stderr)
            return USER_ERROR


@contextlib.contextmanager
def _terminable(message: str) -> Iterator[list[int]]:
    """Raise an exception on SIGTERM, so that the run can record it; yields a list to which the signal is appended."""
    terminated: list[int] = []

    def stop(number: int, _: object) -> None:
        terminated.append(number)
        raise Stopped(message)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = words
    name = FORMER_COMMANDS.get(name, name)
    if name == "benchmark":
        return _benchmark(rest)
    if name == "evaluate" and any(word.partition("=")[0] == "--harness" for word in rest):
        from mmphi.serving.harness.command import main as harness

        return harness(rest)
    if name == GENERATORS:
        return _generators(rest)
    if name in OWN or name in COMMANDS:
        return function((OWN | COMMANDS)[name])(rest) or 0
    from mmphi.stages import STAGES

    if name != "status" and name not in STAGES:
        from mmphi.config.messages import did_you_mean

        near = did_you_mean(name.replace("-", "_"), [*STAGES, "status", "benchmark", GENERATORS, *OWN, *COMMANDS])
        raise SettingsError(
            f"there is no command {name!r}", f"did you mean {near}?" if near else "`mmphi --help` lists them"
        )
    options, overrides = parse(rest)
    preset = options.get("preset", "tiny")
    from mmphi.stages import load_settings

    if "help" in options or "help_all" in options:
        from mmphi.describe import STATUS_HELP, stage_help

        # Help must work without the files and environment variables of a run.
        settings = load_settings(preset, overrides, name, expand=False)
        filter_text = options.get("help_all", "")
        print(
            STATUS_HELP
            if name == "status"
            else stage_help(
                name, settings, everything=bool(filter_text), only="" if filter_text == ALL else filter_text
            )
        )
        return 0
    if name == "status":
        from mmphi.describe import status

        # Status reports missing files, so they must not raise an error.
        settings = load_settings(preset, overrides, name, expand=False)
        print(status(_smoke(settings, overrides, name) if "smoke" in options else settings))
        return 0
    settings = load_settings(preset, overrides, name)
    if "smoke" in options:
        settings = _smoke(settings, overrides, name)
    return _stage(
        name, settings, overrides, force="force" in options, no_build="no_build" in options, smoke="smoke" in options
    )


def _smoke(settings: Settings, overrides: Mapping[str, str], name: str) -> Settings:
    """Settings reduced to a smoke run; those of the command line are kept."""
    from mmphi.config.overrides import full_name
    from mmphi.config.smoke import smoke

    return smoke(settings, {full_name(type(settings), key, name) for key in overrides})


def parse(rest: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the options of the command line itself, and the settings to change.

    A flag may be given alone or with ``true`` or ``false``, because MLflow passes every parameter with a value. So may
    a boolean setting; which settings are boolean is not known here.

    Raises:
        SettingsError: If a word is not a key, or an option has no value or an invalid one.
    """
    from mmphi.config.overrides import flag_value

    options: dict[str, str] = {}
    overrides: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        key = {"-h": "--help"}.get(key, key).replace("-", "_")
        if not key.startswith("__") or not key.strip("_"):
            hint = f"write --{word}" if equals else "settings are given as --key value"
            raise SettingsError(f"unexpected argument {word!r}", hint)
        key = key.removeprefix("__")
        flag = key in ("force", "no_build", "help", "help_all", "smoke")
        if not equals:
            if key == "help_all" and words and not words[0].startswith("--"):
                value = words.pop(0)  # Only settings that contain this text.
            elif flag:
                value = words.pop(0) if words and words[0].lower() in FLAGS else ALL
            elif not words or words[0].startswith("--"):
                if key == "preset":
                    raise SettingsError("--preset has no value", "give one: --preset tiny")
                value = flag_value(word)
            else:
                value = words.pop(0)
        if key == "help_all" and value.lower() not in FLAGS:
            options[key] = value
        elif not flag:
            (options if key == "preset" else overrides)[key] = value
        elif value.lower() not in FLAGS:
            raise SettingsError(f"{word}: {value!r} is neither true nor false", f"give {word.partition('=')[0]} alone")
        elif FLAGS[value.lower()]:
            options[key] = ALL
        else:
            options.pop(key, None)
    return options, overrides


def _generators(rest: list[str]) -> int:
    from mmphi.textgen import command

    options, overrides = parse(rest)
    if "help" in options:
        print(command.USAGE)
        return 0
    from mmphi.stages import load_settings

    return command.run_generators(load_settings(options.get("preset", "tiny"), overrides, "textgen").textgen)


def _benchmark(rest: list[str]) -> int:
    there = ", ".join(benchmarks()) or "none"
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: mmphi benchmark NAME [--help]\n\nbenchmarks: {there}")
        return 0 if rest else USER_ERROR
    if rest[0] not in benchmarks():
        raise SettingsError(f"there is no benchmark {rest[0]!r}", f"there are: {there}")
    run = function(BENCHMARKS.get(rest[0], f"mmphi.benchmarks.{rest[0]}:main"))
    return run(rest[1:]) or 0


def _stage(
    name: str, settings: Settings, overrides: Mapping[str, str], *, force: bool, no_build: bool, smoke: bool
) -> int:
    from mmphi.config.presets import AS_PRESET
    from mmphi.describe import ending
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES
    from mmphi.stages.advice import advice

    if os.environ.get("RANK", "0") == "0":
        print("".join(f"{line}\n" for line in advice(name, settings)), end="", file=sys.stderr)
    label = " ".join(f"{key}={value}" for key, value in overrides.items() if value != AS_PRESET)
    pipeline = Pipeline(STAGES, helper="mmphi.stages.background_worker")
    result = pipeline.build(
        name,
        settings,
        force=force,
        no_build=no_build,
        label=label[:LABEL_CHARACTERS],
        run=os.environ.get("MLFLOW_RUN_ID", ""),  # Set by `mlflow run`.
    )
    if os.environ.get("RANK", "0") == "0":
        if smoke:
            print("\nsmoke run: every step works; its figures and answers mean nothing after so few steps")
        print(ending(result, pipeline.store))
    return 0


if __name__ == "__main__":
    sys.exit(main())
