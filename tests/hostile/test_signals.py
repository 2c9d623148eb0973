"""SIGTERM in every command that writes: one line, a code, and nothing half-written; leftovers of killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machines import contents

from batchnorm import writing
from batchnorm.cli import main

DATA, SHAPE = ["--data", "digits"], ["--shape", "2,1,8,8"]
COMMANDS = {
    "summary": [*SHAPE, "--html", "page.html"],
    "diagnose": [*DATA, "--batches", "2", "--html", "page.html"],
    "calibrate": [*DATA, "--out", "w.safetensors"],
    "adapt": [*DATA, "--out", "w.safetensors"],
    "fold": [*SHAPE, "--out", "w.safetensors"],
    "convert": [*SHAPE, "--out", "w.safetensors"],
    "lab figure1": [*DATA, "--set", "steps=2", "--seeds", "1", "--workers", "1", "--out", "lab"],
    "lab explain": [*DATA, "--set", "steps=2", "--out", "lab"],
    "lab play": [*DATA, "--set", "steps=2", "--out", "lab"],
}


@pytest.fixture
def terminable():
    """The system's own answer to SIGTERM, before and after."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def stopped(arguments, capsys):
    """The one line of a command that SIGTERM ends."""
    capsys.readouterr()
    assert main(arguments) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batchnorm: ")]
    return line


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_at_work(users, capsys, command):
    before = contents(users)
    line = stopped([*command.split(), "--network", "nets:terminated", *COMMANDS[command]], capsys)
    where = "lab: stopped with 0 of 1 seeds done" if command == "lab figure1" else "interrupted by SIGTERM."
    assert line.startswith(f"batchnorm: {where}")
    assert contents(users) == before


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize("command", ["summary", "calibrate", "lab explain", "lab play"])
def test_sigterm_in_the_middle_of_a_file(users, capsys, monkeypatch, command):
    before, write = contents(users), writing.Stream.write

    def half(stream, content):
        write(stream, content[: len(content) // 2])
        stream.flush()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(writing.Stream, "write", half)
    arguments = [*command.split(), "--network", "nets:net", *COMMANDS[command]]
    assert stopped(arguments, capsys) == "batchnorm: interrupted by SIGTERM."
    assert contents(users) == before
    assert not (users / "lab").exists()


def test_what_killed_processes_left_is_removed(tmp_path):
    """kill -9 in the middle of a file; the next process that writes into the folder puts it in order."""
    script = "import os, sys; from pathlib import Path; from batchnorm.writing import write_atomically\n"
    half = "lambda t: (t.write_bytes(b'half'), os.kill(os.getpid(), 9))"
    script += f"write_atomically(Path(sys.argv[1]) / 'net.pt2', {half})"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    (left,) = contents(tmp_path).values()
    assert left == b"half"
    with writing.temporary_for(tmp_path / "at work") as own, writing.temporary_for(tmp_path / "folder") as folder:
        own.touch()
        folder.mkdir()
        elsewhere = tmp_path / f".a.00000000-1{writing._MARK}.npz"  # of another machine, where it may be alive
        elsewhere.touch()
        old = tmp_path / f".b.00000000-1{writing._MARK}.npz"
        old.touch()
        os.utime(old, (0, 0))
        users_own = tmp_path / ".net.pt2"
        users_own.touch()
        writing._remove_leftovers.cache_clear()
        writing.write_bytes(tmp_path / "other", b"x")
        assert {path.name for path in tmp_path.iterdir()} == {
            *(own.name, folder.name, elsewhere.name, users_own.name, "other")
        }
    assert not own.exists()
    assert not folder.exists()


def test_workers_that_are_ended_remove_their_files(tmp_path):
    with writing.temporary_for(tmp_path / "seed-0.json") as temporary:
        temporary.write_bytes(b"half")
        writing.remove_unfinished()
        assert not contents(tmp_path)


@pytest.mark.parametrize("stem", ["n" * 250, "ü" * 120])
def test_names_as_long_as_they_may_be(tmp_path, stem):
    path = Path(tmp_path / f"{stem}.npz")
    writing.write_bytes(path, b"x")
    assert contents(tmp_path) == {path.name: b"x"}
