"""Training on real ranks; what each rank does is in training_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
HERE = Path(__file__).parent


def run_ranks(ranks, *arguments, options=(), **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    done = subprocess.run(
        [*command, str(HERE / "training_ranks.py"), *arguments],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_ranks():
    run_ranks(2, "curves", "own_statistics", "resumed", "refused", "other_bits")


def test_four_ranks():
    run_ranks(4, "curves", "resumed")


def test_sharded_parameters_and_their_checkpoints_on_another_number_of_ranks(tmp_path):
    for name in "de":
        (tmp_path / name).mkdir()
    run_ranks(2, "sharded", SHARDS=str(tmp_path))
    run_ranks(1, "sharded_elsewhere", SHARDS=str(tmp_path))  # on four, too, by hand: a minute more


def test_a_stuck_rank_is_named_within_the_limit():
    assert "rank 1" in run_ranks(2, "lost")


def test_a_rank_that_leaves_is_named():
    assert "rank 1" in run_ranks(2, "dead")


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_anew_and_nothing_is_lost(tmp_path):
    """With --max-restarts the run goes on from its checkpoint, to the bits of a run without an accident."""
    for name, options, environment in (("whole", (), {}), ("killed", ("--max-restarts=1",), {"DIES": "1"})):
        run_ranks(2, "elastic", str(tmp_path / name), options=options, **environment)
    whole, killed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))
    for name, curve in whole["curves"].items():
        for key in ("steps", "train_loss", "test_loss", "percentiles"):
            assert killed["curves"][name][key] == curve[key], (name, key)
    assert whole["calibration"] == killed["calibration"]
