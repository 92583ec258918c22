"""``mmphi demo``: a web page for text, audio and image questions to a trained model."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmphi.config.arguments import CommandParser
from mmphi.errors import SettingsError
from mmphi.serving.ask import sampling_of, sampling_options
from mmphi.serving.model_args import model_options, port_number
from mmphi.serving.serve import HOST, KEY, key_for

PORT = 7860
USER = "mmphi"


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = CommandParser(
        prog="mmphi demo",
        description="A page in the browser: type, speak or show a photo to a trained model, or to two side by side.",
        epilog=f"A non-local --host requires a password, read from the variable {KEY}; the user name is {USER}.",
    )
    model_options(made)
    made.add_argument(
        "--beside", default="", metavar="MODEL", help="a second model, whose answers are shown next to the first one's"
    )
    made.add_argument(
        "--examples",
        default="",
        metavar="FOLDER",
        help="folder of example images, recordings and questions (.txt) [the model's own data]",
    )
    made.add_argument(
        "--host", default=HOST, help=f"address to listen on; one that is not local requires a password [{HOST}]"
    )
    made.add_argument("--port", type=port_number, default=PORT, help=f"TCP port to listen on [{PORT}]")
    made.add_argument("--open", action="store_true", help="open the page in the browser")
    made.add_argument("--slots", type=int, default=4, help="questions that each model answers concurrently [4]")
    made.add_argument("--waiting", type=int, default=32, help="additional questions that may be queued [32]")
    made.add_argument(
        "--time-limit", type=float, default=120.0, help="time limit of an answer, in seconds; 0 for none [120]"
    )
    made.add_argument(
        "--max-bytes", type=int, default=64 * 1024**2, help="largest image or recording, in bytes [67108864]"
    )
    sampling_options(made)
    return made


@contextmanager
def serve_page(options: argparse.Namespace) -> Iterator[str]:
    """Serve the page in a background thread; yields its address.

    Args:
        options: Parsed options of :func:`parser`.

    Raises:
        MmphiError: If a model or the examples cannot be loaded.
    """
    import mmphi
    from mmphi.generation.engine import Engine
    from mmphi.serving.model_args import choices, chosen_model
    from mmphi.serving.page.examples import of_folder, of_model
    from mmphi.serving.page.layout import CSS, PageConfig, build_page, theme
    from mmphi.serving.page.model_pool import ModelPool
    from mmphi.serving.scheduler import Scheduler

    def load(model: str) -> Scheduler:
        loaded = mmphi.load(model, whisper=options.whisper)
        return Scheduler(Engine(loaded, options.slots, options.context), options.waiting, options.time_limit)

    choice = chosen_model(options)
    model = choice.name
    print(f"model: {choice.label}")
    given = [(choice.label, model), (options.beside, options.beside)]

    def models() -> list[tuple[str, str]]:
        found = choices()
        known = {name for _, name in found}
        return [(label, name) for label, name in given if name and name not in known] + found

    pool = ModelPool(load)
    for name in filter(None, (model, options.beside)):
        pool.worker(name)  # Load now, so that errors appear here and the first question does not wait.
    examples = of_folder(Path(options.examples).expanduser()) if options.examples else of_model(model)

    def questions(name: str) -> tuple[str, ...]:
        """Training questions of a loaded model; none for others, so that the page does not wait for a load."""
        worker = pool.loaded(name)
        return worker.engine.model.questions if worker else ()

    look = PageConfig(models, model, options.beside, examples, sampling_of(options), questions)
    page = build_page(pool, look)
    key = key_for(options.host)
    try:
        _, address, _ = page.queue(max_size=options.waiting).launch(
            server_name=options.host,
            server_port=options.port,
            inbrowser=options.open,
            share=False,
            auth=(USER, key) if key else None,
            max_file_size=options.max_bytes,
            theme=theme(),
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=True,
            # Gradio's own errors, such as an image that it cannot decode, are shown with their text.
            show_error=True,
        )
    except OSError as error:
        raise SettingsError(f"cannot listen on {options.host}:{options.port}", "choose another --port") from error
    try:
        yield str(address).rstrip("/")
    finally:
        page.close(verbose=False)
        pool.close()


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi demo``."""
    options = parser().parse_args(list(arguments))
    key_for(options.host)  # Fail before a model is loaded.
    with serve_page(options) as address:
        print(f"{address} (stop with Ctrl-C)", flush=True)
        threading.Event().wait()
    return 0
