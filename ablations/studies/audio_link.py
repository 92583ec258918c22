"""Which audio input: Whisper's transcript, its token probabilities, or the frames of its encoder."""

from dataclasses import replace

from ablations.study import Study

QUALITY = {
    "test/answer_agreement": "answered as the typed question",
    "test/hearing_gain": "what the right recording saves, nats/token",
}
COSTS = {
    "test/tokens_per_s": "tokens for a second of speech",
    "test/hearing_s_per_s": "seconds of hearing for a second of speech",
    "speech/parameters": "trained parameters",
    "seconds": "training seconds",
}

STUDY = Study(
    question="How should the language model hear: by Whisper's words, all that they may be, or its encoder's frames?",
    factor="speech.audio_input",
    levels={"transcript": "transcript", "soft": "soft", "encoder": "encoder"},
    baseline="transcript",
    preset="spoken-scenes",
    stage="speech",
    seed_settings=("speech.seed",),
    margin=0.02,
    costs=COSTS,
    also=QUALITY | {"test/exact_match": "answers right"},
    leaves_open="All links are trained for the same number of steps through the language model; the encoder's frames"
    " learn to name words before, which costs no such pass. How far each would come with more recordings or training is"
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
