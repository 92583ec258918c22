from __future__ import annotations

import gc
import threading
import weakref

from mmphi.pipeline.process_cache import ProcessCache


class Model:
    """Something large."""


def test_one_of_each_digest_however_often_it_is_asked_for() -> None:
    resources = ProcessCache()
    one = resources.once("language", "a", Model)
    assert resources.once("language", "a", Model) is one
    assert resources.once("language", "b", Model) is not one
    assert resources.once("tower", "a", Model) is not one
    assert resources.once("language", "a", Model) is one  # Still used, so still had.


def test_the_newest_lives_on_and_the_others_go() -> None:
    resources = ProcessCache()
    first = weakref.ref(resources.once("language", "a", Model))
    assert first() is not None
    second = weakref.ref(resources.once("language", "b", Model))
    gc.collect()
    assert first() is None
    assert second() is not None


def test_threads_get_the_same() -> None:
    resources, made = ProcessCache(), []

    def make() -> Model:
        made.append(Model())
        return made[-1]

    threads = [threading.Thread(target=resources.once, args=("language", "a", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
