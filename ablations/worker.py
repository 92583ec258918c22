"""Worker process: runs requests one at a time, and keeps models, features and tokenized data loaded between them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from ablations.protocol import TrialResponse, decode_request, decode_response, encode
from mmphi.allocator import keep_freed_memory
from mmphi.errors import Stopped

ALIVE_S = 0.5  # Interval between checks that the driver process exists.


def main(descriptor: int) -> None:
    """Run the requests of a pipe until it is closed.

    Args:
        descriptor: File descriptor of the pipe.
    """
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The driver handles Ctrl-C.
    _die_with_parent()
    from ablations.trial import run_trial
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES

    connection, pipeline = Connection(descriptor), Pipeline(STAGES)
    connection.send_bytes(encode(TrialResponse(-1, "report")))  # Ready.
    while True:
        try:
            job = decode_request(connection.recv_bytes())
        except (EOFError, Stopped):
            return

        def report(name: str, value: float, step: int, number: int = job.number) -> bool:
            try:
                connection.send_bytes(encode(TrialResponse(number, "report", {name: value, "step": step})))
                return decode_response(connection.recv_bytes()).kind == "report"
            except (EOFError, OSError) as error:
                raise Stopped("its driver ended") from error

        answer = run_trial(job, pipeline, report)
        try:
            connection.send_bytes(encode(answer))
        except OSError:  # The driver has ended; a later one finds the finished run by its cache key.
            return


def _stop(*_: object) -> None:
    raise Stopped("stopped; the same command resumes from there")


def _die_with_parent() -> None:
    """Exit when the driver process is gone; the next driver resumes the unfinished build."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(ALIVE_S)
        os._exit(1)

    threading.Thread(target=look, daemon=True, name="mmphi-parent").start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
