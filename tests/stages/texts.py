"""Pretraining on a little text at a size that takes seconds; as a script, in a process of its own."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from builders import Recorder, context
from safetensors.torch import load_file

from mmphi.config.corpus import CorpusSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.pipeline.stage import Result
from mmphi.stages import Settings, pretrain, tokens
from mmphi.training.hf_trainer import ExactLossTrainer

SHAPE = {"layers": 2, "width": 32, "heads": 2, "context": 32, "batch_tokens": 512, "stop": "steps 24"}
REST = {
    "optimizer": "muon",
    "lr_scheduler": "wsd",
    "warmup_ratio": 0.0,
    "log_every": 4,
    "eval_every": 6,
    "save_every": 1,
}
WORDS = "one two three four five six seven eight nine ten eleven twelve and or but then so".split()  # noqa: SIM905


def write_text(path: Path, words: int = 6000) -> Path:
    """Sentences of a few words, in an order that follows their number."""
    rng = random.Random(words)
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(words // 8)))
    return path


def settings(*sources: str, corpus: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """Small settings, with others changed."""
    read = {"sources": list(sources), "vocabulary": 300, "validation_share": 0.3, **(corpus or {})}
    chosen = {**SHAPE, **REST, "learning_rate": 0.01, "prompts": ["one"], "precision": "fp32", **changes}
    return Settings(corpus=CorpusSettings(**read), pretrain=PretrainSettings(**chosen))


def tokenised(folder: Path, chosen: Settings, recorder: Recorder | None = None) -> Result:
    """The tokens of the corpus."""
    given = {"tracker": recorder} if recorder else {}
    metrics = tokens.run(context(tokens.STAGE, folder, chosen, **given))
    return Result("tokens", "key", "run", folder, metrics)


def pretrained(folder: Path, read: Result, chosen: Settings, recorder: Any = None, **given: Any) -> dict[str, float]:
    """Train, and return the figures."""
    made = context(pretrain.STAGE, folder, chosen, upstream={"tokens": read}, tracker=recorder or Recorder(), **given)
    return dict(pretrain.run(made))


def read_few(folder: Path) -> Result:
    """Tokens of a text of about three epochs of the small training."""
    return tokenised(folder / "tokens", settings(str(write_text(folder / "text.txt", 4000))))


def trained_straight(folder: Path, read: Result) -> Path:
    """The small training from beginning to end, with what it told beside its result."""
    recorder = Recorder()
    torch.set_num_threads(1)  # As in all tests; sums are taken in another order by more.
    figures = pretrained(folder, read, settings("text.txt"), recorder)
    recorder.metrics(figures)  # Names that MLflow takes.
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "lines.json").write_text(json.dumps(recorder.said))
    (folder / "losses.json").write_text(json.dumps(recorder.series("train/step_loss")))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a trained model."""
    return load_file(folder / "language" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two trained models are, to the bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    """Train in the folder given, on the tokens given; a step takes TEXTS_STEP_S seconds or more."""
    least = float(os.environ.get("TEXTS_STEP_S", "0"))
    save = ExactLossTrainer._save_checkpoint

    def slowly(self: ExactLossTrainer, model: torch.nn.Module, trial: object) -> None:
        time.sleep(least)
        save(self, model, trial)

    ExactLossTrainer._save_checkpoint = slowly
    torch.set_num_threads(1)
    folder, read, steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    print("begun", flush=True)
    chosen = settings("text.txt", stop=f"steps {steps}")
    pretrained(folder, Result("tokens", "key", "run", read), chosen)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
