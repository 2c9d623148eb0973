"""What every rank does in tests/training/test_training_ranks.py, which starts them: torchrun ... CHECK..."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.errors import InputError, SynchronizationError
from batchnorm.training import TrainConfig, train
from batchnorm.training.loop import load_checkpoint, save_checkpoint, train_steps
from batchnorm.training.procedure2 import _calibrate, _Run
from batchnorm.training.ranks import Ranks, joined
from batchnorm.training.shards import gathered, is_sharded

CONFIG = TrainConfig("training_ranks:network", "training_ranks:load", steps=8, batch_size=50, eval_every=2)
CONFIG = dataclasses.replace(CONFIG, threads=1, baseline=True, optimizer="adam", lr=0.01)
SHARDED = dataclasses.replace(CONFIG, fsdp=True, baseline=False)


def load():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * 3 + 1
    return x, (x[:, 0] > x[:, 1]).long()


def network(num_features, num_classes):
    return nn.Sequential(nn.Linear(num_features, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, num_classes))


def dying(num_features, num_classes):
    """A network that kills rank 1 in the middle of the first start."""
    return nn.Sequential(_Dies(), *network(num_features, num_classes))


class _Dies(nn.Module):
    calls = 0

    def forward(self, x):
        _Dies.calls += self.training
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("DIES")
        if first and os.environ["RANK"] == "1" and _Dies.calls == 11:  # of two networks, in step 6
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def run(ranks, steps=None, config=CONFIG):
    """Built and trained; nothing is written."""
    resolved = dataclasses.replace(config.resolve(), **({} if steps is None else {"steps": steps}))
    made = _Run.build(resolved, None, ranks)
    with tempfile.TemporaryDirectory() as folder:
        train_steps(made.contenders, made.data, resolved, Path(folder) / "c.pt", ranks=ranks)
    return made


def values(made):
    return {
        f"{name}.{key}": value
        for name, contender in made.contenders.items()
        for key, value in contender.network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def close(a, b, what, rtol=2e-4):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=rtol, atol=1e-5, msg=lambda m, k=key: f"{what}, {k}: {m}")


def check_curves(ranks):
    """On several ranks the curve is that of one process, and all ranks end with the same bits; unequal shares, too."""
    for size in (50, 49):
        config = dataclasses.replace(CONFIG, batch_size=size)
        alone, together = run(Ranks(), config=config), run(ranks, config=config)
        for name, contender in together.contenders.items():
            expected, curve = alone.contenders[name].curve, contender.curve
            assert curve.steps == expected.steps == [0, 2, 4, 6, 8]
            for mine, theirs in (
                (curve.test_loss, expected.test_loss),
                (curve.train_loss[1:], expected.train_loss[1:]),
            ):
                assert mine == pytest.approx(theirs, rel=1e-4)
            assert ranks.gather(curve.test_loss) == [curve.test_loss] * ranks.size
            ranks.check_equal(contender.network, name)
        close(values(together), values(alone), f"batches of {size}")
        calibrations = []
        for made, of in ((alone, Ranks()), (together, ranks)):
            net = made.contenders["batch norm"].network
            calibrations.append(_calibrate(net, made.data, made.config, of))
        assert calibrations[0].loss_exact == pytest.approx(calibrations[1].loss_exact, rel=1e-4)
        close(values(together), values(alone), f"calibrated on batches of {size}")
        ranks.check_equal(together.contenders["batch norm"].network, "calibrated")


def check_own_statistics(ranks):
    """Each rank's own: another curve, and all the same the same bits on every rank."""
    own = Ranks(ranks.rank, ranks.size, synchronized=False)
    made, whole = run(own), run(ranks)
    assert made.contenders["batch norm"].curve.test_loss[-1] != whole.contenders["batch norm"].curve.test_loss[-1]
    assert made.contenders["baseline"].curve.test_loss == whole.contenders["baseline"].curve.test_loss
    own.check_equal(made.contenders["batch norm"].network, "own statistics")


def check_resumed(ranks):
    """A run that goes on from a checkpoint ends with the bits of one that never stopped."""
    folder = Path(ranks.from_first(lambda: tempfile.mkdtemp()))
    whole, half, resumed = run(ranks), run(ranks, steps=4), _Run.build(CONFIG.resolve(), None, ranks)
    save_checkpoint(folder / "c.pt", 4, half.contenders, half.data, ranks)
    ranks.gather(None)  # the file is there
    assert load_checkpoint(folder / "c.pt", resumed.contenders, resumed.data, ranks) == 4
    for contender in resumed.contenders.values():
        contender.curve.steps.pop()  # the half run measured at its end
        assert contender.curve.steps == [0, 2]
    _drop_last(resumed)
    train_steps(resumed.contenders, resumed.data, resumed.config, folder / "d.pt", start=4, ranks=ranks)
    expected = values(whole)
    assert all(torch.equal(value, expected[key]) for key, value in values(resumed).items())


def _drop_last(made):
    for contender in made.contenders.values():
        for name in ("train_loss", "test_loss", "test_accuracy", "percentiles"):
            getattr(contender.curve, name).pop()


