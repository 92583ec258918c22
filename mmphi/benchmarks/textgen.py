"""Tokens generated per second by several samplers, with the same model, prompts and length limit.

- ``generate``: transformers' ``generate`` in a loop; every batch runs until its longest text ends;
- ``transformers``: transformers' continuous batching;
- ``slots``: mmphi's continuous batching for CPUs;
- ``vllm``: vLLM, if it is installed and there is a GPU.

``generate`` and the sampler that ``mmphi textgen`` would choose here also run in several processes at once. Each side
is compared with ``generate`` in the same number of processes. Each process loads its own model; only the sampling is
timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmphi.errors import SettingsError

Figures = dict[str, float]


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = argparse.ArgumentParser(
        prog="mmphi benchmark textgen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="", help="folder or hub name of who writes [random weights]")
    made.add_argument("--documents", type=int, default=64, help="texts of each side in each round [64]")
    made.add_argument("--max_tokens", type=int, default=512, help="longest text, in tokens [512]")
    made.add_argument("--batch", type=int, default=16, help="texts at once in each process [16]")
    made.add_argument("--processes", type=int, default=2, help="processes of the sides that run in several [2]")
    made.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    made.add_argument("--without", nargs="*", default=[], help="sides that are left out [none]")
    made.add_argument("--json", type=Path, help="file for all figures")
    made.add_argument("--side", default="", help=argparse.SUPPRESS)
    made.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark textgen``."""
    options = parser().parse_args(list(arguments))
    if "generate" in options.without:
        raise SettingsError("the other sides are compared with `generate`", "leave other sides out")
    if min(options.documents, options.batch, options.processes, options.max_tokens, options.rounds) < 1:
        raise SettingsError("each number is one at least")
    if options.side:
        print(json.dumps(run_side(options)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        options.model = options.model or random_model(Path(name))
        sides = {
            name: (sampler, processes)
            for name, (sampler, processes) in sides_here(options.processes).items()
            if name not in options.without and sampler not in options.without
        }
        found: dict[str, list[Figures]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, (backend, processes) in sides.items():
                found[side].append(measured(options, backend, processes))
    show(found, {name: processes for name, (_, processes) in sides.items()})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def sides_here(processes: int) -> dict[str, tuple[str, int]]:
    """Sampler and number of processes of each side that can run on this machine, by name."""
    import torch

    from mmphi.textgen.backends import choose_backend

    chosen, _ = choose_backend("auto")
    gpu = torch.cuda.is_available()
    kinds = ["generate", "transformers", *["slots"] * (not gpu), *["vllm"] * (chosen == "vllm")]
    sides = {kind: (kind, 1) for kind in kinds}
    if processes > 1:
        sides |= {f"{kind} x {processes}": (kind, processes) for kind in dict.fromkeys(("generate", chosen))}
    return sides


def random_model(folder: Path) -> str:
    """Write a small Phi with random weights, whose texts end after :data:`ENDS_AFTER` tokens on average."""
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.language.phi import size_config
    from mmphi.text.tokenizer import phi2_tokenizer

    tokenizer = phi2_tokenizer()
    torch.manual_seed(0)
    model = PhiForCausalLM(size_config("10M", 1024, 51200, tokenizer.eos_token_id))
    head = model.get_output_embeddings()
    with torch.no_grad():  # Raises the logit of the end; the mean of the others is almost 0.
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = torch.log(torch.tensor(51200 / ENDS_AFTER))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ENDS_AFTER = 50.0


def measured(options: argparse.Namespace, backend: str, processes: int) -> Figures:
    """Run one side in separate processes; returns their joint tokens per second and their total memory."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    running = []
    for number in range(processes):
        command = [sys.executable, "-m", "mmphi", "benchmark", "textgen", "--side", backend, "--model", options.model]
        command += ["--share", f"{number}/{processes}"]
        for name in ("documents", "max_tokens", "batch"):
            command += [f"--{name}", str(getattr(options, name))]
        own = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own))
    found: list[Figures] = []
    for process in running:
        out, problem = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
            raise RuntimeError(f"{backend}: {problem[-2000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return {
        "tokens_per_s": sum(each["tokens"] for each in found) / max(each["seconds"] for each in found),
        "tokens": sum(each["tokens"] for each in found),
        "memory_gb": sum(each["memory_gb"] for each in found),
    }


def run_side(options: argparse.Namespace) -> Figures:
    """Tokens, seconds and peak memory of one process."""
    import torch

    from mmphi.config.shared import LanguageSettings
    from mmphi.config.textgen import TextgenSettings
    from mmphi.models.device import this_device
    from mmphi.models.language.language_model import load_language_model
    from mmphi.textgen.backends import SamplingConfig, make_sampler
    from mmphi.textgen.generator import PromptStream
    from mmphi.training.throughput import peak_memory_bytes

    number, processes = map(int, options.share.split("/"))
    settings = TextgenSettings(model=options.model, max_tokens=options.max_tokens)
    language = load_language_model(LanguageSettings(model=options.model), None, this_device())
    endless = iter(PromptStream(settings, f"benchmark-{number}", language))
    requests = [next(endless) for _ in range(max(options.batch, options.documents // processes))]
    longest = options.max_tokens + max(len(each.ids) for each in requests)
    torch.manual_seed(number)
    begun = time.perf_counter()
    if options.side == "generate":
        tokens = _generate(language, requests, options.batch)
    else:
        model = language.model if options.side != "vllm" else options.model
        write = make_sampler(options.side, model, SamplingConfig(seed=number), options.batch, longest)
        if options.side == "vllm":
            begun = time.perf_counter()  # vLLM has loaded its model in `make_sampler`; that is not timed.
        tokens = sum(len(each.ids) for each in write(iter(requests)))
    seconds = time.perf_counter() - begun
    return {"tokens": float(tokens), "seconds": seconds, "memory_gb": peak_memory_bytes() / 1e9}


def _generate(language: Any, requests: Sequence[Any], batch: int) -> int:
    """Generate in batches; returns the number of tokens up to the end of each text."""
    import torch

    model, end = language.model, requests[0].ends
    tokens = 0
    for first in range(0, len(requests), batch):
        group = requests[first : first + batch]
        width = max(len(each.ids) for each in group)
        ids = torch.tensor([[end[0]] * (width - len(each.ids)) + list(each.ids) for each in group])
        mask = torch.tensor([[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in group])
        with torch.inference_mode():
            made = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=group[0].longest,
                eos_token_id=list(end),
                pad_token_id=end[0],
            )
        for row in made[:, width:].tolist():
            tokens += next((place + 1 for place, token in enumerate(row) if token in end), len(row))
    return tokens


def show(found: Mapping[str, Sequence[Figures]], processes: Mapping[str, int]) -> None:
    """Print a table: medians of the rounds, and the ratio to ``generate`` in the same number of processes.

    Args:
        found: Measurements of each round, by side.
        processes: Number of processes, by side.
    """

    def median(side: str, name: str) -> float:
        return float(statistics.median(each[name] for each in found[side]))

    usual = {processes[side]: median(side, "tokens_per_s") for side in found if side.partition(" ")[0] == "generate"}
    print(f"{'side':18} {'processes':>9} {'tokens/s':>9} {'of generate':>12} {'tokens':>8} {'memory':>9}")
    for side in found:
        rate, count = median(side, "tokens_per_s"), processes[side]
        tokens, memory = median(side, "tokens"), median(side, "memory_gb")
        ratio = f"{rate / usual[count]:.2f}x" if count in usual else ""
        print(f"{side:18} {count:9} {rate:9.1f} {ratio:>12} {tokens:8,.0f} {memory:6.2f} GB")
