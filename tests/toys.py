"""Stages that take no time, to test the pipeline with; as a script, builds one of them in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from forked import Forked

from mmphi.config.corpus import CorpusSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages import load_settings
from mmphi.stages.scenes import ScenesSettings

CALLS: list[str] = []


def draw(ctx: Context) -> Mapping[str, float]:
    CALLS.append("draw")
    (ctx.folder / "numbers").mkdir(exist_ok=True)
    for i in range(ctx.settings(ScenesSettings).validation_images % 7):
        (ctx.folder / "numbers" / f"{i}.txt").write_text(str(i))
    return {"numbers": ctx.settings(ScenesSettings).validation_images % 7}


def train(ctx: Context) -> Mapping[str, float]:
    """Write one file a step, going on from those there are; a file named in TOY_HOLD is waited for after step 2."""
    CALLS.append("train")
    assert (ctx.upstream["draw"].path / "numbers").is_dir()
    begun = len(list(ctx.folder.glob("step-*")))
    for step in range(begun, ctx.settings(ProjectorSettings).steps):
        (ctx.folder / f"step-{step}").write_text(str(step))
        ctx.tracker.metrics({"train/loss": 1 / (step + 1)}, step)
        if step == 2 and os.environ.get("TOY_HOLD"):
            if os.environ.get("TOY_SHARE"):
                for name in range(3):  # As training shares its checkpoints with a remote store.
                    ctx.tracker.client.log_artifact(ctx.tracker.run_id, str(ctx.folder / f"step-{name}"))
            print("held", flush=True)
            while not Path(os.environ["TOY_HOLD"]).exists():
                time.sleep(0.02)
    if os.environ.get("TOY_FAIL"):
        raise ValueError(os.environ["TOY_FAIL"])
    return {"begun_at": begun, "rank": int(os.environ.get("RANK", "0"))}


def read(ctx: Context) -> Mapping[str, float]:
    CALLS.append("read")
    return {"bytes": sum(Path(p.path).stat().st_size for p in ctx.settings(CorpusSettings).sources)}


TOYS = {
    "draw": Stage("draw", 1, "draw numbers", ("scenes",), draw),
    "train": Stage("train", 1, "train on them", ("projector",), train, upstream=lambda _: ("draw",), trains=True),
    "read": Stage("read", 1, "read files", ("corpus.sources.N.path",), read),
}


def begin(*arguments: str, **environment: str) -> Forked:
    """Build a toy stage of four steps in a process of its own."""
    return Forked([__file__, *arguments, "--projector.steps", "4"], {**os.environ, **environment})


def until(process: Forked, line: str) -> str:
    """What a process prints up to a line."""
    output = ""
    for read in process.stdout:
        output += read
        if line in read:
            return output
    raise AssertionError(output)


if __name__ == "__main__":
    from mmphi.cli import parse

    # A shell in the background, as continuous integration may be, starts its commands deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options, overrides = parse(sys.argv[2:])
    found = Pipeline(TOYS).build(sys.argv[1], load_settings("tiny", overrides), force="force" in options)
    print(json.dumps({"run_id": found.run_id, "path": str(found.path), "metrics": dict(found.metrics)}))
