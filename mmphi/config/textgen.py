"""The sections of text generation by a language model, and of the corpus store."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import Section, setting


class TextgenSettings(Section):
    """Text generation: model, prompts, sampling, generator processes and spool.

    Default values are left out of cache keys, so that the key of a training on files does not depend on this section.
    """

    model: str = setting(
        "microsoft/phi-2", "hub name or folder of the model that writes", file="name", legacy_default="microsoft/phi-2"
    )
    revision: str = setting(
        "", "revision of a hub model; empty takes the newest, and notes which that was", legacy_default=""
    )
    tokenizer: str = setting(
        "",
        "hub name, folder or phi-2 (built offline); empty takes the model's own",
        file="name",
        names=("phi-2",),
        legacy_default="",
    )
    precision: Literal["fp32", "bf16", "8bit", "4bit"] = setting("fp32", "weights of the model", legacy_default="fp32")
    prompted: float = setting(
        0.5,
        "share of the documents that are asked for by a prompt; the others follow the begin of text",
        ge=0,
        le=1,
        legacy_default=0.5,
    )
    temperature: float = setting(
        1.0, "logits are divided by it; 1 draws from the model itself", gt=0, le=10, legacy_default=1.0
    )
    top_p: float = setting(
        1.0, "draw only from the likeliest tokens with this share; 1 from all", gt=0, le=1, legacy_default=1.0
    )
    top_k: int = setting(0, "draw only from so many likeliest tokens; 0 from all", ge=0, legacy_default=0)
    max_tokens: int = setting(512, "longest document", unit="tokens", ge=1, legacy_default=512)
    seed: int = setting(0, "seed of prompts and samples", ge=0, legacy_default=0)
    stop: str = setting(
        "store", "stop criterion: store (store is full), documents 1k, tokens 2M, time 20m", legacy_default="store"
    )
    store_only: bool = setting(False, "write nothing: fill the store from corpus.sources", legacy_default=False)
    generators: int = setting(
        -1,
        "processes that write on this machine; -1 takes one per GPU, or per two cores; 0 none: others fill the spool",
        unit="processes",
        ge=-1,
        affects_key=False,
    )
    backend: Literal["auto", "transformers", "slots", "vllm"] = setting(
        "auto", "generation backend; auto: vLLM on a GPU if it is installed, else transformers", affects_key=False
    )
    batch: int = setting(16, "documents that a generator writes at once", unit="documents", affects_key=False, ge=1)
    shard_documents: int = setting(32, "documents of a shard", unit="documents", affects_key=False, ge=1)
    spool: str = setting(
        "", "folder or fsspec URL of the spool; empty takes one in the run's folder", affects_key=False
    )
    spool_mb: float = setting(
        64.0, "largest size of the spool; generators pause when it is full", unit="MB", affects_key=False, gt=0
    )
    ray: str = setting(
        "", "Ray cluster that writes: HOST:PORT, auto or local; empty takes this machine alone", affects_key=False
    )
    host: str = setting(
        "", "name of this machine among those that write into one spool; empty makes one up", affects_key=False
    )


class StoreSettings(Section):
    """Corpus store of filtered and deduplicated text, of limited size."""

    megabytes: float = setting(100.0, "largest compressed size of the store", unit="MB", gt=0)
    min_words: int = setting(50, "shortest document", unit="words", ge=1, formerly="shortest")
    max_words: int = setting(100_000, "longest document", unit="words", ge=1, formerly="longest")
    language: str = setting("eng", "language of the documents, by its ISO 639-3 code")
