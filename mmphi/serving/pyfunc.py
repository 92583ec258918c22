"""A trained model for MLflow's ``mlflow.pyfunc.load_model`` and ``mlflow models serve``."""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mmphi.data.decoder import Decoder
from mmphi.errors import MmphiError
from mmphi.generation.conversations import answer_conversations, read_conversations
from mmphi.generation.messages import MessageError
from mmphi.generation.sampling import SamplingParams
from mmphi.serving.scheduler import AUDIO_S, decode_recordings

if TYPE_CHECKING:
    import pandas as pd

    from mmphi.models.multimodal import Multimodal

SLOTS = 8


def _load_pyfunc(path: str) -> ChatPythonModel:
    """Load the model of a folder; MLflow requires this name."""
    import mmphi

    return ChatPythonModel(mmphi.load(path))


class ChatPythonModel:
    """Answers the rows of a table.

    Args:
        model: Model that answers.
    """

    def __init__(self, model: Multimodal) -> None:
        self._engine = model.engine(SLOTS)
        self._lock = threading.Lock()  # MLflow's server calls `predict` from several threads.
        self._decoder = Decoder()

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Answer each row.

        Args:
            model_input: Any of the columns ``question``, ``image``, ``audio`` (content of a file in base64, alone or as
                a ``data:`` URI) and ``system``; or the column ``messages``, in OpenAI's format as JSON.
            params: ``max_tokens``, ``temperature``, ``top_p`` and ``seed``; a negative seed is a new one each time.

        Returns:
            The columns ``answer`` and ``heard``, the transcript of the last question's recordings.

        Raises:
            MlflowException: If a row cannot be answered.
        """
        import pandas as pd

        how = {name: value for name, value in (params or {}).items() if value is not None}
        if int(how.get("seed", -1)) < 0:
            how.pop("seed", None)
        try:
            rows: list[Any] = model_input.to_dict("records")
            conversations = read_conversations([_messages(row) for row in rows], files=False)
            with self._lock:
                conversations = [decode_recordings(each, self._decoder, AUDIO_S) for each in conversations]
                answers = answer_conversations(self._engine, conversations, SamplingParams(**how))
                inputs = [self._engine.model.inputs(each.audio[-1]) for each in conversations]
        except MmphiError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        transcripts = [" ".join(each.transcript or "" for each in own) for own in inputs]
        return pd.DataFrame({"answer": [answer.text for answer in answers], "heard": transcripts})


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    if "messages" in given:
        try:
            return list(json.loads(given["messages"]))
        except (ValueError, TypeError) as error:
            raise MessageError(f"messages are no JSON: {error}") from error
    kinds = [kind for kind in ("image", "audio") if kind in given]
    parts: list[dict[str, Any]] = [{"type": kind, kind: _content(given[kind], kind)} for kind in kinds]
    if "question" in given:
        parts.append({"type": "text", "text": given["question"]})
    system = [{"role": "system", "content": given["system"]}] if "system" in given else []
    return [*system, {"role": "user", "content": parts}]


def _content(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"{kind} is no base64: {error}") from error
