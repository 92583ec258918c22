"""YAML 1.2 loader; PyYAML implements 1.1. Here ``no`` is a text, ``010`` is 10 and ``1:30`` is a text.

Numbers keep their source text, because a text setting may look like a number (a revision ``0123456``). Duplicate keys
in a mapping are errors, whereas PyYAML silently keeps the last one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class WrittenInt(int):
    """An integer with its source text."""

    text: str


class WrittenFloat(float):
    """A floating-point number with its source text."""

    text: str


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2 (section 10.3.2)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # Declared as in PyYAML.

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping without duplicate keys.

        Raises:
            yaml.YAMLError: If a key occurs twice; contains both positions.
        """
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    "in a mapping", node.start_mark, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key) if isinstance(key, str | int | float) else None
        return super().construct_mapping(node, deep=deep)


def _int(loader: Loader, node: yaml.ScalarNode) -> WrittenInt:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    made = WrittenInt(int(text[2:] if base != 10 else text, base))
    made.text = text
    return made


def _float(loader: Loader, node: yaml.ScalarNode) -> WrittenFloat:
    text = str(loader.construct_scalar(node))
    made = WrittenFloat(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    made.text = text
    return made


SCHEMA = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    (MERGE, r"<<", "<"),
)
for tag, pattern, first in SCHEMA:
    Loader.add_implicit_resolver(
        tag, re.compile(rf"^(?:{pattern})$"), [*first.replace("\0", ""), *([""] * ("\0" in first))]
    )
Loader.add_constructor("tag:yaml.org,2002:int", _int)
Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load(text: str, name: str = "value") -> Any:
    """The value of a text in YAML.

    Args:
        text: YAML.
        name: Of the file, for error messages.

    Raises:
        yaml.YAMLError: If it is malformed, or a key occurs twice; names the line and column.
    """
    loader = Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def plain_values(value: Any) -> Any:
    """Return a value with plain numbers, without their source texts."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return int(value) if isinstance(value, WrittenInt) else float(value)
    if isinstance(value, list):
        return [plain_values(each) for each in value]
    return {key: plain_values(each) for key, each in value.items()} if isinstance(value, dict) else value
