"""A conversation as a model's prompt, cut where it is too long."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from mmphi.data.encoded import image_inputs
from mmphi.data.features import LiveFeatures
from mmphi.data.images import open_image
from mmphi.errors import ModelError
from mmphi.models.chat.messages import Conversation
from mmphi.models.multimodal import Multimodal
from mmphi.text.sequences import Sample, join


def check_shown(model: Multimodal, conversation: Conversation) -> None:
    """Open the images of a conversation.

    Raises:
        ModelError: If the model sees nothing and is shown something.
        ImageError: If an image cannot be used.
    """
    if any(conversation.images) and model.features is None:
        raise ModelError("this model sees nothing: it has no projector", "ask a model that `mmphi projector` trained")
    images = [*chain.from_iterable(conversation.images)]
    if isinstance(model.features, LiveFeatures):
        model.features.look(images)
        return
    for image in images:
        open_image(image.path)


def open_prompt(
    model: Multimodal, conversation: Conversation, longest: int, *, checked: bool = False
) -> tuple[Sample, int]:
    """A conversation as a sequence that its next answer goes on from.

    Where it is too long the oldest questions go, with their answers and with the images and recordings they came with;
    what the model shall be and the newest question stay.

    Args:
        model: Who answers.
        conversation: What was said.
        longest: In tokens, features included.
        checked: Whether :func:`check_shown` was done.

    Returns:
        The sequence, and how many turns were left out.

    Raises:
        ModelError: If the newest question alone is too long, or the model sees or hears nothing and is shown something.
        ImageError: If an image cannot be used.
        AudioError: If a recording cannot be used.
    """
    if not checked:
        check_shown(model, conversation)
    left_out = 0
    while True:
        sample = _written(model, conversation)
        if len(sample) <= longest:
            return sample, left_out
        if len(conversation.turns) == 1:
            raise ModelError(
                f"the question has {len(sample)} tokens, and there is room for {longest}", "ask less at once"
            )
        conversation = conversation.without_oldest()
        left_out += 1


def _written(model: Multimodal, conversation: Conversation) -> Sample:
    images = [*chain.from_iterable(conversation.images)]
    heard = model.inputs([*chain.from_iterable(conversation.audio)])
    turns = zip(conversation.turns, conversation.images, conversation.audio, strict=True)
    asked = tuple((model.asked(question, own, said), answer) for (question, answer), own, said in turns)
    parts = model.language.prompt.parts(
        replace(conversation, turns=asked).placed(),
        images=len(images),
        audio=[each.said for each in heard],
        system=conversation.system,
    )
    return join(parts, [*image_inputs(images, model.length), *heard], "conversation")
