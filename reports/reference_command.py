"""``mmphi reference``: measures the loss of a model on a text, and stores it for reports."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmphi.config.arguments import CommandParser
from mmphi.errors import DataError
from reports.references import FOLDER, WIKITEXT2


def reference(arguments: Sequence[str]) -> int:
    """``mmphi reference``."""
    parser = CommandParser(
        prog="mmphi reference",
        description="Measure a language model's loss on a text, and store it with its protocol for reports.",
    )
    parser.add_argument("--lm", required=True, help="hub name or folder of a causal language model")
    parser.add_argument("--text", required=True, type=Path, help="text file, read as UTF-8")
    parser.add_argument("--name", default="", help=f"the text's name in reports [its file's; or {WIKITEXT2!r}]")
    parser.add_argument("--window", type=int, default=2048, help="tokens per window [2048]")
    parser.add_argument("--stride", type=int, default=0, help="tokens from one window to the next [the window]")
    parser.add_argument("--tail", action="store_true", help="count the last, shorter window too")
    parser.add_argument("--max-windows", type=int, default=0, help="maximum number of windows to score [all]")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "8bit", "4bit"))
    parser.add_argument("--revision", default="", help="of a hub model [the newest]")
    parser.add_argument("--out", type=Path, default=FOLDER / "measured", help="folder to store it in")
    options = parser.parse_args(list(arguments))
    found = measure_reference(options)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', found['model'] + '-' + found['text'])}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['model']} on {found['text']}: {found['loss_nats_per_token']:.4f} nats/token", end=", ")
    print(f"perplexity {found['perplexity']:.3f}, {found['bits_per_byte']:.4f} bits/byte of {found['tokens']:,} tokens")
    print(f"protocol: {found['protocol']}\n{file}")
    return 0


def measure_reference(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the loss; returns it with its protocol, hardware and command.

    Args:
        options: Parsed options of ``mmphi reference``.

    Raises:
        DataError: If the text cannot be read, or the window or stride is invalid.
    """
    if options.window < 2 or not 0 <= options.stride <= options.window:
        raise DataError(
            f"--window {options.window} --stride {options.stride}", "give 2 <= window, 0 <= stride <= window"
        )
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{options.text} cannot be read: {error}", "give a text file in UTF-8") from error
    import torch
    from tqdm.auto import tqdm

    from mmphi.config import LanguageSettings
    from mmphi.data.content_hash import file_digest
    from mmphi.evaluation.perplexity import PerplexityProtocol, text_loss
    from mmphi.models.device import this_device
    from mmphi.models.language.language_model import load_language_model

    precision = options.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    settings = LanguageSettings(model=options.lm, precision=precision, revision=options.revision)
    language = load_language_model(settings, None, this_device())
    most = int(getattr(language.model.config, "max_position_embeddings", 0) or options.window)
    window = min(options.window, most)
    protocol = PerplexityProtocol(window, options.stride or window, options.tail, options.max_windows)
    with tqdm(desc=options.lm, unit="tok", unit_scale=True) as bar:
        found = text_loss(language.model, language.tokenizer, text, protocol, bar.update)
    named = options.name or (WIKITEXT2 if options.text.name == "wikitext2-raw-test.txt" else options.text.name)
    local = Path(options.lm)
    model = local.name if local.is_dir() else options.lm  # Stored files must not contain local paths.
    command = f"mmphi reference --lm {model} --text {options.text.name} --window {window} --stride {protocol.stride}"
    return {
        "model": model,
        "model_digest": language.digest,
        "text": named,
        "text_sha256": file_digest(options.text),
        "protocol": str(protocol),
        "precision": precision,
        "loss_nats_per_token": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "measured": datetime.now(UTC).date().isoformat(),
        "command": command + (" --tail" if options.tail else "") + f" --precision {precision}",
    }
