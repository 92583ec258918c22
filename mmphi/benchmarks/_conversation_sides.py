"""Training on conversations about images, with transformers and with mmphi, for the benchmarks of both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.benchmarks._conversations import Shape, stored
from mmphi.benchmarks._pretrain_sides import Clock, own_settings, trainer_arguments

if TYPE_CHECKING:
    import torch

    from mmphi.models.language.language_model import LanguageModel
    from mmphi.models.projector import Projector

Row = Mapping[str, Any]
Batches = Sequence[Sequence[Row]]


def loaded_llava(folder: Path, dtype: torch.dtype, *, quantised: bool) -> Any:
    """Load transformers' LLaVA on this machine's accelerator; if ``quantised``, its language model in NF4.

    On a GPU it uses flash attention if the package flash-attn is installed, otherwise torch's SDPA.
    """
    import torch
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
    from transformers.utils import is_flash_attn_2_available

    from mmphi.models.device import this_device

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": this_device()}}
    if torch.cuda.is_available() and is_flash_attn_2_available():  # As LLaVA's own script does.
        options["attn_implementation"] = "flash_attention_2"
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    return LlavaForConditionalGeneration.from_pretrained(folder / "llava", **options)


def usual_way(
    model: Any,
    folder: Path,
    shape: Shape,
    batches: Batches,
    *,
    rate: float,
    compiled: bool = False,
    workers: int = 0,
    watch: Sequence[Any] = (),
) -> Clock:
    """Train under transformers' Trainer; rows are padded to the longest, and the vision encoder runs in every step.

    Args:
        model: A LLaVA with trainable parameters.
        folder: Folder that ``prepare`` wrote.
        shape: Sizes of the models and the batch.
        batches: Rows of each step.
        rate: Learning rate.
        compiled: Whether torch compiles the model, in the first step, which is not timed.
        workers: Number of processes that preprocess images and pad rows.
        watch: Further callbacks of the Trainer.
    """
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image
    from transformers import AutoProcessor, Trainer

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    token, pad = model.config.image_token_index, AutoProcessor.from_pretrained(folder / "llava").tokenizer.pad_token_id
    preprocess = image_transform_v2(PreprocessCfg(size=shape.image_size), is_train=False)

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for place, row in enumerate(rows):
            sequence, learned = torch.tensor(row["ids"]), torch.tensor(row["supervised"], dtype=torch.bool)
            start, length = row["image_at"]
            sequence[start : start + length] = token
            ids[place, : len(sequence)] = sequence
            labels[place, : len(sequence)] = torch.where(learned, sequence, -100)
            mask[place, : len(sequence)] = 1
        pixels = torch.stack([preprocess(Image.open(row["image"][1]).convert("RGB")) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels.to(dtype)}

    clock = Clock()

    flat: Any = [row for batch in batches for row in batch]  # `Any`, because a list is not typed as a Dataset.

    class InOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            loader: Any = torch.utils.data.DataLoader(
                flat, batch_size=shape.batch_size, collate_fn=collate, num_workers=workers, pin_memory=cuda
            )
            return self.accelerator.prepare(loader)

    with tempfile.TemporaryDirectory() as out:
        own = {"per_device_train_batch_size": shape.batch_size, "gradient_checkpointing": shape.recompute}
        arguments = trainer_arguments(out, len(batches), rate, bf16=cuda, torch_compile=compiled, **own)
        InOrder(model=model, args=arguments, train_dataset=flat, callbacks=[clock.callback(), *watch]).train()
    return clock


def our_way(
    language: LanguageModel,
    projector: Projector,
    folder: Path,
    shape: Shape,
    batches: Batches,
    *,
    rate: float,
    compiled: bool = False,
    workers: int = 0,
    watch: Sequence[Any] = (),
) -> Clock:
    """Train as the stages do, on stored features.

    Args:
        language: Language model; an adapter on it is trained too.
        projector: Projector to train.
        folder: Folder that ``prepare`` wrote.
        shape: Sizes of the models and the batch.
        batches: Rows of each step.
        rate: Learning rate.
        compiled: Whether torch compiles the language model's layers, before the timed steps.
        workers: Number of processes that read features and pack rows.
        watch: Further callbacks of transformers' Trainer.
    """
    import numpy as np
    import torch

    from mmphi.data.schema import ImageRef
    from mmphi.models.language.compiling import compiled_layers
    from mmphi.models.multimodal import Multimodal
    from mmphi.text.tokenized_example import FeatureSpan, TokenizedExample
    from mmphi.tracking.tracker import SilentTracker
    from mmphi.training.optimizers import grouped_adamw
    from mmphi.training.packed_dataset import packed_dataset
    from mmphi.training.throughput import StepLoss
    from mmphi.training.trainer import train

    model = Multimodal(language, projector, stored(folder), shape.max_length)
    samples = [
        TokenizedExample(
            np.array(row["ids"], np.int32),
            np.array(row["supervised"], bool),
            (FeatureSpan("image", ImageRef(row["image"][0], Path(row["image"][1])), *row["image_at"]),),
        )
        for batch in batches
        for row in batch
    ]
    settings = own_settings(len(batches), rate, batch_size=shape.batch_size, workers=workers)
    taken = packed_dataset(samples, model.sources, settings, layout=model.packed.layout)
    # Not shuffled, so that the order is that of the other side.
    taken.chosen = lambda step: list(range(step * shape.batch_size, (step + 1) * shape.batch_size))
    optimizer = grouped_adamw(
        [([p for p in model.packed.parameters() if p.requires_grad], rate)], weight_decay=0.0, beta2=0.999
    )
    clock, losses = Clock(), StepLoss()

    with tempfile.TemporaryDirectory() as out, compiled_layers(model.packed, compiled, print):
        train(
            model.packed,
            taken,
            settings,
            folder=Path(out),
            tracker=SilentTracker(),
            title="mmphi",
            optimizer=optimizer,
            callbacks=[clock.callback(losses), *watch],
            step_loss=losses,
        )
    torch.cuda.empty_cache()
    return clock
