"""reuse_memory: steps get no fresh pages any more; other allocators are named, and left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import batchnorm as bn
from batchnorm import cli, memory

GLIBC = (memory._owner_of_malloc() or "").startswith("libc.so")

STEPS = """
import json, resource, sys, torch
import batchnorm as bn
torch.set_num_threads(1)
def step():
    tensors = [torch.ones(16 << 18) for _ in range(8)]  # 16 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def faults():
    step()
    before = step()
    return step() - before
plain = faults()
took = {call}
print(json.dumps([plain, took, faults()]))
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc")
def test_steps_get_no_fresh_pages():
    done = subprocess.run(
        [sys.executable, "-c", STEPS.replace("{call}", "bn.reuse_memory()")], capture_output=True, text=True, check=True
    )
    plain, took, reused = json.loads(done.stdout)
    assert took is True
    assert not done.stderr
    if plain < 1000:
        pytest.skip("this glibc is told to keep memory already")
    assert reused < plain / 50


@pytest.mark.parametrize(
    ("owner", "told"),
    [
        (None, "there is no glibc"),
        ("libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4 allocates in this process"),
        ("libc.musl-x86_64.so.1", "libc.musl-x86_64.so.1 allocates"),
    ],
)
def test_other_allocators_are_left_alone(monkeypatch, owner, told):
    monkeypatch.setattr(memory, "_owner_of_malloc", lambda: owner)
    with pytest.warns(UserWarning, match=f"reuse_memory changed nothing: {told}"):
        assert bn.reuse_memory() is False


@pytest.mark.parametrize("served", ["libc.so.6", "libjemalloc.so.2"])
@pytest.mark.parametrize("entry", ["python3.11", None])
def test_a_program_with_an_entry_of_its_own_for_malloc_is_no_allocator(monkeypatch, entry, served):
    """Debian's python3 has one, at a fixed address."""
    monkeypatch.setattr(memory, "_owner_of", lambda name: entry or served if name == "malloc" else served)
    assert memory._owner_of_malloc() == served


def test_an_allocator_that_lacks_the_others_is_named(monkeypatch):
    owners = {"malloc": "libmine.so", "posix_memalign": "libmine.so", "malloc_usable_size": "libc.so.6"}
    monkeypatch.setattr(memory, "_owner_of", owners.get)
    assert memory._owner_of_malloc() == "libmine.so"


def test_a_c_library_without_mallopt_is_no_error(monkeypatch):
    class Library:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library())
    assert memory._owner_of_malloc() is None


@pytest.mark.parametrize("name", ["libc.so.6", "libc-2.31.so"])
def test_both_names_of_glibc_are_known(monkeypatch, name):
    """The second was its file's name until version 2.33."""
    set_to = []

    class Library:
        def mallopt(self, *setting):
            set_to.append(setting)
            return 1

    monkeypatch.setattr(memory, "_owner_of_malloc", lambda: name)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Library())
    assert bn.reuse_memory() is True
    assert set_to == list(memory._SETTINGS.values())


def test_the_command_that_trains_sets_it_in_a_process_of_its_own(monkeypatch, capsys):
    found = []
    monkeypatch.setattr("batchnorm.cli.keep_freed", lambda: found.append("set"))
    assert cli.main(["train", "--help"]) == 0  # in somebody's process
    for command, times in (("info", 0), ("train", 1)):
        monkeypatch.setattr("sys.argv", ["batchnorm", command, "--help"])
        assert cli.main() == 0
        assert len(found) == times
