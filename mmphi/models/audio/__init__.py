"""Audio: voice activity, Whisper backends, transcripts, and features for the language model."""
