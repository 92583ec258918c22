"""Stage ``scenes``: draws the built-in data as image files with LLaVA-Instruct JSON, and writes a text corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmphi.config import Section, setting
from mmphi.config.declared_view import SettingsView
from mmphi.pipeline.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from mmphi.data.scenes import Scene

SHOWN = 12


class ScenesSettings(Section):
    """Scenes drawn by the program: two coloured shapes in a relation, with captions and questions."""

    seed: int = setting(0, "seed of the drawings and of the held-out combinations", ge=0)
    train_images: int = setting(3000, "images to train on", unit="images", ge=8)
    validation_images: int = setting(100, "validation images, of combinations seen in training", unit="images", ge=1)
    test_images: int = setting(200, "test images, of combinations not seen in training", unit="images", ge=1)
    held_out: float = setting(0.15, "share of colour-shape-relation combinations kept for the test", gt=0, lt=0.9)
    image_size: int = setting(96, "side of the drawn images", unit="px", ge=32, le=1024)
    questions: int = setting(2, "question-answer turns for each caption", unit="turns", ge=0, le=8)
    texts: int = setting(20000, "scene descriptions for pretraining the language model", unit="texts", ge=0)
    phrasings: Literal["one", "varied"] = setting(
        "varied",
        "wordings of each question in training: one, or several with varied case and punctuation",
        legacy_default="one",
    )


def cost(settings: SettingsView) -> Cost:
    """Disk space at two bytes per pixel (PNG of noisy images), and time at 3 ms per image of 96 px."""
    chosen = settings(ScenesSettings)
    images = chosen.train_images + chosen.validation_images + chosen.test_images
    disk = 2 * images * chosen.image_size**2 + 400 * chosen.texts
    return Cost(disk, 0.003 * images * (chosen.image_size / 96) ** 2 + 1e-4 * chosen.texts)


def run(ctx: Context) -> Mapping[str, float]:
    """Draw the images of every split and write the text corpus."""
    from tqdm.auto import tqdm

    from mmphi.data.phrasing import training_phrasing
    from mmphi.data.scene_drawing import ImageWriter, drawing_function
    from mmphi.data.scene_text import corpus_texts
    from mmphi.data.scenes import combinations, held_out, scenes

    chosen = ctx.settings(ScenesSettings)
    seed = chosen.seed
    unseen = held_out(chosen.held_out, seed)
    seen = [c for c in combinations() if c not in unseen]
    sizes = {"train": chosen.train_images, "validation": chosen.validation_images, "test": chosen.test_images}
    # A separate random generator, so that the scenes do not depend on the phrasings.
    phrasing_rng = random.Random(f"phrasings {seed}")

    def phrase(question: str) -> str:
        return training_phrasing(question, phrasing_rng) if chosen.phrasings == "varied" else question

    figure_scenes: list[tuple[Path, Scene]] = []
    with tqdm(total=sum(sizes.values()), desc="scenes", unit="image") as bar, ImageWriter() as writing:
        for split, count in sizes.items():
            rng = random.Random(f"{split} {seed}")
            among = sorted(unseen) if split == "test" else seen
            rows: list[dict[str, Any]] = []
            (ctx.folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for number, scene in enumerate(scenes(count, rng, among)):
                path = ctx.folder / "images" / split / f"{number:05d}.png"
                writing.save(drawing_function(scene, chosen.image_size, rng), path)
                rephrase = str if split == "test" else phrase
                rows += _records(scene, f"{split}/{path.name}", chosen.questions, rng, rephrase)
                if len(figure_scenes) < SHOWN:
                    figure_scenes.append((path, scene))
                bar.update()
            (ctx.folder / f"{split}.json").write_text(json.dumps(rows))
    with (ctx.folder / "corpus.jsonl").open("w") as file:
        for text in corpus_texts(chosen.texts, chosen.questions, random.Random(f"corpus {seed}"), seen):
            turns = [[phrase(turn.question), turn.answer] for turn in text.turns]
            file.write(json.dumps({"context": text.context, "turns": turns}) + "\n")
    ctx.tracker.figure("scenes", _figure(figure_scenes))
    return {"scenes/images": sum(sizes.values()), "scenes/held_out_combinations": len(unseen)}


def _records(
    scene: Scene, relative: str, question_count: int, rng: random.Random, phrase: Callable[[str], str]
) -> list[dict[str, Any]]:
    from mmphi.data.phrasing import DESCRIBE, WHICH_COLORS, WHICH_SHAPES
    from mmphi.data.scene_text import caption, colors, questions, shapes, yes_no_questions

    question_turns = questions(scene, question_count, rng)
    conversations = {
        "caption": [(DESCRIBE, caption(scene))],
        "parts": [(WHICH_SHAPES, shapes(scene)), (WHICH_COLORS, colors(scene))],
        "questions": [(t.question, t.answer) for t in question_turns],
        "yes_no": [(t.question, t.answer) for t in yes_no_questions(scene, 2 * question_count, rng)],
    }
    rows = []
    for kind, turns in conversations.items():
        messages = []
        for i, (question, answer) in enumerate(turns):
            # As in LLaVA-Instruct, the image is randomly placed before or after the first question.
            question = phrase(question)
            places = (f"<image>\n{question}", f"{question}\n<image>")
            messages.append({"from": "human", "value": rng.choice(places) if i == 0 else question})
            messages.append({"from": "gpt", "value": answer})
        if messages:
            name = f"{relative.removesuffix('.png')}-{kind}"
            attributes = {"kind": kind, **scene.attributes}
            rows.append({"id": name, "image": relative, "conversations": messages, "attributes": attributes})
    return rows


def _figure(shown: list[tuple[Path, Scene]]) -> Any:
    from matplotlib.figure import Figure
    from PIL import Image

    from mmphi.data.scene_text import caption

    columns = 4
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    for axes, (path, scene) in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        axes.imshow(Image.open(path))
        axes.set_title(caption(scene).replace(" a small", "\na small"), fontsize=10)
    for axes in figure.axes:
        axes.axis("off")
    return figure


STAGE = Stage(
    name="scenes",
    version=2,
    help="draw the built-in data: coloured shapes, captions, questions",
    reads=("scenes",),
    run=run,
    cost=cost,
)
