"""A study of two small trainings, as a file of one's own."""

from ablations.study import Study

STUDY = Study(
    question="Does a wider projector lose less?",
    factor="projector.width",
    levels={"narrow": 16, "wide": 32},
    baseline="narrow",
    fixed={
        "scenes.train_images": 40,
        "scenes.validation_images": 6,
        "scenes.test_images": 8,
        "scenes.texts": 450,
        "pretrain.steps": 6,
        "pretrain.layers": 2,
        "pretrain.width": 32,
        "pretrain.batch_size": 16,
        "light_clip.steps": 4,
        "light_clip.batch_size": 16,
        "light_clip.width": 32,
        "light_clip.workers": 0,
        "embed.workers": 0,
        "projector.steps": 4,
        "projector.batch_size": 8,
        "projector.sample_images": 0,
        "evaluate.yes_no": 0,
        "evaluate.max_new_tokens": 4,
    },
    seeds=1,
)
