"""Answers per second of ``mmphi serve``, ``transformers serve`` and LLaVA's ``generate``, with the same weights.

- ``generate``: transformers' LLaVA in a loop without a server; the batch size is the number of users;
- ``transformers``: ``transformers serve`` on the exported model;
- ``mmphi``: ``mmphi serve`` on the model itself.

Requests differ in image, question and length limit. ``--load`` is a load test of ``mmphi serve`` alone with any number
of requests: it compares each answer with that of the same request sent alone, and reports the memory of the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mmphi.benchmarks._assistant_sides import (
    bodies,
    generate,
    mmphi_server,
    serving,
    transformers_server,
)
from mmphi.benchmarks._conversations import SHAPES
from mmphi.benchmarks._load import Body, load, summary
from mmphi.benchmarks._process import in_process
from mmphi.errors import SettingsError

SIDES = ("generate", "transformers", "mmphi")
DIFFERENT = 16  # Number of different requests of a load test.
LOOKS = 10


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = argparse.ArgumentParser(
        prog="mmphi benchmark assistant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="", help="folder or run of a trained model [one with random weights]")
    made.add_argument("--llava", default="", help="folder that `mmphi export` made of it")
    made.add_argument("--images", type=Path, help="folder of pictures [drawn ones]")
    made.add_argument("--shape", default="small", choices=list(SHAPES), help="sizes of random weights [small]")
    made.add_argument("--requests", type=int, default=48, help="of each side in each round [48]")
    made.add_argument("--users", type=int, default=8, help="who ask at the same time [8]")
    made.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    made.add_argument("--load", action="store_true", help="mmphi serve alone: answers, waiting, memory")
    made.add_argument("--json", type=Path, help="file for all figures")
    made.add_argument("--side", default="", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark assistant``."""
    options = parser().parse_args(list(arguments))
    if options.side == "generate":
        rounds = rounds_of(pictures(options.images), options.requests, options.users, "")
        print(json.dumps({str(n): _figures(*generate(options.folder, requests, n)) for n, requests in rounds.items()}))
        return 0
    if bool(options.model) != bool(options.llava) and not options.load:
        raise SettingsError("--model and --llava are of one model", "give both, or neither for random weights")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.model:
            _random(folder, options.shape)
        model, llava = options.model or str(folder / "mmphi"), Path(options.llava or folder / "llava")
        images = options.images or folder / "images"
        if not options.images and options.model:
            from mmphi.benchmarks.embed import draw_photos

            draw_photos(images, DIFFERENT)
        if options.load:
            found: dict[str, Any] = under_load(model, pictures(images), options.requests, options.users)
            show_load(found, options.users)
        else:
            found = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    found[side].append(run_side(side, model, llava, images, options.requests, options.users))
            show(found, options.users)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def pictures(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder.

    Raises:
        SettingsError: If there are none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not found:
        raise SettingsError(f"{folder} holds no PNG or JPEG files", "give --images another folder")
    return found


def _random(folder: Path, shape: str) -> None:
    """Write a model with random weights as an mmphi folder and as a LLaVA export."""
    from mmphi.benchmarks._conversations import loaded_language, loaded_tower, prepare, vision_settings
    from mmphi.data.features import LiveFeatures
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector
    from mmphi.models.vision.vision_encoder import VisionReference

    prepare(folder, SHAPES[shape], 1)
    encoder = loaded_tower(folder)
    vision = VisionReference(vision_settings(folder), encoder.digest)
    language = loaded_language(folder, SHAPES[shape].precision)
    model = Multimodal(language, Projector.load(folder), LiveFeatures(encoder), SHAPES[shape].max_length, vision)
    model.save_pretrained(folder / "mmphi")


def run_side(side: str, model: str, llava: Path, images: Path, requests: int, users: int) -> dict[str, Any]:
    """Measurements and texts of one side, for one user and for several."""
    if side == "generate":
        own = ["--side", side, "--folder", str(llava), "--requests", str(requests), "--images", str(images)]
        return in_process(side, "assistant", [*own, "--users", str(users)])
    command = mmphi_server(model, users) if side == "mmphi" else transformers_server(llava)
    rounds = rounds_of(pictures(images), requests, users, "" if side == "mmphi" else str(llava))
    with serving(command) as (address, _):
        load(address, bodies(pictures(images)[-1:], 1, rounds[1][0]["model"]), 1)  # The first request allocates memory.
        return {str(count): _figures(*load(address, requests, count)) for count, requests in rounds.items()}


def rounds_of(images: Sequence[Path], requests: int, users: int, model: str) -> dict[int, list[Body]]:
    """Requests of one user and of several, about different images if there are enough, so that no cache helps."""
    made = bodies(images, 2 * requests, model)
    return {1: made[:requests], users: made[requests:]}


def _figures(seen: Any, seconds: float) -> dict[str, Any]:
    return summary(seen, seconds) | {"texts": [each.text for each in seen]}


def under_load(model: str, images: Sequence[Path], requests: int, users: int) -> dict[str, Any]:
    """Load test of ``mmphi serve``: latencies, answers that differ from those of single requests, and memory in MB."""
    cases = bodies(images[:DIFFERENT], DIFFERENT, "")
    made: list[Body] = [cases[(number * 7) % len(cases)] for number in range(requests)]
    memory: list[float] = []
    with serving(mmphi_server(model, min(users, 16))) as (address, process):
        alone = {json.dumps(body): seen.text for body, seen in zip(cases, load(address, cases, 1)[0], strict=True)}
        server = psutil.Process(process)

        def look(number: int) -> None:
            if number % max(1, requests // LOOKS) == 0:
                memory.append(server.memory_info().rss / 1e6)

        seen, seconds = load(address, made, users, look)
        memory.append(server.memory_info().rss / 1e6)
    wrong = sum(each.text != alone[json.dumps(body)] for body, each in zip(made, seen, strict=True))
    return summary(seen, seconds) | {"requests": requests, "wrong": wrong, "memory_mb": memory}


def show_load(found: Mapping[str, Any], users: int) -> None:
    """Print the results of a load test."""
    memory = found["memory_mb"]
    print(
        f"{found['requests']:,} requests of {users} users: {found['wrong']} wrong, {found['requests_per_s']:.1f}/s,"
        f" answers after {found['answer_s']:.2f} s (p50) and {found['late_answer_s']:.2f} s (p95),"
        f" first tokens after {found['first_token_s']:.2f} s; {found['refusals']:.0f} times the queue was full"
    )
    print("memory of the server, MB: " + " ".join(f"{each:.0f}" for each in memory))


def show(found: Mapping[str, list[dict[str, Any]]], users: int) -> None:
    """Print a table of the sides: medians of the rounds."""

    def median(side: str, count: int, name: str) -> float:
        return float(statistics.median(run[str(count)][name] for run in found[side]))

    head = f"{'users':>5} {'side':13} {'requests/s':>11} {'mmphi is':>9} {'tokens/s':>9} {'first token':>12}"
    print(head + f" {'p50':>7} {'p95':>7}")
    for count in dict.fromkeys((1, users)):
        for side in found:
            ratio = median("mmphi", count, "requests_per_s") / median(side, count, "requests_per_s")
            print(
                f"{count:5} {side:13} {median(side, count, 'requests_per_s'):11.2f} {ratio:8.2f}x"
                f" {median(side, count, 'tokens_per_s'):9.1f} {median(side, count, 'first_token_s'):10.3f} s"
                f" {median(side, count, 'answer_s'):5.2f} s {median(side, count, 'late_answer_s'):5.2f} s"
            )
    mine = found["mmphi"][0][str(users)]["texts"]
    for side in SIDES[:-1]:
        theirs = found[side][0][str(users)]["texts"]
        same = sum(one == other for one, other in zip(mine, theirs, strict=True))
        print(f"{same} of {len(mine)} answers are the same as those of {side}")
