"""Running statistics do not stick: what rounding leaves of each step is carried to the next."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYERS = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d, 3: bn.BatchNorm3d}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"running_var": "biased"},
    "skip": {"nonfinite": "skip"},
    "skip_channel": {"nonfinite": "skip_channel"},
    "renorm": {"renorm": bn.Renorm(warmup=0)},
    "ghosts": {"ghost_size": 2},
    "ghosts in turn": {"ghost_size": 2, "ghost_update": "decay"},
    "domains": {"domains": 2},
    "debiased": {"running": "debiased"},
}


def batch(rank: int, dtype: torch.dtype, mean: float = 100.0) -> torch.Tensor:
    """Values mean - 1/2 and mean + 1/2 by turns, 4 samples of 2 channels."""
    x = torch.full((4, 2, *(() if rank == 1 else (2,) * rank)), mean, dtype=dtype)
    x[::2] -= 0.5
    x[1::2] += 0.5
    return x


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_batches_reach_their_own_statistics(options: dict[str, Any], dtype: torch.dtype, rank: int):
    layer, x = LAYERS[rank](2, momentum=0.1, dtype=dtype, **options), batch(rank, dtype)
    for _ in range(450):
        layer(x)
    row = 0 if "domains" in options else slice(None)
    unbiased = options.get("running_var") != "biased"
    ghosts = options.get("ghost_update") == "decay"  # each takes in the variance of its own values
    values = (x[:2] if ghosts else x).double().transpose(0, 1).flatten(1)
    assert torch.equal(layer.running_mean[row], values.mean(1).to(dtype))
    squares = (values - values.mean(1, keepdim=True)).square()  # exact, where torch's own variance is not
    expected = (squares.sum(1) / (values.shape[1] - unbiased)).to(dtype)
    torch.testing.assert_close(layer.running_var[row], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.01])
@pytest.mark.parametrize("value", [2026.0, 1e6, 0.1, -3e7])
def test_a_constant_column_evaluates_to_beta(value: float, momentum: float):
    layer, x = bn.BatchNorm1d(1, momentum=momentum), torch.full((8, 1), value)
    for _ in range(int(30 / momentum)):
        layer(x)
    assert abs(layer.eval()(x)[0].item()) < 1e-3


@pytest.mark.parametrize("pool", ["sequence", "frame"])
def test_sequences(pool: str):
    layer = bn.BatchNorm1d(2, momentum=0.05, pool=pool, max_steps=3 if pool == "frame" else 0)
    x = torch.full((4, 3, 2), 2026.0)
    for _ in range(600):
        layer(x)
    assert layer.eval()(x).abs().max() < 1e-3


def test_the_carry_is_no_buffer_and_no_key():
    ours, theirs = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    ours(torch.randn(4, 3))
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_copies_and_pickles_have_a_carry_of_their_own_and_old_pickles_load():
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.running_carry is not layer.running_carry
        assert torch.equal(twin.running_carry, layer.running_carry)
    state = layer.__getstate__()
    del state["running_carry"]
    old = bn.BatchNorm1d.__new__(bn.BatchNorm1d)
    old.__setstate__(state)
    old(torch.randn(4, 3))
    assert old.running_carry is not None


@pytest.mark.parametrize("assign", [False, True])
def test_loading_and_resetting_forget_the_carry(assign: bool):
    layer, fresh = bn.BatchNorm1d(3, momentum=0.01), bn.BatchNorm1d(3, momentum=0.01)
    layer(torch.randn(4, 3))
    state = {key: value.clone() for key, value in nn.BatchNorm1d(3).state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    x = torch.randn(4, 3)
    layer(x), fresh(x)
    assert torch.equal(layer.running_carry, fresh.running_carry)
    layer.reset_running_stats()
    assert layer.running_carry is None


def test_a_carry_counts_for_nothing_where_somebody_else_wrote_the_statistics():
    layer, fresh = bn.BatchNorm1d(2, momentum=0.01), bn.BatchNorm1d(2, momentum=0.01)
    x = torch.randn(4, 2)
    layer(x * 1e6)
    layer.running_mean.zero_(), layer.running_var.fill_(1.0), layer.running_carry.fill_(7.0)
    layer(x), fresh(x)
    assert torch.equal(layer.running_mean, fresh.running_mean)
    assert torch.equal(layer.running_carry, fresh.running_carry)


@pytest.mark.filterwarnings("ignore:.*is not finite", "ignore:momentum=")
@pytest.mark.parametrize("momentum", [0.1, 0.6])
@pytest.mark.parametrize("name", ["plain", "biased", "renorm", "domains", "debiased"])
def test_an_infinite_average_stays_infinite_as_in_torch(name: str, momentum: float):
    options = OPTIONS[name]
    layer, plain = bn.BatchNorm1d(3, momentum=momentum, **options), nn.BatchNorm1d(3, momentum=momentum)
    x = torch.tensor([1.0, 2.0, 4.0, 3.0])[:, None] * torch.ones(3)
    for k in range(3):
        given = x.clone()
        given[0, 1] = torch.inf if k == 0 else 1.0
        layer(given), plain(given)
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(layer, name).view(-1, 3)[0], getattr(plain, name)
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_other_dtypes_and_numbers_of_channels_make_the_carry_anew():
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    layer.double()
    layer(torch.randn(4, 3).double())
    assert layer.running_carry.dtype == torch.float64
    keep = torch.tensor([0, 2])
    layer.weight, layer.bias = (nn.Parameter(each.data[keep]) for each in (layer.weight, layer.bias))
    layer.running_mean, layer.running_var = layer.running_mean[keep], layer.running_var[keep]
    layer.num_features = 2
    layer(torch.randn(4, 2).double())
    assert layer.running_carry.shape == (2, 2)


def test_an_overflow_is_told_with_the_layer_in_evaluation():
    layer = bn.BatchNorm1d(1)
    layer.label = "encoder.norm"
    layer.running_var.fill_(torch.inf)
    with pytest.warns(UserWarning, match=r"layer 'encoder.norm': running_var is not finite.*scale the input"):
        torch.nn.Sequential(layer).eval()


def test_the_advice_of_calibrate_helps():
    data = [torch.randn(512, 1) * 1e20]
    net = torch.nn.Sequential(bn.BatchNorm1d(1), torch.nn.Linear(1, 2))
    with pytest.raises(bn.BatchNormError, match="scale the input of the layer, or keep the layer in float64"):
        bn.calibrate(net, data)
    bn.calibrate(net.double(), [x.double() for x in data])
    assert net[0].running_var.isfinite().all()


CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "by double": (lambda m: m.double().to(torch.bfloat16), torch.bfloat16),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"pool": "sequence"}, {"activation": "relu"}])
def test_statistics_stay_wide_beside_16_bits(options: dict[str, Any], rank: int, convert: Any):
    if rank > 1 and "pool" in options:
        return
    to, dtype = convert
    layer = to(LAYERS[rank](2, **options))
    assert layer.weight.dtype is dtype
    x = batch(rank, dtype) if "pool" not in options else batch(rank, dtype)[:, None].expand(4, 2, 2)
    for _ in range(3):
        layer(x).sum().backward()
    assert {layer.running_mean.dtype, layer.running_var.dtype} == {torch.float32}
    y = layer.eval()(x)
    assert y.dtype is dtype
    twin = copy.deepcopy(layer).double()
    torch.testing.assert_close(y.double(), twin(x.double()), rtol=1e-2, atol=1e-2)


def test_a_large_variance_has_room_in_a_network_of_half_precision():
    layer = bn.BatchNorm1d(2).half()
    for _ in range(100):
        layer((torch.randn(64, 2) * 300).half())
    assert layer.running_var.isfinite().all()
    assert (layer.running_var > 65504).any()


def test_16_bits_are_there_for_who_insists():
    made = bn.BatchNorm1d(2, dtype=torch.float16)
    assert made.half().running_var.dtype is torch.float16
    layer = bn.BatchNorm1d(2).half()
    layer.running_mean, layer.running_var = layer.running_mean.half(), layer.running_var.half()
    layer(torch.randn(8, 2).half())
    assert layer.half().running_var.dtype is torch.float16
    assert bn.BatchNorm1d(2).to("meta").to_empty(device="cpu").running_var.dtype is torch.float32


def test_that_they_stay_wide_is_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchnorm.nn.buffers._told", False)
    net = nn.Sequential(bn.BatchNorm1d(2), bn.BatchNorm1d(2))
    with pytest.warns(UserWarning, match="stay float32") as told:
        net.half()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn.BatchNorm1d(2).half()


def test_states_of_16_bits_load_both_ways():
    ours, theirs = bn.BatchNorm1d(2).half(), nn.BatchNorm1d(2).half()
    theirs(torch.randn(8, 2).half() + 3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_mean, theirs.running_mean.float())
    theirs.load_state_dict(ours.state_dict())
    assert theirs.running_mean.dtype is torch.float16


@pytest.mark.parametrize("way", ["convert", "revert", "unfreeze"])
def test_torchs_layer_computes_with_what_it_gets_back(way: str):
    net, x = nn.Sequential(nn.BatchNorm2d(2)), torch.randn(4, 2, 3, 3).bfloat16()
    if way == "unfreeze":
        bn.unfreeze(bn.freeze(net).to(torch.bfloat16))
    else:
        bn.convert(net).to(torch.bfloat16)
        net = bn.revert(net) if way == "revert" else bn.convert(net, to="torch")
    assert type(net[0]) is nn.BatchNorm2d
    assert net(x).dtype is torch.bfloat16
    net.eval()(x)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_overflow_is_told_at_once_with_the_layers_name(options: dict[str, Any]):
    layer = bn.BatchNorm1d(2, **options)
    layer.label = "encoder.norm"
    x = torch.randn(64, 2) * 1e20
    if "nonfinite" in options:  # refused, and counted
        layer(x)
        assert layer.running_var.isfinite().all()
        return
    with pytest.warns(UserWarning, match=r"encoder\.norm.*float64"):
        layer(x)


@pytest.mark.parametrize("number", [300, 30_000])
def test_many_equal_batches_converge_to_their_own_statistics(number: int):
    layer, x = bn.BatchNorm1d(2, momentum=0.001 if number > 300 else 0.1), torch.randn(8, 2) + 1e4
    for _ in range(number):
        layer(x)
    var, mean = torch.var_mean(x.double(), 0)
    assert torch.equal(layer.running_mean, mean.float())
    torch.testing.assert_close(layer.running_var, var.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", [bn.LSTM, bn.GRU, bn.RNN])
@pytest.mark.parametrize("pool", ["sequence", "frame"])
def test_recurrences(kind: Any, pool: str):
    layer = kind(2, 2, batch_norm=pool, recurrent=True, max_steps=3, momentum=0.2, batch_first=True)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1000.0)
    x = torch.tensor([[1.0, 1.013], [1.0, 1.013]])[:, None].expand(2, 3, 2)
    for _ in range(150):
        layer(x)
    gates = (x @ layer.weight_ih_l0.T).reshape(-1, layer.weight_ih_l0.shape[0])
    norm = layer.norm_ih_l0
    assert torch.equal(norm.running_mean.reshape(-1, gates.shape[1])[0], gates[0])


def test_a_round_trip_through_a_checkpoint_costs_at_most_one_rounding(tmp_path: Any):
    x, layer = torch.full((8, 1), 2026.0), bn.BatchNorm1d(1, momentum=0.01)
    for number in range(3000):
        layer(x)
        if number % 500 == 499:
            torch.save(layer.state_dict(), tmp_path / "state.pt")
            layer = bn.BatchNorm1d(1, momentum=0.01)
            layer.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert abs(layer.eval()(x)[0].item()) < 1e-3


def test_buffers_that_another_rank_broadcasts():
    """What DDP does before each forward: rank 0's buffers, and each rank's own carry beside them."""
    first, second = (bn.BatchNorm1d(1, momentum=0.01) for _ in range(2))
    x = torch.full((8, 1), 2026.0)
    for _ in range(3000):
        for name, buffer in second.named_buffers():
            buffer.copy_(getattr(first, name))
        first(x), second(x + torch.randn(8, 1))
    assert abs(first.eval()(x)[0].item()) < 1e-3
    torch.testing.assert_close(second.running_mean, first.running_mean, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.01, "ghost_size": 2}, {"domains": 2}, {"nonfinite": "skip"}])
def test_a_run_that_goes_on_from_its_state_has_the_bits_of_one_that_was_not_stopped(options, tmp_path):
    net, data = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options)), torch.randn(30, 4, 3) + 100
    for x in data[:15]:
        net(x)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other[1].running_carry is not net[1].running_carry
    for x in data[15:]:
        assert torch.equal(net(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))
    assert torch.equal(net[1].running_carry, other[1].running_carry)


def test_a_carry_of_other_statistics_is_not_taken_over():
    trained = bn.BatchNorm1d(3)
    trained(torch.randn(4, 3))
    for layer in (bn.BatchNorm1d(3).double(), bn.BatchNorm1d(3, domains=2)):
        layer.load_state_dict(trained.state_dict())
        assert layer.running_carry is None
