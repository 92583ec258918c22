"""The section of pretraining texts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from mmphi.config.section import Section, setting


class TextSourceSettings(Section):
    """One source of texts."""

    path: str = setting("", "text or JSONL file, folder of such, or a `datasets` name or folder", file="name")
    name: str = setting("", "name in reports; empty takes the file's")
    kind: Literal["auto", "text", "jsonl", "datasets"] = setting("auto", "format; auto goes by the name")
    column: str = setting("text", "column of the text in rows (jsonl, datasets)")
    separator: str = setting("", "separator between documents of a text file; empty takes each file as one document")
    encoding: str = setting("", "encoding of text files; empty takes UTF-8, or that of a byte-order mark")
    split: str = setting("train", "split of a `datasets` dataset")
    revision: str = setting("", "revision of a `datasets` name; empty takes the newest, and notes which that was")
    weight: float = setting(0.0, "share in the mixture, relative to the others; 0 for all takes each by its size", ge=0)

    @property
    def title(self) -> str:
        """Name in reports; by default the last part of the path."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class CorpusSettings(Section):
    """Texts of a pretraining, tokenised once."""

    sources: list[TextSourceSettings] = setting(
        [], "texts of the mixture, each a path or a section; none means scenes written as words", file="name"
    )
    vocabulary: int = setting(
        0, "size of an own byte-level BPE; 0 takes Phi-2's tokenizer", unit="tokens", ge=0, le=200000
    )
    validation_share: float = setting(0.01, "share of the text held out for validation", gt=0, lt=0.5)
    split_seed: int = setting(0, "seed of what is held out", ge=0)

    @field_validator("sources", mode="before")
    @classmethod
    def _paths(cls, sources: Any) -> Any:
        """Replace a bare path by a source with that path."""
        if not isinstance(sources, list):
            return sources
        return [{"path": source} if isinstance(source, str) else source for source in sources]

    @model_validator(mode="after")
    def _sources_differ(self) -> CorpusSettings:
        names = [source.title for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}; give each a name of its own")
        weighted = [source.weight > 0 for source in self.sources]
        if any(weighted) and not all(weighted):
            lacking = names[weighted.index(False)]
            raise ValueError(f"{lacking} has no weight and others have; give each one, or none")
        return self
