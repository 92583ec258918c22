"""Which audio input: Whisper's transcript, its token probabilities, or the frames of its encoder."""

from dataclasses import replace

from ablations.study import Study

QUALITY = {
    "test/answer_agreement": "answered as the typed question",
    "test/audio_gain": "loss reduction by the right recording, nats/token",
}
COSTS = {
    "test/tokens_per_s": "tokens per second of speech",
    "test/hearing_s_per_s": "processing seconds per second of speech",
    "speech/parameters": "trained parameters",
    "seconds": "training seconds",
}

STUDY = Study(
    question="Which audio input is best: Whisper's transcript, its token probabilities, or its encoder's frames?",
    factor="speech.audio_input",
    levels={"transcript": "transcript", "soft": "soft", "encoder": "encoder"},
    baseline="transcript",
    preset="spoken-scenes",
    stage="speech",
    seed_settings=("speech.seed",),
    margin=0.02,
    costs=COSTS,
    also=QUALITY | {"test/exact_match": "answers right"},
    leaves_open="All audio inputs are trained for the same number of steps through the language model; the projector of"
    " encoder frames is aligned with CTC before that. How far each would come with more recordings or training is"
    " not measured, nor any voice but a synthetic one.",
)

PRESETS = {
    # No level `soft`: the language model's token ids differ from Whisper's.
    "speech": replace(
        STUDY,
        preset="speech",
        levels={"transcript": "transcript", "encoder": "encoder"},
        also=QUALITY | {"test/wer": "words wrong where it repeats"},
    ),
    "speech-phi2": replace(STUDY, preset="speech-phi2", also=QUALITY | {"test/wer": "words wrong where it repeats"}),
}
