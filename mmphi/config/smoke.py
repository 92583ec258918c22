"""``--smoke``: reduces every stage and its evaluation to seconds, to check that a whole run works.

The reduced values are ordinary settings, so smoke results have different keys and are never reused as full results.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from mmphi.config.fields import leaves
from mmphi.config.section import Section

S = TypeVar("S", bound=Section)
SMOKE = "smoke"  # The last word of the preset name of every smoke run.

# Upper bounds; smaller values are kept.
AT_MOST: Mapping[str, int] = {
    "scenes.train_images": 64,
    "scenes.validation_images": 8,
    "scenes.test_images": 8,
    "scenes.texts": 400,
    "data.validation_images": 4,
    "data.test_images": 4,
    "pretrain.steps": 4,
    "pretrain.eval_every": 4,
    "pretrain.save_every": 4,
    "pretrain.validation_tokens": 2048,
    "light_clip.steps": 4,
    "light_clip.eval_every": 4,
    "light_clip.save_every": 4,
    "projector.steps": 4,
    "projector.alignment_steps": 2,
    "projector.eval_every": 4,
    "projector.save_every": 4,
    "projector.sample_images": 4,
    "qlora.steps": 4,
    "qlora.eval_every": 4,
    "qlora.save_every": 4,
    "qlora.sample_images": 4,
    "speech.steps": 4,
    "speech.alignment_steps": 2,
    "speech.eval_every": 4,
    "speech.save_every": 4,
    "evaluate.max_new_tokens": 8,
    "evaluate.yes_no": 8,
    "evaluate.long_answers": 2,
    "evaluate.max_answer_tokens": 16,
    "evaluate.candidates": 2,
    "textgen.generators": 1,
}
# Upper bounds of settings for which 0 means "all".
AT_MOST_OF_ALL: Mapping[str, int] = {
    "data.max_images": 32,
    "evaluate.max_images": 8,
    "pretrain.eval_windows": 2,
}
# Replacement values for budgets that would override the bounds above.
INSTEAD: Mapping[str, Any] = {
    "pretrain.stop": "steps 4",
    "pretrain.supervised_tokens": 0,
    "textgen.stop": "tokens 2000",
    "projector.supervised_tokens": 0,
    "qlora.supervised_tokens": 0,
    "speech.supervised_tokens": 0,
}
PRETRAIN_BUDGETS = frozenset({"pretrain.steps", "pretrain.stop", "pretrain.supervised_tokens"})


def smoke(settings: S, given: AbstractSet[str] = frozenset()) -> S:
    """Returns settings reduced to the size of a smoke run.

    Args:
        settings: All settings.
        given: Full names of settings that keep their value, such as those given on the command line.
    """
    values = dict(leaves(settings))
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in given:
            continue
        if name in INSTEAD:
            small[name] = INSTEAD[name]
        elif name in AT_MOST_OF_ALL:
            small[name] = min(value or AT_MOST_OF_ALL[name], AT_MOST_OF_ALL[name])
        elif name in AT_MOST:
            small[name] = min(value, AT_MOST[name])
    if given & PRETRAIN_BUDGETS:  # The replaced `stop` would override the given budget.
        small.pop("pretrain.stop", None)
        if "pretrain.steps" in given and "pretrain.stop" not in given:
            small["pretrain.stop"] = f"steps {values['pretrain.steps']}"
    content = settings.model_dump()
    for name, value in small.items():
        section, _, field = name.partition(".")
        content[section][field] = value
    content["name"] = smoke_name(content["name"])
    return type(settings).model_validate(content)


def smoke_name(preset: str) -> str:
    """The preset name that runs of a smoke run carry."""
    return preset if is_smoke(preset) else f"{preset} {SMOKE}"


def is_smoke(preset: str) -> bool:
    """Whether a preset name is that of a smoke run."""
    return SMOKE in preset.split()
