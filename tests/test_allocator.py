import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from mmphi.allocator import OWN, SWITCH

TENSORS = """
import resource, torch
from mmphi.allocator import keep_freed_memory
told = {told}
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="another C library")


def told_and_faults(told: str, **environment: str) -> tuple[str, int]:
    own = {name: value for name, value in os.environ.items() if name not in OWN} | environment
    program = [sys.executable, "-c", TENSORS.format(told=told)]
    words = subprocess.run(program, env=own, check=True, capture_output=True, text=True).stdout.split()
    return words[0], int(words[1])


@pytest.mark.slow
@glibc
def test_a_freed_tensor_is_the_next_ones_memory() -> None:
    _, untold = told_and_faults("None")
    answer, kept = told_and_faults("keep_freed_memory()")

    assert answer == "True"
    assert kept < untold / 10


GIVEN_BACK = """
import json, os, psutil, torch
from mmphi.allocator import release_memory, keep_freed_memory
def resident():
    return psutil.Process().memory_info().rss
assert keep_freed_memory()
release_memory()
block = 2**28  # Bytes.
tensor, above = torch.ones(block // 4), torch.ones(1000)
del tensor
found = [resident()]
os.environ["LD_PRELOAD"] = "another.so"
release_memory()
found.append(resident())
del os.environ["LD_PRELOAD"]
release_memory()
print(json.dumps([*found, resident(), float(above.sum())]))
"""


@pytest.mark.slow
@glibc
def test_freed_memory_is_returned_on_request_unless_the_user_chose_an_allocator() -> None:
    """In a process of its own, in which nothing else allocates."""
    own = {name: value for name, value in os.environ.items() if name not in OWN}
    program = [sys.executable, "-c", GIVEN_BACK]
    done = subprocess.run(program, env=own, check=True, capture_output=True, text=True)
    full, kept, returned, total = json.loads(done.stdout)
    half = 2**27
    assert kept > full - half
    assert returned < full - half
    assert total == 1000


@glibc
def test_what_a_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmphi.allocator import keep_freed_memory

    for name, chosen in {**dict.fromkeys(OWN, "chosen"), SWITCH: "0"}.items():
        monkeypatch.setenv(name, chosen)
        assert not keep_freed_memory()
        monkeypatch.delenv(name)
    assert keep_freed_memory()


class ToldError(Exception):
    pass


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("mmphi.cli", [["status"]]),
        ("mmphi.stages.background_worker", []),
        ("mmphi.textgen.generator", [None]),
        ("ablations.worker", [-1]),
    ],
)
def test_every_process_that_computes_is_told_first(
    module: str, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> None:
        raise ToldError

    process = importlib.import_module(module)
    monkeypatch.setattr(process, "keep_freed_memory", told)

    with pytest.raises(ToldError):
        process.main(*arguments)
