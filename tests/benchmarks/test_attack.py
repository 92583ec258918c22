"""The attack finds nothing wrong with the server, and finds what is wrong with broken ones."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmphi.benchmarks import attack
from mmphi.generation.detokenizer import IncrementalDetokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from answerers import answerer, served

pytestmark = pytest.mark.slow


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Figures of a short attack on a server in this process."""

    @contextmanager
    def serving(command: Any) -> Iterator[tuple[str, int]]:
        assert command(1)[-4:] == ["--max-bytes", str(attack.LARGEST), "--whisper", "any"]
        with served(answerer(), attack_rules(), slots=4, waiting=4) as address:
            yield address, os.getpid()

    def attack_rules() -> Any:
        from mmphi.serving.api import ServerConfig

        return ServerConfig("tiny", largest=attack.LARGEST)

    monkeypatch.setattr(attack, "serving", serving)
    monkeypatch.setattr(attack, "SETTLE_S", 0.0)
    monkeypatch.setattr(attack, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(attack, "CASES", 12)
    # The answer of a test model does not end, and its context is short: what is sent must fit.
    monkeypatch.setattr(attack, "_words", lambda draw, count: "".join(draw.choices("abc", k=min(4, count))))

    def run(requests: int) -> dict[str, Any]:
        options = argparse.Namespace(seed=1, whisper="any", requests=requests, minutes=0.0, clients=6)
        return attack.attacked(options, "model", tmp_path)

    return run


def test_nothing_that_is_sent_breaks_the_server(attacked: Any) -> None:
    found = attacked(150)
    assert (found["wrong"], found["wrong_after"], found["unexpected"], found["health_problems"]) == (0, 0, [], [])
    assert found["requests"] == 150
    assert {ending.split()[0] for ending in found["ended"]} >= {"answer", "stream", "malformed", "damaged", "left"}
    assert found["at_the_end"]["disk_mb"] == 0


def test_answers_of_others_and_errors_are_found(attacked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server gives them when two answers are exchanged now and then, and when it fails."""
    text, calls = IncrementalDetokenizer.text.fget, []  # type: ignore[attr-defined]

    def now_and_then(words: IncrementalDetokenizer) -> str:
        calls.append(1)
        if len(calls) > 500 and len(calls) % 100 == 0:
            raise RuntimeError("broken")
        return str(text(words)) + "!" * (len(calls) > 500 and len(calls) % 50 == 25)

    monkeypatch.setattr(IncrementalDetokenizer, "text", property(now_and_then))
    found = attacked(100)
    assert not found["withstood"]
    assert found["wrong"] > 0
    assert any("broken" in each for each in found["unexpected"])
