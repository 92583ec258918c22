"""The sides of ``mmphi benchmark qlora``: the same adapter on the same rows, as PEFT's pages have it, and here."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmphi.benchmarks._pretrain_sides import Clock
from mmphi.benchmarks._qlora_models import Shape, Stored, loaded_language

RATE, RANK, ALPHA = 2e-4, 16, 32
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


def peft_side(folder: Path, shape: Shape, steps: int, watch: Sequence[Any] = ()) -> Clock:
    """PEFT on transformers' LLaVA in 4 bit, under transformers' Trainer: padded rows, the image tower in the loop.

    As PEFT's page on quantisation shows it, but that it recomputes only where the shape says so: it costs a third.

    Args:
        folder: As ``prepare`` left it.
        shape: Of the models and the batch.
        steps: To train.
        watch: Callbacks of transformers' Trainer beside the clock.
    """
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from PIL import Image
    from transformers import (
        AutoProcessor,
        BitsAndBytesConfig,
        LlavaForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "llava", quantization_config=quantised, dtype=dtype, device_map={"": 0 if cuda else "cpu"}
    )
    model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]  # PEFT gives it no types.
        model, use_gradient_checkpointing=shape.recompute
    )
    torch.manual_seed(0)
    layers = "|".join(LORA_LAYERS)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=rf".*language_model.*\.({layers})",
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(model, config)
    processor = AutoProcessor.from_pretrained(folder / "llava")
    preprocess = image_transform_v2(PreprocessCfg(size=shape.image_size), is_train=False)
    token, pad = model.config.image_token_index, processor.tokenizer.pad_token_id
    each = json.loads((folder / "rows.json").read_text())[:steps]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
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

    class Ends(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                clock.step(logs["loss"])

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.ends = [time.perf_counter()]

    flat = [row for batch in each for row in batch]

    class Given(Trainer):
        def get_train_dataloader(self) -> Any:
            rows: Any = flat  # A list is no Dataset by its type, and one for the loader.
            loader: Any = torch.utils.data.DataLoader(rows, batch_size=shape.batch_size, collate_fn=collate)
            return self.accelerator.prepare(loader)

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=shape.batch_size,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            bf16=cuda,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not cuda,
            gradient_checkpointing=shape.recompute,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)
        Given(model=model, args=arguments, train_dataset=flat, callbacks=[Ends(), *watch]).train()
    return clock


def mmphi_side(folder: Path, shape: Shape, steps: int, watch: Sequence[Any] = ()) -> Clock:
    """As the stage ``qlora`` runs it, on features that were stored before, as the stage ``embed`` does.

    Args:
        folder: As ``prepare`` left it.
        shape: Of the models and the batch.
        steps: To train.
        watch: Callbacks of transformers' Trainer beside the clock.
    """
    import numpy as np
    import torch
    from transformers import TrainerCallback

    from mmphi.data.records import ImageRef
    from mmphi.models.adapter import Shape as AdapterShape
    from mmphi.models.adapter import adapted, adapter_parameters
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector
    from mmphi.settings.qlora import QloraSettings
    from mmphi.text.sequences import Sample, Span
    from mmphi.tracking.tracker import SilentTracker
    from mmphi.training.meters import StepLoss
    from mmphi.training.optimizers import grouped_adamw
    from mmphi.training.steps import packed_steps
    from mmphi.training.trainer import train

    each = json.loads((folder / "rows.json").read_text())[:steps]
    stored = Stored(folder, sorted({row["image"][1] for batch in each for row in batch}))
    language = adapted(loaded_language(folder, "4bit"), AdapterShape(RANK, ALPHA, targets=LORA_LAYERS))
    projector = Projector.load(folder)
    model = Multimodal(language, projector, stored, shape.max_length)
    samples = [
        Sample(
            np.array(row["ids"], np.int32),
            np.array(row["supervised"], bool),
            (Span("image", ImageRef(row["image"][0], Path(row["image"][1])), *row["image_at"]),),
        )
        for batch in each
        for row in batch
    ]
    settings = QloraSettings(
        steps=steps,
        batch_size=shape.batch_size,
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        save_every=10 * steps,
        eval_every=10 * steps,
        log_every=10 * steps,
    )
    taken = packed_steps(samples, model.sources, settings)
    count = len(samples)  # In the order of the other side, not shuffled.
    taken.chosen = lambda step: [i % count for i in range(step * shape.batch_size, (step + 1) * shape.batch_size)]
    adapter = list(adapter_parameters(language).values())
    optimizer = grouped_adamw([(adapter, RATE), (list(projector.parameters()), RATE)], weight_decay=0.0, beta2=0.999)
    clock, losses = Clock(), StepLoss()

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.ends = [time.perf_counter()]

        def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
            clock.step(losses.take(args.device))

    with tempfile.TemporaryDirectory() as out:
        train(
            model.packed,
            taken,
            settings,
            folder=Path(out),
            tracker=SilentTracker(),
            title="mmphi",
            optimizer=optimizer,
            callbacks=[Ends(), *watch],
            step_loss=losses,
        )
    torch.cuda.empty_cache()
    return clock
