"""Two commands that write into one folder at the same time: one of them does it, and the other says who does."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from machines import contents

from batchnorm.cli import main
from batchnorm.errors import InputError
from batchnorm.training import TrainConfig, procedure2, resume, train
from batchnorm.training.files import next_run_folder, run_folder
from batchnorm.writing import LOCK

OPTIONS = {"data": "digits", "steps": 2, "batch_size": 32, "baseline": False, "eval_every": 2}
TRAIN = ["train", "--network", "nets:plain", "--data", "digits", "--steps", "2", "--batch-size", "32"]
HOLD = "import sys; from pathlib import Path; from batchnorm.writing import alone_in; c = alone_in(Path(sys.argv[1]))\n"
HOLD += "with c: print('here', flush=True); sys.stdin.read()"


@pytest.fixture
def no_exports(monkeypatch):
    monkeypatch.setattr(procedure2, "export_network", lambda *arguments: [])


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batchnorm: ")]
    return line


@pytest.mark.usefixtures("no_exports")
def test_who_writes_into_a_folder_is_told_and_a_killed_process_holds_nothing(users, capsys):
    train(TrainConfig(network="nets:plain", out="run", **OPTIONS))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "here\n"
        before = contents(users)
        for command in (
            [*TRAIN, "--out", "run"],
            [*TRAIN, "--out", "run", "--overwrite"],
            ["train", "--resume", "run"],
        ):
            told = rf"batchnorm: error: folder run: process {holder.pid} on \S+ writes into it, and nothing of it was "
            assert re.match(told, refused(capsys, *command))
        assert contents(users) == before
        assert main(["calibrate", "--run", "run", "--out", "w.safetensors"]) == 0  # which writes elsewhere
    finally:
        holder.kill()
        holder.communicate()
    assert (users / "run" / LOCK).exists()
    resume("run", steps=3)
    assert not (users / "run" / LOCK).exists()


class Meddler:
    """Watches a training, and begins another one in its folder."""

    def __init__(self, begin):
        self.begin, self.met = begin, set()

    def stage(self, text):
        self.step(text)

    def step(self, step, *_):
        if Path("run", LOCK).exists():
            with pytest.raises(InputError, match="writes into it"):
                self.begin()
            self.met.add(step)


@pytest.mark.usefixtures("no_exports")
def test_a_training_keeps_others_out_of_its_folder_from_its_first_step_to_its_last_file(users):
    config = TrainConfig(network="nets:plain", out="run", overwrite=True, **OPTIONS)
    late = {"calibrating: exact population statistics", "exporting and checking every form"}
    meddler = Meddler(lambda: resume("run"))
    train(config, progress=meddler)
    assert {1, 2} | late <= meddler.met
    meddler = Meddler(lambda: train(config))
    resume("run", steps=3, progress=meddler)
    assert {3} | late <= meddler.met
    assert not (users / "run" / LOCK).exists()


@pytest.mark.usefixtures("no_exports")
def test_a_run_that_has_kept_nothing_yet_says_so(users, capsys):
    train(TrainConfig(network="nets:plain", out="run", **OPTIONS))
    for path in (users / "run").iterdir():
        if path.name != "config.json":
            path.unlink()
    line = refused(capsys, "calibrate", "--run", "run", "--out", "w.safetensors")
    assert "its training has kept nothing yet. Wait for its first checkpoint" in line


def test_of_many_that_start_together_one_gets_the_folder(tmp_path):
    """The others are refused or, where they have not asked for this one, get the next."""
    barrier = Barrier(8)
    inside = []

    def begin(_):
        barrier.wait()
        named = next_run_folder(tmp_path / "runs", "a")
        barrier.wait()
        try:
            with run_folder(tmp_path / "run", overwrite=False):
                inside.append(named)
                (tmp_path / "run" / "config.json").write_text('{"config": {}, "data": {}}')
        except InputError as error:
            assert "nothing of it was touched" in str(error)  # noqa: PT017, one of eight raises nothing
        return named

    with ThreadPoolExecutor(8) as pool:
        assert {path.name for path in pool.map(begin, range(8))} == {f"a-{number}" for number in range(1, 9)}
    assert len(inside) == 1