def sharded_run(ranks, steps=None):
    """As `run`, with parameters that are cut over the ranks; with the networks gathered at the end."""
    cut = copy.copy(ranks)
    cut.sharded = True
    made = run(cut, steps, SHARDED)
    return cut, made


def whole_values(made):
    """As `values`, with whole parameters."""
    return {
        f"{name}.{key}": value.clone()
        for name, contender in made.contenders.items()
        for key, value in gathered(contender.network, contender.whole).state_dict().items()
    }


def check_sharded(ranks):
    """In bfloat16 the curve is that of whole parameters to its rounding; statistics are float32, equal on all ranks."""
    cut, made = sharded_run(ranks)
    _, half = sharded_run(ranks, steps=4)
    whole = run(ranks, config=dataclasses.replace(SHARDED, fsdp=False)).contenders["batch norm"].curve
    assert made.contenders["batch norm"].curve.test_loss == pytest.approx(whole.test_loss, rel=5e-3)
    network = made.contenders["batch norm"].network
    assert is_sharded(network)
    local = sum(p.to_local().numel() for p in network.parameters())
    assert local < 0.9 * sum(p.numel() for p in network.parameters()) or ranks.size == 1
    assert {b.dtype for n, b in network.named_buffers() if "running" in n} == {torch.float32}
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d)):
        assert ranks.gather(norm.running_var.tolist()) == [norm.running_var.tolist()] * ranks.size
    folder = Path(os.environ["SHARDS"])
    save_checkpoint(folder / "checkpoint.pt", 4, half.contenders, half.data, cut)
    expected = whole_values(half)
    if ranks.is_first:
        torch.save(expected, folder / "expected.pt")
    ranks.gather(None)  # the files are there
    resumed = _Run.build(SHARDED.resolve(), None, cut)
    assert load_checkpoint(folder / "checkpoint.pt", resumed.contenders, resumed.data, cut) == 4
    for contender in resumed.contenders.values():
        contender.curve.steps.pop()
    _drop_last(resumed)
    train_steps(resumed.contenders, resumed.data, resumed.config, folder / "d" / "c.pt", start=4, ranks=cut)
    expected = whole_values(made)
    assert all(torch.equal(value, expected[key]) for key, value in whole_values(resumed).items())


def check_sharded_elsewhere(ranks):
    """What other ranks have written, on this number of ranks."""
    cut = copy.copy(ranks)
    cut.sharded = True
    folder = Path(os.environ["SHARDS"])
    made = _Run.build(SHARDED.resolve(), None, cut)
    assert load_checkpoint(folder / "checkpoint.pt", made.contenders, made.data, cut) == 4
    expected = torch.load(folder / "expected.pt")
    assert all(torch.equal(value, expected[key]) for key, value in whole_values(made).items())
    train_steps(made.contenders, made.data, made.config, folder / "e" / "c.pt", start=4, ranks=cut)
    _, whole = sharded_run(ranks)
    for name, contender in whole.contenders.items():
        assert made.contenders[name].curve.test_loss[-1] == pytest.approx(contender.curve.test_loss[-1], rel=2e-3)


def check_refused(ranks):
    """Batches of which a rank would have too little, and what the first rank refuses."""
    own = Ranks(ranks.rank, ranks.size, synchronized=False)
    with pytest.raises(InputError, match="batch_size"):
        run(own, config=dataclasses.replace(CONFIG, batch_size=2 * ranks.size - 1))
    with pytest.raises(InputError, match="from the first"):
        ranks.from_first(_fail)


def _fail():
    raise InputError("from the first")


def check_other_bits(ranks):
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(float(ranks.rank))
        net.bias.zero_()
    with pytest.raises(SynchronizationError, match=r"rank\(s\) \[1"):
        ranks.check_equal(net, "a layer")


def check_lost(ranks, how="stuck"):
    """A rank that is stuck, or has left, ends the others within the limit, by name; comes last."""
    made = run(ranks, steps=2)
    contender = made.contenders["batch norm"]
    began = time.monotonic()

    def leave(module, args):
        if ranks.rank == 1 and ranks.step == 3:
            if how == "dead":
                os._exit(0)
            time.sleep(12)

    contender.network.register_forward_pre_hook(leave)
    resolved = dataclasses.replace(CONFIG.resolve(), steps=4)
    try:
        train_steps(
            {"batch norm": contender}, made.data, resolved, Path(tempfile.mkdtemp()) / "c", start=2, ranks=ranks
        )
    except SynchronizationError as error:
        text = str(error)
    else:
        raise AssertionError("no error")
    if ranks.rank == 0:
        assert "rank 0 of 2, step 3: layer '" in text, text
        assert "rank 1" in text.partition("last heard of")[2], text
        assert time.monotonic() - began < 11, text
    print(text, flush=True)


def check_dead(ranks):
    check_lost(ranks, "dead")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "elastic":
        train(dataclasses.replace(CONFIG, network="training_ranks:dying", out=sys.argv[2], checkpoint_every=4))
        sys.exit()
    limit = 5.0 if sys.argv[-1] == "lost" else 60.0
    with joined("cpu", True, limit, sharded=True) as mine:
        mine.sharded = False
        for name in sys.argv[1:]:
            globals()[f"check_{name}"](copy.copy(mine))
