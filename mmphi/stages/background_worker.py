"""Worker process that :mod:`mmphi.pipeline.background_build` starts to build stages in parallel."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping

from mmphi.allocator import keep_freed_memory
from mmphi.errors import MmphiError, Stopped
from mmphi.pipeline.background_build import worker_request
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Stage
from mmphi.stages import STAGES, Settings

USER_ERROR, TERMINATED = 2, 143


def _stop(_: int, __: object) -> None:
    raise Stopped("stopped; the same command resumes from there")


def _until_alone() -> None:
    """Terminate this process when standard input closes, that is, when the parent process has ended."""
    # os.read instead of a buffered reader, whose lock would block the interpreter's shutdown.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(stages: Mapping[str, Stage] = STAGES) -> int:
    """Build the stages requested on standard input.

    Args:
        stages: Available stages by name.

    Returns:
        Exit code: 0 on success, 2 after an :class:`MmphiError`, 143 if interrupted or terminated.
    """
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _stop)
    try:
        names, settings = worker_request(sys.stdin)
        threading.Thread(target=_until_alone, daemon=True).start()
        for name in names:
            Pipeline(stages).build(name, Settings.model_validate(settings), after=False)
    except MmphiError as error:
        print(f"error: {error.what}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        print(error or "interrupted", file=sys.stderr)
        return TERMINATED
    return 0


if __name__ == "__main__":
    sys.exit(main())
