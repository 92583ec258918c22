"""Stage ``evaluate``: everything measured of a trained projector, on any split and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmphi.settings import Settings
from mmphi.stage import Context, Stage
from mmphi.stages import projector


def upstream(settings: Settings) -> tuple[str, ...]:
    """The projector, and what it joins."""
    return ("projector", *projector.upstream(settings))


def run(ctx: Context) -> Mapping[str, float]:
    """Load, measure, record."""
    import torch

    from mmphi.data.read import read_examples
    from mmphi.errors import ModelError
    from mmphi.evaluation.evaluate import evaluate_model
    from mmphi.models.assemble import assemble
    from mmphi.training.checkpoints import complete_checkpoints, load_trained, step_of

    settings, chosen = ctx.settings, ctx.settings.evaluate
    trained = ctx.upstream["projector"].path
    model = assemble(settings, ctx.upstream, trained)
    if chosen.checkpoint != "final":
        kept: dict[str, Path] = {str(step_of(p)): p for p in complete_checkpoints(trained)}
        if chosen.checkpoint not in kept:
            raise ModelError(
                f"evaluate.checkpoint = {chosen.checkpoint}: that step was not kept",
                f"there are final, {', '.join(kept)}; projector.keep_checkpoints keeps more",
            )
        load_trained(model.packed, kept[chosen.checkpoint])
        model.packed.eval()
    scenes = ctx.upstream.get("scenes")
    examples, _ = read_examples(settings, scenes.path if scenes else None)
    asked = [e for e in examples if e.split == chosen.split and model.can_see(e)]
    torch.manual_seed(settings.seed)
    return evaluate_model(model, asked, chosen, ctx.tracker, prefix=chosen.split)


STAGE = Stage(
    name="evaluate",
    version=1,
    help="measure a trained projector on any split and checkpoint",
    sections=("evaluate", "data", "vision", "language"),
    run=run,
    upstream=upstream,
    inputs=projector.inputs,
)
