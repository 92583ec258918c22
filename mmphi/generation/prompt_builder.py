"""Builds a model's prompt from a conversation, without its oldest turns if it is too long."""

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

LETTERS_PER_TOKEN = 8  # A conversation with more characters per available token is unlikely to fit whole.


def check_images(model: Multimodal, conversation: Conversation, check: Callable[[], None] = lambda: None) -> None:
    """Open the images of a conversation, and compute the features that are not stored.

    Args:
        model: Model that the conversation is for.
        conversation: Parsed conversation.
        check: Called before each image; its exceptions are propagated, so that it can cancel the work.

    Raises:
        ModelError: If the conversation has images and the model accepts none.
        ImageError: If an image cannot be used.
    """
    if any(conversation.images) and model.features is None:
        raise ModelError(
            "this model accepts no images: it has no projector", "use a model trained by `mmphi projector`"
        )
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
    """Return a conversation as a prompt of at most ``longest`` tokens.

    If it is too long, the oldest turns are dropped with their images and recordings; the system message and the newest
    question are kept.

    Args:
        model: Model that the prompt is for.
        conversation: Parsed conversation.
        longest: Longest prompt, in tokens, features included.
        checked: Whether :func:`check_images` was already called.
        check: Called before each tokenization; its exceptions are propagated, so that it can cancel the work.

    Returns:
        The prompt, and the number of dropped turns.

    Raises:
        ModelError: If the prompt is empty, if the newest question alone is too long, or if the model does not accept
            the conversation's images or recordings.
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
    # Searches for the largest number of newest turns that fit, between `kept` and `most`. The step doubles while they
    # fit, so that hardly more text is tokenized than fits, however long the conversation.
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
    """Refuse recordings without speech in the newest question: an answer to them would be a hallucination.

    Raises:
        AudioError: If the VAD or Whisper finds no speech in a recording.
    """
    recordings = conversation.audio[-1] if conversation.audio else ()
    for number, each in enumerate(model.inputs(recordings), 1):
        if not each.length and not (each.transcript or "").strip():
            which = f"recording {number}" if len(recordings) > 1 else "the recording"
            raise AudioError(
                "no speech",
                f"no speech was found in {which}",
                "check its volume, or lower audio.vad_threshold of the model's settings",
            )


def _written(model: Multimodal, conversation: Conversation) -> TokenizedExample:
    images = [*chain.from_iterable(conversation.images)]
    audio_inputs = model.inputs([*chain.from_iterable(conversation.audio)])
    turns = zip(conversation.turns, conversation.images, conversation.audio, strict=True)
    questions = [
        (_question_of_turn(model, question, own, recordings), answer) for (question, answer), own, recordings in turns
    ]
    if leading := conversation.leading:
        questions[0] = questions[0][0].removeprefix(SHOWN * leading).removeprefix("\n"), questions[0][1]
    parts = model.language.prompt.placed_parts(
        questions, leading=leading, audio=[each.transcript for each in audio_inputs], system=conversation.system
    )
    return join_spans(parts, [*image_inputs(images, model.length), *audio_inputs], "conversation")


def _question_of_turn(model: Multimodal, question: str, images: Sequence[ImageRef], audio: Sequence[AudioRef]) -> str:
    """The question's text; for images without words, the caption question of the training is appended."""
    if question.replace(SHOWN, "").strip():
        return question
    typed = model.question_or_default("", images, audio)
    return question + ("\n" if question and typed else "") + typed
