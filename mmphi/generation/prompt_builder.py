"""A conversation as a model's prompt, cut where it is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from mmphi.data.features import LiveFeatures
from mmphi.data.images import open_image
from mmphi.data.schema import AudioRef, ImageRef
from mmphi.data.tokenized_dataset import image_inputs
from mmphi.errors import AudioError, ModelError
from mmphi.generation.messages import Conversation
from mmphi.models.multimodal import Multimodal
from mmphi.text.prompt import SHOWN
from mmphi.text.tokenized_example import TokenizedExample, join_spans

LETTERS_PER_TOKEN = 8  # A conversation of more letters for each token that there is room for hardly fits.


def check_images(model: Multimodal, conversation: Conversation, check: Callable[[], None] = lambda: None) -> None:
    """Open the images of a conversation, and compute their features where those are not stored.

    Args:
        model: Who is shown them.
        conversation: What was said.
        check: Called before each image; what it raises ends this.

    Raises:
        ModelError: If the model sees nothing and is shown something.
        ImageError: If an image cannot be used.
    """
    if any(conversation.images) and model.features is None:
        raise ModelError("this model sees nothing: it has no projector", "ask a model that `mmphi projector` trained")
    images = [*chain.from_iterable(conversation.images)]
    if isinstance(model.features, LiveFeatures):
        model.features.look(images, check)
        return
    for image in images:
        check()
        open_image(image.source, image.name)


def open_prompt(
    model: Multimodal,
    conversation: Conversation,
    longest: int,
    *,
    checked: bool = False,
    check: Callable[[], None] = lambda: None,
) -> tuple[TokenizedExample, int]:
    """A conversation as a sequence that its next answer goes on from.

    Where it is too long the oldest questions go, with their answers and with the images and recordings they came with;
    what the model shall be and the newest question stay.

    Args:
        model: Who answers.
        conversation: What was said.
        longest: In tokens, features included.
        checked: Whether :func:`check_images` was done.
        check: Called before the prompt is written; what it raises ends this.

    Returns:
        The sequence, and how many turns were left out.

    Raises:
        ModelError: If there is nothing to continue, if the newest question alone is too long, or if the model sees or
            hears nothing and is shown something.
        ImageError: If an image cannot be used.
        AudioError: If a recording cannot be used.
    """
    if not checked:
        check_images(model, conversation, check)
    check()
    _check_speech(model, conversation)
    turns = len(conversation.turns)
    if conversation.letters <= LETTERS_PER_TOKEN * longest:
        sample = _written(model, conversation)
        if not len(sample):
            raise ModelError("the prompt has no tokens", "ask something")
        if len(sample) <= longest:
            return sample, 0
    sample = _written(model, conversation.newest(1))
    if len(sample) > longest:
        raise ModelError(f"the question has {len(sample)} tokens, and there is room for {longest}", "ask less at once")
    # As many of the newest turns as fit, between `kept` and `most`. The step doubles while they fit, so that of a
    # conversation of any length little more is encoded than there is room for.
    kept, most, step = 1, turns, 1
    while kept < most:
        check()
        tried = min(kept + step, most)
        longer = _written(model, conversation.newest(tried))
        if len(longer) <= longest:
            sample, kept, step = longer, tried, 2 * step
        else:
            most, step = tried - 1, max(1, step // 2)
    return sample, turns - kept


def _check_speech(model: Multimodal, conversation: Conversation) -> None:
    """Refuse recordings of the newest question that contain no speech: an answer to them would be invented.

    Raises:
        AudioError: If the voice gate or Whisper finds no speech in one.
    """
    recordings = conversation.audio[-1] if conversation.audio else ()
    for number, each in enumerate(model.inputs(recordings), 1):
        if not each.length and not (each.said or "").strip():
            which = f"recording {number}" if len(recordings) > 1 else "the recording"
            raise AudioError(
                "no speech",
                f"no speech was found in {which}",
                "check its volume, or lower audio.vad_threshold of the model's settings",
            )


def _written(model: Multimodal, conversation: Conversation) -> TokenizedExample:
    images = [*chain.from_iterable(conversation.images)]
    heard = model.inputs([*chain.from_iterable(conversation.audio)])
    turns = zip(conversation.turns, conversation.images, conversation.audio, strict=True)
    asked = [(_asked(model, question, own, said), answer) for (question, answer), own, said in turns]
    if leading := conversation.leading:
        asked[0] = asked[0][0].removeprefix(SHOWN * leading).removeprefix("\n"), asked[0][1]
    parts = model.language.prompt.placed_parts(
        asked, leading=leading, audio=[each.said for each in heard], system=conversation.system
    )
    return join_spans(parts, [*image_inputs(images, model.length), *heard], "conversation")


def _asked(model: Multimodal, question: str, images: Sequence[ImageRef], audio: Sequence[AudioRef]) -> str:
    """A question; of images alone, with that by which captions were asked for in training."""
    if question.replace(SHOWN, "").strip():
        return question
    typed = model.asked("", images, audio)
    return question + ("\n" if question and typed else "") + typed
