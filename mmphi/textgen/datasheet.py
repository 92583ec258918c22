"""Datasheet of a corpus store, after Gebru et al. 2021, "Datasheets for Datasets"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmphi.textgen.corpus_store import CorpusManifest, floors

HEAD = """# Datasheet

## Composition
"""


def datasheet(manifest: CorpusManifest, settings: Mapping[str, Any], *, run_id: str, when: str) -> str:
    """Returns the datasheet of a store, in Markdown.

    Args:
        manifest: Manifest of the store.
        settings: Settings that the store was made with.
        run_id: ID of the run that made the store.
        when: Time at which the store was finished.
    """
    judged = manifest.documents + sum(manifest.dropped.values())
    rows = [
        ("documents", f"{manifest.documents:,} of {judged:,} that were judged"),
        ("characters", f"{manifest.characters:,}"),
        ("tokens of the generator", f"{manifest.tokens:,}" if manifest.tokens else "none (imported text)"),
        ("compressed", f"{manifest.bytes / 1e6:.2f} MB in {len(manifest.shards)} shards"),
        ("digest (sha256, document after document)", f"`{manifest.digest}`"),
        ("made", f"{when}, in run `{run_id}`"),
    ]
    lines = [HEAD, "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", "Sources:", ""]
    lines += [f"- {name}: {count:,} documents" for name, count in sorted(manifest.generators.items())]
    if found := floors(manifest):
        lines += [
            "",
            "Loss of the generator on its own text in nats per token, so no student can be expected to score below it:",
            "",
        ]
        lines += [
            f"- {KINDS[kind]}: {loss:.4f}, {manifest.scored[kind]:,} tokens" for kind, loss in sorted(found.items())
        ]
    lines += ["", "## How it was made", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += ["", "## Dropped documents, by reason", ""]
    if manifest.dropped:
        lines += ["| reason | documents | such as |", "|---|---|---|"]
        for reason, count in sorted(manifest.dropped.items(), key=lambda item: -item[1]):
            shown = manifest.examples.get(reason, [])
            lines.append(f"| {reason} | {count:,} | {_example(shown[0]) if shown else ''} |")
    else:
        lines.append("Nothing.")
    lines += [
        "",
        "## Use",
        "",
        '`datasets.load_dataset("json", data_files="data/*.jsonl.zst")` reads it; so does',
        "`mmphi pretrain --source store`.",
        "Generated text reflects what is likely, not what is true: it is a source of language, not of facts. Its",
        "licence is that of the model that wrote it, or of the files it was read from.",
        "",
    ]
    return "\n".join(lines)


KINDS = {
    "free": "text without a prompt, after the begin-of-text token",
    "prompted": "text with a prompt, given the prompt",
}


def _example(shown: Mapping[str, str]) -> str:
    begin = " ".join(shown["begin"].split())[:80].replace("|", "\\|")
    of = f" (a copy of {shown['copy of']})" if "copy of" in shown else ""
    return f"`{shown['id']}`: {begin}{of}"
