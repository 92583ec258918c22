"""Servers of ``mmphi benchmark assistant``, each in a separate process, and their requests."""

from __future__ import annotations

import base64
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmphi.benchmarks._load import Body, Seen

START_S = 300.0
QUESTIONS = ("what is this?", "describe the picture", "who is there, and what do they do?", "which colours are there?")
LENGTHS = (16, 48, 24, 32)  # Length limits of the answers, in tokens; users do not all want equally long ones.


def bodies(images: Sequence[Path], count: int, model: str) -> list[Body]:
    """Bodies of requests, which cycle through the images and :data:`QUESTIONS`.

    Args:
        images: PNG or JPEG files.
        count: Number of requests.
        model: Name of the model in the requests.
    """
    made = []
    for number in range(count):
        image = images[number % len(images)]
        data = base64.b64encode(image.read_bytes()).decode()
        kind = "jpeg" if image.suffix.lower() in (".jpg", ".jpeg") else "png"
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}},
            {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
        ]
        length = LENGTHS[(number // len(QUESTIONS)) % len(LENGTHS)]
        request = {"messages": [{"role": "user", "content": parts}], "max_tokens": length, "temperature": 0}
        made.append({"model": model} | request)
    return made


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(command: Callable[[int], list[str]]) -> Iterator[tuple[str, int]]:
    """Run a server in a separate process; yields its address and its process ID.

    Args:
        command: Returns the command that starts the server on a port.

    Raises:
        RuntimeError: If the server ends, or does not respond within :data:`START_S` seconds.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(port), stdout=log, stderr=subprocess.STDOUT)
        try:
            begun = time.monotonic()
            while not _is_there(address):
                if process.poll() is not None or time.monotonic() - begun > START_S:
                    log.seek(0)
                    raise RuntimeError(f"{command(port)}: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield address, process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _is_there(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def mmphi_server(model: str, slots: int) -> Callable[[int], list[str]]:
    """Command of ``mmphi serve``, by port."""
    here = [sys.executable, "-m", "mmphi", "serve", "--model", model, "--slots", str(slots), "--port"]
    return lambda port: [*here, str(port)]


def transformers_server(folder: Path) -> Callable[[int], list[str]]:
    """Command of ``transformers serve`` for one model, by port."""
    there = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "auto"]
    return lambda port: [*there, "--host", "127.0.0.1", "--port", str(port)]


def generate(folder: Path, requests: Sequence[Body], batch: int) -> tuple[list[Seen], float]:
    """Answer with ``LlavaForConditionalGeneration.generate``; a batch runs until its longest answer ends.

    Args:
        folder: Folder of the exported model.
        requests: Bodies of the requests.
        batch: Number of requests in a batch.

    Returns:
        Measurements of each answer, in order, and the total time in seconds.
    """
    import io

    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from mmphi.models.device import this_device

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(this_device()).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)

    def answers(group: Sequence[Body]) -> list[Seen]:
        begun = time.perf_counter()
        texts, images = [], []
        for body in group:
            image, text = body["messages"][0]["content"]
            data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
            images.append(Image.open(io.BytesIO(data)).convert("RGB"))
            message = [{"role": "user", "content": [{"type": "image"}, text]}]
            texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
        given = processor(images=images, text=texts, add_special_tokens=False, padding=True, return_tensors="pt")
        given = given.to(model.device, model.dtype)
        watch = _First(begun)
        lengths = [body["max_tokens"] for body in group]
        with torch.inference_mode():
            made = model.generate(**given, max_new_tokens=max(lengths), do_sample=False, logits_processor=[watch])
        took = time.perf_counter() - begun
        seen = []
        for row, length in zip(made[:, given["input_ids"].shape[1] :], lengths, strict=True):
            own = row[:length]
            text = processor.decode(own, skip_special_tokens=True).strip()
            ended = torch.isin(own, ends).nonzero()
            seen.append(Seen(text, int(ended[0]) + 1 if len(ended) else len(own), watch.first_s, took))
        return seen

    answers(requests[:batch])  # Warm-up: compilation and memory allocation are not timed.
    begun = time.perf_counter()
    found = [each for i in range(0, len(requests), batch) for each in answers(requests[i : i + batch])]
    return found, time.perf_counter() - begun


class _First:
    """Logits processor that records the time of the first token."""

    def __init__(self, begun: float) -> None:
        self.begun, self.first_s = begun, 0.0

    def __call__(self, _: Any, scores: Any) -> Any:
        self.first_s = self.first_s or time.perf_counter() - self.begun
        return scores
