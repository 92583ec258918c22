"""``mmphi serve``: a trained model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmphi.config.arguments import CommandParser
from mmphi.errors import SettingsError
from mmphi.serving.model_args import model_options, port_number

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from mmphi.models.multimodal import Multimodal
    from mmphi.serving.api import ServerConfig

HOST, PORT = "127.0.0.1", 8000
LOCAL = (HOST, "localhost", "::1")
KEY = "MMPHI_API_KEY"
GRACE_S, END_S = 2, 9.0  # Seconds after SIGTERM: for open answers to finish, and until a forced exit.


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = CommandParser(
        prog="mmphi serve",
        description="Serve a trained model through OpenAI's HTTP interface: /v1/chat/completions (text, images, audio),"
        " /v1/models, /health, /ready, /metrics.",
        epilog=f"The API key that requests must carry is read from the environment variable {KEY}.",
    )
    model_options(made)
    made.add_argument("--name", default="", help="name of the model in requests and responses [its run or folder]")
    made.add_argument(
        "--host", default=HOST, help=f"address to listen on; one that is not local requires an API key [{HOST}]"
    )
    made.add_argument("--port", type=port_number, default=PORT, help=f"TCP port to listen on [{PORT}]")
    made.add_argument("--slots", type=int, default=8, help="requests answered concurrently [8]")
    made.add_argument(
        "--waiting", type=int, default=64, help="additional requests that may be queued; more get the status 429 [64]"
    )
    made.add_argument(
        "--audio-seconds",
        type=float,
        default=600.0,
        help="longest total duration of a request's recordings, in seconds [600]",
    )
    made.add_argument(
        "--time-limit", type=float, default=120.0, help="time limit of a request, in seconds; 0 for none [120]"
    )
    made.add_argument("--max-bytes", type=int, default=64 * 1024**2, help="largest request body, in bytes [67108864]")
    made.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature of requests without one; 0 is greedy [0]"
    )
    made.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may send requests (CORS); repeatable; * for any [none]",
    )
    made.add_argument(
        "--allow-url",
        action="append",
        default=[],
        metavar="PREFIX",
        help="fetch images whose URL has this prefix; repeatable [none]",
    )
    return made


def key_for(host: str) -> str:
    """API key or password from the environment; empty if none is set.

    Raises:
        SettingsError: If the host is not local and no key is set.
    """
    key = os.environ.get(KEY, "")
    if host not in LOCAL and not key:
        raise SettingsError(
            f"--host {host} is reachable from other machines, but no key is set", f"set the environment variable {KEY}"
        )
    return key


def application_of(
    model: Multimodal,
    rules: ServerConfig,
    *,
    slots: int = 8,
    waiting: int = 64,
    context: int = 0,
    limit_s: float = 120.0,
    audio_s: float = 600.0,
) -> FastAPI:
    """Build the ASGI application of a model.

    Args:
        model: Model that answers.
        rules: Settings of the server.
        slots: Number of requests answered at once.
        waiting: Number of requests that may wait in addition.
        context: Longest conversation, in tokens; 0 for the default of :class:`~mmphi.generation.engine.Engine`.
        limit_s: Longest time of a request, in seconds; 0 for no limit.
        audio_s: Longest total duration of the recordings of a request, in seconds.
    """
    from mmphi.generation.engine import Engine
    from mmphi.serving.api import application
    from mmphi.serving.metrics import Metrics
    from mmphi.serving.scheduler import QueuedRequest, Scheduler

    def ended(queued: QueuedRequest) -> None:
        metrics.ended(queued, time.monotonic() - queued.born)

    worker = Scheduler(Engine(model, slots, context), waiting, limit_s, ended, audio_s)
    metrics = Metrics(lambda: worker.open)
    return application(worker, rules, metrics)


def server_of(app: FastAPI, host: str, port: int, open_requests: int) -> uvicorn.Server:
    """Build the web server of an application.

    Args:
        app: Application of :func:`application_of`.
        host: Address to listen on.
        port: Port to listen on.
        open_requests: Most requests open at once; from ``2 * open_requests + 64`` connections on, the status is 503.
    """
    import uvicorn

    from mmphi.serving.guard import TimedProtocol

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        http=TimedProtocol,
        limit_concurrency=2 * open_requests + 64,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi serve``."""
    options = parser().parse_args(list(arguments))
    key = key_for(options.host)

    import mmphi
    from mmphi.serving.api import ServerConfig
    from mmphi.serving.model_args import chosen_model

    choice = chosen_model(options)
    model = mmphi.load(choice.name, whisper=options.whisper)
    fetch: Callable[[str], bytes] | None = None
    if options.allow_url:
        from mmphi.serving.image_fetch import image_fetcher

        fetch = image_fetcher(options.allow_url)
    hosts = (*LOCAL, options.host)
    rules = ServerConfig(
        options.name or choice.short, key, options.max_bytes, options.temperature, fetch, hosts, tuple(options.cors)
    )
    app = application_of(
        model,
        rules,
        slots=options.slots,
        waiting=options.waiting,
        context=options.context,
        limit_s=options.time_limit,
        audio_s=options.audio_seconds,
    )
    print(f"model: {choice.label}", flush=True)
    print(f"{rules.name} at http://{options.host}:{options.port}/v1", flush=True)
    server = server_of(app, options.host, options.port, options.slots + options.waiting)
    # uvicorn has no hook for signals, so the method of this server is replaced.
    server.handle_exit = end_after_grace_period(server.handle_exit)  # type: ignore[method-assign]  # See above.
    server.run()
    return 0


def end_after_grace_period(handle: Callable[..., None]) -> Callable[..., None]:
    """Wraps a signal handler so that the process also ends after :data:`END_S` seconds, even if threads block."""

    def handler(*arguments: object) -> None:
        timer = threading.Timer(END_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        handle(*arguments)

    return handler
