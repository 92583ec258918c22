"""One projector step, side by side: the usual way in transformers, and here.

The same language model, vision tower, projector, images and captions:

- ``llava``: transformers' LlavaForConditionalGeneration, sequences padded to the longest, the vision tower in the loop,
  logits at every position;
- ``mmphi``: stored features, packed rows, logits only where a token is learned.

Each side runs in a process of its own, so that its peak memory is its own. Their losses are shown step by step.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIDES = ("llava", "mmphi")


@dataclass(frozen=True)
class Shape:
    """Sizes of the models and of the batch."""

    vision_width: int = 384
    vision_layers: int = 8
    image_size: int = 224
    patch_size: int = 32
    width: int = 384
    layers: int = 6
    vocabulary: int = 32000
    batch_size: int = 16
    shortest: int = 6
    longest: int = 120
    dtype: str = "fp32"


SHAPES = {
    "small": Shape(),
    "tiny": Shape(32, 2, 64, 32, 32, 2, 300, 4, 3, 12),
    "phi2": Shape(1024, 24, 336, 14, 2560, 32, 51200, 16, 10, 400, "bf16"),
}


def captions(shape: Shape, steps: int) -> list[list[list[int]]]:
    """Token ids of the captions of every step; lengths are spread evenly on a log scale, as mixed sources are."""
    import numpy as np

    rng = np.random.default_rng(0)
    spread = np.geomspace(shape.shortest, shape.longest, shape.batch_size).astype(int)
    return [[rng.integers(3, shape.vocabulary, n).tolist() for n in rng.permutation(spread)] for _ in range(steps)]


def build(shape: Shape, device: Any) -> Any:
    """A LLaVA with random weights; everything but its projector is frozen."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_width // 64),
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    text = PhiConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 80 if shape.width % 80 == 0 else shape.width // 32),
        max_position_embeddings=2048,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=2))
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float32
    model.to(device=device, dtype=dtype)
    model.model.multi_modal_projector.float()
    return model


