"""The stages, one file each; light to import, heavy only when run."""

from mmphi.stage import Stage
from mmphi.stages import embed, evaluate, light_clip, pretrain, projector, scenes

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (scenes, pretrain, light_clip, embed, projector, evaluate)
}
