"""``mmphi benchmark ablation``: a study of eight trials, beside eight cold runs, beside eight runs of a usual script.

All three train the same projectors: the same frozen models, images, texts, order, first weights and steps.

- ``study``: `mmphi ablate` with one worker, which keeps models, features and encoded texts from trial to trial;
- ``cold``: `mmphi projector --force`, a process a training;
- ``script``: transformers' LLaVA as its documentation has it (`ablations/llava_script.py`), a process a training.

What all of them stand on (drawn images, stored features) is made before; the study's own time to embed is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RATES, SEEDS = ("0.001", "0.003"), 4
STUDY = """from ablations.study import Study
STUDY = Study(question="Which rate?", factor="projector.learning_rate", levels={levels}, baseline="{baseline}",
              seeds={seeds}, fixed={fixed})
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of models and trainings."""

    width: int = 256
    layers: int = 4
    vision_width: int = 384
    vision_layers: int = 8
    image_size: int = 224
    patch_size: int = 32
    steps: int = 24
    batch_size: int = 16
    images: int = 300
    test_images: int = 16


SHAPES = {
    "small": Shape(),
    "tiny": Shape(64, 1, 64, 2, 64, 32, 3, 4, 40, 4),
}


def make_models(folder: Path, shape: Shape) -> dict[str, Any]:
    """A language model and an image tower with random weights, each as mmphi and as transformers reads it."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel, PhiForCausalLM

    from mmphi.models.language import phi_config
    from mmphi.text.tokenizer import phi2_tokenizer

    torch.manual_seed(0)
    tokenizer = phi2_tokenizer()
    config = phi_config(shape.layers, shape.width, max(1, shape.width // 64), 512, 51200, tokenizer.eos_token_id)
    PhiForCausalLM(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    heads = 64 if shape.vision_width % 64 == 0 else 32
    vision = {"image_size": shape.image_size, "layers": shape.vision_layers, "width": shape.vision_width}
    vision |= {"patch_size": shape.patch_size, "head_width": heads}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    path = folder / "benchmark-vit.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    clip = open_clip.create_model("benchmark-vit")
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "vision.safetensors")
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_width // heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            hidden_act="gelu",
        )
    )
    renamed = as_transformers(clip.visual.state_dict(), shape.vision_layers)
    known = set(theirs.state_dict())
    prefix = "" if "embeddings.class_embedding" in known else "vision_model."
    theirs.load_state_dict({prefix + k: v for k, v in renamed.items()}, strict=False)
    theirs.save_pretrained(folder / "vision")
    return dict(clip.visual.preprocess_cfg)


