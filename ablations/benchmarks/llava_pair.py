"""The same models and trainings in two formats: for mmphi, and for a script with transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATES, SEEDS = ("0.001", "0.003"), 4  # Learning rates, each trained at this number of seeds.
IMAGE_TOKEN, PAD = 50300, 50301  # Rows of Phi-2's embedding that its tokenizer does not use.


@dataclass(frozen=True)
class Shape:
    """Sizes of the models, trainings and data; image and patch sizes in pixels."""

    width: int = 256
    layers: int = 4
    vision_width: int = 384
    vision_layers: int = 8
    image_size: int = 224
    patch_size: int = 16
    steps: int = 24
    batch_size: int = 8
    images: int = 200
    test_images: int = 4


def make_models(folder: Path, shape: Shape) -> dict[str, Any]:
    """Save a language model and a vision encoder with random weights, in the formats of mmphi and of transformers.

    Args:
        folder: Folder to write to.
        shape: Sizes of the models.

    Returns:
        Preprocessing configuration of the vision encoder (open_clip's ``preprocess_cfg``).
    """
    import open_clip
    import torch
    from safetensors.torch import save_file
    from transformers import PhiForCausalLM

    from mmphi.models.language.phi import phi_config
    from mmphi.models.vision.clip_vision import clip_vision
    from mmphi.text.tokenizer import phi2_tokenizer

    torch.manual_seed(0)
    tokenizer = phi2_tokenizer()
    config = phi_config(shape.layers, shape.width, max(1, shape.width // 32), 512, 51200, tokenizer.eos_token_id)
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
    clip_vision(clip.visual).save_pretrained(folder / "vision")
    return dict(clip.visual.preprocess_cfg)


def fixed_settings(folder: Path, shape: Shape) -> dict[str, Any]:
    """Settings of mmphi that all trainings share, by dotted name."""
    return {
        "scenes.train_images": shape.images,
        "scenes.validation_images": 2,
        "scenes.test_images": shape.test_images,
        "scenes.texts": 4,
        "scenes.image_size": 64,
        "vision.model": str(folder / "benchmark-vit.json"),
        "vision.pretrained": str(folder / "vision.safetensors"),
        "language.model": str(folder / "language"),
        "projector.optimizer": "adamw",
        "projector.width": 0,
        "projector.norm": False,
        "projector.alignment_steps": 0,
        "projector.steps": shape.steps,
        "projector.batch_size": shape.batch_size,
        "projector.max_length": 320,
        "projector.log_every": 1,
        "projector.eval_every": shape.steps,
        "projector.save_every": shape.steps,
        "projector.sample_images": 0,
        "evaluate.yes_no": 0,
        "evaluate.held_out_phrasings": False,
        "evaluate.max_new_tokens": 1,
    }


def write_work(folder: Path, fixed: Mapping[str, Any], preprocess: Mapping[str, Any], shape: Shape) -> list[Path]:
    """Write the input files of the script, one per training, by seed, then learning rate; returns their paths."""
    import torch
    from safetensors.torch import save_file

    from ablations.study import settings_of
    from mmphi.data.dataset_builder import read_examples
    from mmphi.data.mixture import mixture_indices
    from mmphi.data.tokenized_dataset import tokenize_example, tokenized_examples
    from mmphi.models.language.language_model import load_language_model
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES
    from mmphi.training.packed_dataset import PackedStepDataset

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
            language = load_language_model(settings.language, None, torch.device("cpu"))
            conversations = language.prompt, lambda _: tokens, chosen.max_length
            sequences = tokenized_examples([e for e in examples if e.split == "train"], *conversations)
            places = mixture_indices(sequences.sources, settings.data)
            order = PackedStepDataset(
                [sequences[place] for place in places],
                {},
                steps=chosen.steps,
                batch_size=chosen.batch_size,
                packs_per_step=1,
                seed=seed,
            )
            test = [tokenize_example(e, *conversations) for e in examples if e.split == "test"]
            torch.manual_seed(seed)
            weights = Projector(ProjectorConfig(shape.vision_width, shape.width)).state_dict()
            path = folder / f"work{len(made)}.json"
            save_file(weights, path.with_suffix(".safetensors"))
            work = {
                "language": str(folder / "language"),
                "vision": str(folder / "vision"),
                "projector": str(path.with_suffix(".safetensors")),
                "preprocess": preprocess,
                "image_token": IMAGE_TOKEN,
                "pad": PAD,
                "learning_rate": float(rate),
                "warmup": chosen.warmup_ratio,
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
