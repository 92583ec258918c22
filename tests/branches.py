"""Stages of two branches that meet at a goal, to be built beside each other; as a module, the helper that does so."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from mmphi.config.projector import ProjectorSettings
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages import background_worker

WAIT_S = 60.0


def _hold(variable: str) -> None:
    """Wait for the file that a variable names, if it names one."""
    end = time.monotonic() + WAIT_S
    while os.environ.get(variable) and not Path(os.environ[variable]).exists():
        assert time.monotonic() < end, variable
        time.sleep(0.02)


def _figures() -> dict[str, float]:
    return {"pid": os.getpid(), "threads": torch.get_num_threads()}


def root(_: Context) -> Mapping[str, float]:
    return _figures()


def left(ctx: Context) -> Mapping[str, float]:
    """Waits, where asked, for what the other branch writes."""
    assert "root" in ctx.upstream
    _hold("LEFT_HOLD")
    if os.environ.get("LEFT_FAIL"):
        raise ValueError(os.environ["LEFT_FAIL"])
    return _figures() | {"steps": ctx.settings(ProjectorSettings).steps}


def right(_: Context) -> Mapping[str, float]:
    print("right has begun", file=sys.stderr, flush=True)
    if os.environ.get("RIGHT_BEGUN"):
        Path(os.environ["RIGHT_BEGUN"]).touch()
    _hold("RIGHT_HOLD")
    if os.environ.get("RIGHT_FAIL") and __name__ == "__main__":
        raise ValueError(os.environ["RIGHT_FAIL"])
    print("right is done", file=sys.stderr, flush=True)
    return _figures()


def further(ctx: Context) -> Mapping[str, float]:
    assert "right" in ctx.upstream
    if os.environ.get("FURTHER_DONE"):
        Path(os.environ["FURTHER_DONE"]).touch()
    return _figures()


def goal(ctx: Context) -> Mapping[str, float]:
    assert set(ctx.upstream) == {"left", "further"}
    return _figures()


BRANCHES = {
    "root": Stage("root", 1, "", ("scenes",), root),
    "left": Stage("left", 1, "", ("projector",), left, upstream=lambda _: ("root",), trains=True),
    "right": Stage("right", 1, "", ("light_clip",), right, upstream=lambda _: ("root",), trains=True),
    "further": Stage("further", 1, "", ("embed",), further, upstream=lambda _: ("right",)),
    "goal": Stage("goal", 1, "", ("qlora",), goal, upstream=lambda _: ("left", "further"), trains=True),
}


if __name__ == "__main__":
    sys.exit(background_worker.main(BRANCHES))