def llava_steps(model: Any, shape: Shape, steps: int, device: Any) -> tuple[list[float], list[float]]:
    """Losses and seconds of steps taken the usual way."""
    import torch

    images = (shape.image_size // shape.patch_size) ** 2
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=1e-3, weight_decay=0.0)
    losses, seconds = [], []
    for step, batch in enumerate(captions(shape, steps)):
        pixels = torch.randn(len(batch), 3, shape.image_size, shape.image_size, generator=_images(step)).to(device)
        begun = time.perf_counter()
        longest = max(map(len, batch)) + images + 2
        ids = torch.ones(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, caption in enumerate(batch):
            sequence = [1, *[2] * images, *caption, 1]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            labels[row, images + 1 : len(sequence)] = torch.tensor(sequence[images + 1 :])
            mask[row, : len(sequence)] = 1
        with torch.autocast(device.type, torch.bfloat16, enabled=shape.dtype == "bf16"):
            loss = model(
                input_ids=ids.to(device),
                pixel_values=pixels.to(next(model.model.vision_tower.parameters()).dtype),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
                use_cache=False,
            ).loss
        _finish(loss, optimizer)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    return losses, seconds


def mmphi_steps(model: Any, shape: Shape, steps: int, device: Any) -> tuple[list[float], list[float]]:
    """Losses and seconds of the same steps taken here; features are stored before, as the ``embed`` stage does."""
    import numpy as np
    import torch

    from mmphi.models.packed import PackedModel
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.text.packing import pack, to_device
    from mmphi.text.sequences import Sample, Span

    stored: dict[str, torch.Tensor] = {}

    class Stored:
        tokens, width = (shape.image_size // shape.patch_size) ** 2, shape.vision_width

        def length(self, image: str, /) -> int:
            return self.tokens

        def rows(self, images: Sequence[str], /) -> torch.Tensor:
            return torch.cat([stored[image] for image in images])

    batches = captions(shape, steps)
    tower = model.model.vision_tower
    dtype = next(tower.parameters()).dtype
    for step, batch in enumerate(batches):
        pixels = torch.randn(len(batch), 3, shape.image_size, shape.image_size, generator=_images(step))
        with torch.inference_mode():
            hidden = tower(pixels.to(device, dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
        stored.update({f"{step}/{i}": row.half().cpu() for i, row in enumerate(hidden)})
    projector = Projector(ProjectorConfig(shape.vision_width, shape.width)).to(device)
    theirs = model.model.multi_modal_projector.state_dict()
    projector.load_state_dict(
        {
            f"layers.{ours}.{k}": theirs[f"{name}.{k}"]
            for ours, name in ((0, "linear_1"), (2, "linear_2"))
            for k in ("weight", "bias")
        }
    )
    language = _causal(model)
    model.model.vision_tower = None  # Not needed any more: it counts in neither memory nor time.
    packed = PackedModel(language, image=projector)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    losses, seconds = [], []
    for step, batch in enumerate(batches):
        begun = time.perf_counter()
        samples = []
        for i, caption in enumerate(batch):
            ids = np.array([1, *[0] * Stored.tokens, *caption, 1], np.int32)
            supervised = np.arange(len(ids)) > Stored.tokens
            samples.append(Sample(ids, supervised, (Span("image", f"{step}/{i}", 1, Stored.tokens),)))
        rows = to_device(pack(samples, {"image": Stored()}), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=shape.dtype == "bf16"):
            loss = packed(**rows) / rows["step_tokens"]
        _finish(loss, optimizer)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    return losses, seconds


def _causal(model: Any) -> Any:
    """The language model inside a LLaVA as a causal LM with the same weights."""
    from transformers import AutoModelForCausalLM

    inner = model.model.language_model
    language = AutoModelForCausalLM.from_config(inner.config, dtype=next(inner.parameters()).dtype)
    language.model = inner
    language.lm_head = model.lm_head
    return language.requires_grad_(False).eval()


def _images(step: int) -> Any:
    import torch

    return torch.Generator().manual_seed(step)


def _finish(loss: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def run_side(side: str, shape: Shape, steps: int) -> dict[str, Any]:
    """Run one side in this process."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(shape, device)
    losses, seconds = (llava_steps if side == "llava" else mmphi_steps)(model, shape, steps, device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_rss()
    supervised = sum(len(c) + 1 for c in captions(shape, steps)[-1])
    middle = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return {"losses": losses, "tokens_per_s": supervised / middle, "seconds": middle, "memory_gb": memory / 1e9}


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> int:
    """``mmphi benchmark projector``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark projector", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="sizes of models and batch [small]")
    parser.add_argument("--steps", type=int, default=6, help="steps of each side, the first for warming up [6]")
    parser.add_argument("--rounds", type=int, default=2, help="how often both sides run, in turn [2]")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    if options.side:
        options.json.write_text(json.dumps(run_side(options.side, shape, options.steps)))
        return 0
    rounds_of: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for side in SIDES:
                out = Path(folder) / f"{side}{number}.json"
                command = [sys.executable, "-m", "mmphi", "benchmark", "projector", "--side", side]
                command += ["--shape", options.shape, "--steps", str(options.steps), "--json", str(out)]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
                rounds_of[side].append(json.loads(out.read_text()))
    report(rounds_of, shape)
    if options.json:
        options.json.write_text(json.dumps({"shape": asdict(shape), **rounds_of}, indent=1))
    return 0


def report(rounds_of: dict[str, list[dict[str, Any]]], shape: Shape) -> None:
    """Print both sides and their ratios, each round against its own neighbour."""
    print(f"batch of {shape.batch_size} captions of {shape.shortest} to {shape.longest} tokens, {shape.dtype}")
    print(f"{'side':<8}{'supervised tok/s':>18}{'s/step':>10}{'peak GB':>10}")
    for side, rounds in rounds_of.items():
        best = max(rounds, key=lambda r: r["tokens_per_s"])
        print(f"{side:<8}{best['tokens_per_s']:>18.0f}{best['seconds']:>10.3f}{best['memory_gb']:>10.2f}")
    pairs = list(zip(rounds_of["mmphi"], rounds_of["llava"], strict=True))
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    print(f"speed, mmphi over llava: {', '.join(f'{r:.2f}' for r in ratios)}")
    print(f"losses llava: {', '.join(f'{x:.4f}' for x in rounds_of['llava'][0]['losses'])}")
    print(f"losses mmphi: {', '.join(f'{x:.4f}' for x in rounds_of['mmphi'][0]['losses'])}")
