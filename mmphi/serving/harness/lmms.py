"""Adapter of mmphi's models for lmms-eval; imported only where lmms-eval is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

import mmphi
from mmphi.data.images import as_rgb
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.errors import DataError
from mmphi.text.packing import packs, to_device

LONGEST = 1024  # Default length of an answer, in tokens; the same as of lmms-eval's own models.


def manifest() -> ModelManifest:
    """Entry point that registers the model ``mmphi`` with lmms-eval."""
    return ModelManifest(model_id="mmphi", simple_class_path="mmphi.serving.harness.lmms.Mmphi")


class Mmphi(lmms):
    """A run, folder or registered model: ``--model mmphi --model_args pretrained=RUN``.

    Args:
        pretrained: Folder, run ID or registered name, as :func:`mmphi.load` takes it.
        batch_size: Answers generated at once.
        device: Device of the model; by default this process's accelerator.
        **_: Further arguments of lmms-eval, which are ignored.
    """

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 32, device: str | None = None, **_: Any) -> None:
        super().__init__()
        self.model = mmphi.load(pretrained, device=device or "")
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to questions, in order.

        Raises:
            DataError: If a task has inputs other than text and images.
        """
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=lambda pair: pair[0])), []).append(place)
        with tqdm(total=len(requests), desc="lmms-eval", unit="answer") as bar:
            for places in alike.values():
                for first in range(0, len(places), self.batch_size):
                    chosen = places[first : first + self.batch_size]
                    texts = self._answers([requests[place] for place in chosen])
                    for place, text in zip(chosen, texts, strict=True):
                        answers[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args[:2], text)
                    bar.update(len(chosen))
        return answers

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        """Answers to questions with equal generation settings."""
        wanted: Mapping[str, Any] = requests[0].args[1]
        longest, warm = int(wanted.get("max_new_tokens") or LONGEST), float(wanted.get("temperature") or 0)
        until = wanted.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        with tempfile.TemporaryDirectory() as name:
            prompts = []
            for number, request in enumerate(requests):
                context, _, shown, document, task, split = request.args
                visuals = flat(shown(self.task_dict[task][split][document]))
                prompts.append((saved(visuals, Path(name), f"{number}-", task), context))
            if wanted.get("do_sample") and warm > 0:
                answers = [group[0] for group in self.model.sample(prompts, 1, warm, longest, self.batch_size)]
            else:
                answers = self.model.generate(prompts, longest, self.batch_size)
        return [cut(answer.text, until) for answer in answers]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Loss of each given answer, in nats per token (lmms-eval takes the lowest), and whether it is greedy."""
        found = []
        for request in tqdm(requests, desc="lmms-eval", unit="answer"):
            context, target, shown, document, task, split = request.args
            row = self.task_dict[task][split][document]
            answer = target if isinstance(target, str) else target(row)
            with tempfile.TemporaryDirectory() as name:
                images = saved(flat(shown(row)), Path(name), "", task)
                found.append(self._loss(context, answer, images))
        return found

    def _loss(self, question: str, answer: str, images: tuple[ImageRef, ...]) -> tuple[float, bool]:
        from mmphi.data.tokenized_dataset import tokenize_example

        model = self.model
        example = Example("0", images, (Turn(question, answer),), "lmms-eval")
        sample = tokenize_example(example, model.language.prompt, model.length, model.max_length)
        if sample is None:
            raise DataError(
                f"a question does not fit in {model.max_length} tokens: {question[:60]!r}",
                "train the model with a longer max_length",
            )
        (pack,) = packs([sample], model.sources, 4 * model.max_length, layout=model.packed.layout)
        logits, targets = model.packed.logits(to_device(pack, model.device)).float(), pack["targets"].to(model.device)
        kept = len(targets) - len(model.language.prompt.end)  # The answer without its end tokens.
        logits, targets = logits[:kept], targets[:kept]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return float(loss), bool((logits.argmax(dim=-1) == targets).all())

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mmphi answers one question at a time: choose tasks of one round")


def flat(visuals: Any) -> list[Any]:
    """A question's images, possibly nested, as one list."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [each for part in visuals for each in flat(part)]
    return [visuals]


def saved(visuals: Iterable[Any], folder: Path, prefix: str, task: str) -> tuple[ImageRef, ...]:
    """Save images as PNG files; returns their references.

    Raises:
        DataError: If one is not an image.
    """
    found = []
    for number, visual in enumerate(visuals):
        if not isinstance(visual, Image.Image):
            raise DataError(
                f"the task {task} has an input of type {type(visual).__name__}, but the model supports only images",
                "choose an image task",
            )
        path = folder / f"{prefix}{number}.png"
        as_rgb(visual).save(path)
        found.append(ImageRef(path.name, path))
    return tuple(found)


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first stop string, stripped."""
    for stop in until:
        text = text.partition(stop)[0]
    return text.strip()