def as_transformers(weights: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Weights of open_clip's ViT under the names that transformers' CLIPVisionModel has for them."""
    named = {
        "embeddings.class_embedding": weights["class_embedding"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "embeddings.patch_embedding.weight": weights["conv1.weight"],
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        named |= {f"{theirs}.{part}": weights[f"{ours}.{part}"] for part in ("weight", "bias")}
    pairs = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer in range(layers):
        before, after = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for part in ("weight", "bias"):
            for ours, theirs in pairs.items():
                named[f"{after}.{theirs}.{part}"] = weights[f"{before}.{ours}.{part}"]
            thirds = weights[f"{before}.attn.in_proj_{part}"].chunk(3)
            for name, third in zip("qkv", thirds, strict=True):
                named[f"{after}.self_attn.{name}_proj.{part}"] = third
    return named


def fixed_settings(folder: Path, shape: Shape) -> dict[str, Any]:
    """What all trainings have in common, as settings of mmphi."""
    return {
        "scenes.train_images": shape.images,
        "scenes.validation_images": 4,
        "scenes.test_images": shape.test_images,
        "scenes.texts": 4,
        "scenes.image_size": 64,
        "vision.model": str(folder / "benchmark-vit.json"),
        "vision.pretrained": str(folder / "vision.safetensors"),
        "language.model": str(folder / "language"),
        "projector.optimizer": "adamw",
        "projector.width": 0,
        "projector.norm": False,
        "projector.steps": shape.steps,
        "projector.batch_size": shape.batch_size,
        "projector.max_length": 256,
        "projector.log_every": 1,
        "projector.eval_every": shape.steps,
        "projector.save_every": shape.steps,
        "projector.sample_images": 0,
        "evaluate.yes_no": 0,
        "evaluate.max_new_tokens": 1,
    }


def write_work(folder: Path, fixed: Mapping[str, Any], preprocess: Mapping[str, Any], shape: Shape) -> list[Path]:
    """What the script is to train, a file a training, in the order of the study's trials."""
    import torch
    from safetensors.torch import save_file

    from ablations.study import settings_of
    from mmphi.data.encoded import encode_example, encoded
    from mmphi.data.read import mixture, read_examples
    from mmphi.models.language import load_language
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES
    from mmphi.training.steps import PackedSteps

    made: list[Path] = []
    tokens = (shape.image_size // shape.patch_size) ** 2
    for seed in range(SEEDS):
        for rate in RATES:
            changes = {**fixed, "projector.seed": seed, "projector.learning_rate": rate}
            settings = settings_of("tiny", changes, "projector")
            pipeline, chosen = Pipeline(STAGES), settings.projector
            scenes = pipeline.result("scenes", settings)
            assert scenes is not None
            examples, _ = read_examples(settings.data, scenes.path)
            language = load_language(settings.language, None, torch.device("cpu"))
            conversations = language.prompt, lambda _: tokens, chosen.max_length
            sequences = encoded([e for e in examples if e.split == "train"], *conversations)
            places = mixture(sequences.sources, settings.data)
            order = PackedSteps(
                [sequences[place] for place in places],
                {},
                steps=chosen.steps,
                batch_size=chosen.batch_size,
                packs_per_step=1,
                seed=seed,
            )
            test = [encode_example(e, *conversations) for e in examples if e.split == "test"]
            torch.manual_seed(seed)
            weights = Projector(ProjectorConfig(shape.vision_width, shape.width)).state_dict()
            path = folder / f"work{len(made)}.json"
            save_file(weights, path.with_suffix(".safetensors"))
            work = {
                "language": str(folder / "language"),
                "vision": str(folder / "vision"),
                "projector": str(path.with_suffix(".safetensors")),
                "preprocess": preprocess,
                "image_token": 50300,  # A row of the embedding that no text uses.
                "pad": 50301,
                "learning_rate": float(rate),
                "warmup": chosen.warmup,
                "steps": [[_row(s) for s in order.step(step)] for step in range(chosen.steps)],
                "test": [_row(s) for s in test if s is not None],
            }
            path.write_text(json.dumps(work))
            made.append(path)
    return made


def _row(sample: Any) -> dict[str, Any]:
    (span,) = sample.spans
    return {
        "ids": sample.input_ids.tolist(),
        "supervised": sample.supervised.tolist(),
        "image": str(span.reference.path),
        "image_at": [span.start, span.length],
    }


def timed(command: Sequence[str], log: Path) -> float:
    """Seconds that a command takes.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    begun = time.perf_counter()
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} failed: {log.read_text()[-2000:]}")
    return time.perf_counter() - begun


def curves(metric: str = "train/loss") -> list[list[float]]:
    """Losses of the newest finished run of every trial, seed by seed, rate by rate."""
    from mmphi.tracking.store import Store

    store, found = Store(), []
    for seed in range(SEEDS):
        for rate in RATES:
            runs = (
                run
                for run in store.search("FINISHED", stage="projector")
                if run.data.params["projector.seed"] == str(seed)
                and float(run.data.params["projector.learning_rate"]) == float(rate)
            )
            run = next(runs)
            history = {m.step: m.value for m in store.client.get_metric_history(run.info.run_id, metric)}
            found.append([*(history[step] for step in sorted(history)), run.data.metrics["test/loss"]])
    return found


def measure(folder: Path, shape: Shape) -> dict[str, Any]:
    """Run all three sides, one after the other; seconds and losses of each."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ.pop("MLFLOW_RUN_ID", None)
    log, fixed = folder / "log.txt", fixed_settings(folder, shape)
    preprocess = make_models(folder, shape)
    study = folder / "rates.py"
    levels = {rate: float(rate) for rate in RATES}
    study.write_text(STUDY.format(levels=levels, baseline=RATES[0], seeds=SEEDS, fixed=fixed))
    mmphi = [sys.executable, "-m", "mmphi"]
    options = [word for name, value in fixed.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    embedding = timed([*mmphi, "embed", *options], log)
    work = write_work(folder, fixed, preprocess, shape)
    seconds = {"study": [timed([*mmphi, "ablate", str(study), "--workers", "1"], log)], "cold": [], "script": []}
    losses = {"study": curves()}
    script = str(Path(__file__).with_name("llava_script.py"))
    for number, path in enumerate(work):
        seed, rate = divmod(number, len(RATES))
        trial = ["--projector.seed", str(seed), "--projector.learning_rate", RATES[rate], "--force"]
        seconds["cold"].append(timed([*mmphi, "projector", *options, *trial], log))
        seconds["script"].append(timed([sys.executable, script, str(path)], log))
    losses["cold"] = curves()
    outputs = [json.loads(path.with_suffix(".out.json").read_text()) for path in work]
    losses["script"] = [[*out["losses"], out["test"]] for out in outputs]
    return {"seconds": {side: sum(of) for side, of in seconds.items()}, "losses": losses, "embedding": embedding}


def furthest(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between losses of the same step of the same trial."""
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def main(arguments: list[str]) -> int:
    """``mmphi benchmark ablation``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark ablation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="sizes of all [small]")
    parser.add_argument("--steps", type=int, help="optimiser steps of a training")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    shape = replace(shape, steps=options.steps) if options.steps else shape
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), shape)
    report(found, shape)
    if options.json:
        options.json.write_text(json.dumps({"shape": asdict(shape), **found}, indent=1))
    return 0


def report(found: Mapping[str, Any], shape: Shape) -> None:
    """Print the three sides, their ratios, and how far their losses lie apart."""
    seconds, losses = found["seconds"], found["losses"]
    trials = len(RATES) * SEEDS
    print(f"{trials} trainings of {shape.steps} steps of {shape.batch_size} images, and the test loss of each")
    print(f"{'side':<8}{'seconds':>10}{'over study':>12}{'largest difference of a loss':>32}")
    for side in ("study", "cold", "script"):
        apart = furthest(losses["study"], losses[side])
        print(f"{side:<8}{seconds[side]:>10.1f}{seconds[side] / seconds['study']:>12.2f}{apart:>32.2g}")
    print(f"embedding all images once, which the script does anew every step: {found['embedding']:.1f} s")
    for number in range(trials):
        ends = ", ".join(f"{side} {losses[side][number][-1]:.5f}" for side in ("study", "cold", "script"))
        print(f"trial {number}: test loss {ends}")
