"""Statistics merged over models and ranks, adapted to new data, and brought back."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import InputError, SynchronizationError

KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]


def contents(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def network(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), kind(3), nn.Dropout(0.5), nn.Linear(3, 3), kind(3))


# Averages of models


def plain(state: dict[str, Tensor], form: str) -> Any:
    """A state as other programs send it."""
    arrays = {key: value.numpy() for key, value in state.items()}
    if form == "sequence":
        return list(arrays.values())
    return arrays if form == "arrays" else {key: value.tolist() for key, value in arrays.items()}


@pytest.mark.parametrize("form", ["arrays", "lists", "sequence"])
@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_states_as_other_programs_send_them(form: str, weights: list[int] | None):
    models = [network(bn.BatchNorm1d, seed) for seed in range(2)]
    for model in models:
        model(torch.randn(6, 4) * 3)
    expected, found = network(bn.BatchNorm1d, 5), network(bn.BatchNorm1d, 5)
    bn.average_statistics(expected, models, weights=weights)
    bn.average_statistics(found, [plain(model.state_dict(), form) for model in models], weights=weights)
    assert same(contents(expected), contents(found))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("1.running_mean", None, "1.running_mean"),
        ("1.running_mean", "abc", "1.running_mean"),
        ("4.running_var", [[1.0], [2.0, 3.0]], "4.running_var"),
        ("4.running_var", np.array([1.0, -1.0, 1.0]), "4.running_var.*negative"),
        ("4.running_var", [1.0, math.nan, 1.0], "4.running_var.*finite"),
        ("1.num_batches_tracked", -1, "num_batches_tracked.*negative"),
        ("1.running_mean", np.array([1j] * 3), "1.running_mean"),
    ],
)
def test_errors_name_model_and_key_and_change_nothing(key: str, value: Any, named: str):
    net = network(bn.BatchNorm1d)
    net(torch.randn(6, 4))
    good, bad = plain(net.state_dict(), "arrays"), plain(net.state_dict(), "arrays")
    bad[key] = value
    before = contents(net)
    with pytest.raises(InputError, match=f"model 1.*{named}"):
        bn.average_statistics(net, [good, bad])
    del bad[key]
    with pytest.raises(InputError, match=f"model 1 has no {key}"):
        bn.average_statistics(net, [good, bad])
    assert same(before, contents(net))


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, math.nan], ["a", 1], 3, [1, math.inf]])
def test_weights_that_are_none(weights: Any):
    net = network(bn.BatchNorm1d)
    with pytest.raises(InputError, match="weights="):
        bn.average_statistics(net, [net, net], weights=weights)


@pytest.mark.parametrize("model", [3, [1, 2], "state", np.zeros(3)])
def test_what_is_no_state(model: Any):
    net = network(bn.BatchNorm1d)
    with pytest.raises(InputError, match="model 0"):
        bn.average_statistics(net, [model], weights=[1])


class Sub(nn.BatchNorm1d):
    pass


def test_keys_of_shared_and_subclassed_layers():
    shared = bn.BatchNorm1d(3)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(3, 3), shared), "c": Sub(3, affine=False)})
    net["d"] = nn.BatchNorm1d(3, track_running_stats=False)
    net["e"] = nn.LayerNorm(3)
    net["f"] = nn.InstanceNorm1d(3, track_running_stats=True)
    net["g"] = bn.LSTM(3, 2, batch_norm="sequence")
    statistics, affine, everything = (bn.statistics_keys(net, kind) for kind in ("statistics", "affine", "all"))
    state = net.state_dict()
    assert set(everything) == set(statistics) | set(affine)
    assert not set(statistics) & set(affine)
    for place in ("a", "b.1"):
        for end in ("running_mean", "running_var", "num_batches_tracked"):
            assert f"{place}.{end}" in statistics
        assert {f"{place}.weight", f"{place}.bias"} <= set(affine)
    assert [key for key in everything if key.startswith("c.")] == [
        "c.running_mean",
        "c.running_var",
        "c.num_batches_tracked",
    ]
    assert [key for key in everything if key.startswith("d.")] == ["d.weight", "d.bias"]
    assert not [key for key in everything if key[0] in "ef"]
    assert any(key.startswith("g.") for key in statistics)
    assert everything == [key for key in state if key in everything]
    assert bn.statistics_keys(bn.BatchNorm1d(2), "affine") == ["weight", "bias"]
    assert bn.statistics_keys(nn.Linear(2, 2), "all") == []
    with pytest.raises(InputError, match="kind"):
        bn.statistics_keys(net, "none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Dict"):
        bn.statistics_keys(state)  # type: ignore[arg-type]


def test_a_shared_layer_is_averaged_under_both_names():
    shared = nn.BatchNorm1d(2)
    net = nn.Sequential(shared, shared)
    states = [{k: np.full(v.shape, fill, dtype=np.float64) for k, v in net.state_dict().items()} for fill in (1, 3)]
    bn.average_statistics(net, states, weights=[1, 1])
    assert shared.running_mean.tolist() == [2, 2]
    assert shared.running_var.tolist() == [3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_models_keep_the_variance_between_them(kind: type[nn.Module]):
    """Two halves of one population: torch's average of the buffers has lost most of the variance."""
    halves = [torch.randn(500, 3) + 5, torch.randn(500, 3) - 5]
    models = [nn.Sequential(kind(3, momentum=None)) for _ in halves]
    for model, x in zip(models, halves, strict=True):
        for part in x.split(100):
            model(part)
    swa = AveragedModel(models[0], use_buffers=True)
    for model in models:
        swa.update_parameters(model)
    blind = swa.module[0].running_var.clone()
    assert bn.average_statistics(swa, models) is swa
    truth = torch.cat(halves).var(0)
    assert (blind - truth).abs().min() > 20
    torch.testing.assert_close(swa.module[0].running_var, truth, rtol=0.02, atol=0)
    torch.testing.assert_close(swa.module[0].running_mean, torch.cat(halves).mean(0), rtol=1e-4, atol=1e-5)
    assert swa.module[0].num_batches_tracked == 10


def test_models_count_by_their_batches_or_by_weights():
    models = [network(bn.BatchNorm1d, seed) for seed in range(3)]
    for i, model in enumerate(models):
        for _ in range(2 * i + 1):
            model(torch.randn(6, 4) * (i + 1))
    target = network(bn.BatchNorm1d)
    for weights in (None, [0.0, 2.0, 6.0]):
        bn.average_statistics(target, [m.state_dict() for m in models], weights=weights)
        share = np.array(weights or [1.0, 3.0, 5.0]) / sum(weights or [9.0])
        for i in (1, 4):
            mean = np.stack([m[i].running_mean.double() for m in models])
            var = np.stack([m[i].running_var.double() for m in models])
            want = share @ mean
            np.testing.assert_allclose(target[i].running_mean, want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(target[i].running_var, share @ (var + (mean - want) ** 2), rtol=1e-5)
    assert target[1].num_batches_tracked == 9


def test_the_average_of_equal_models_is_the_model():
    model = network(nn.BatchNorm1d)
    model(torch.randn(6, 4))
    before = contents(model)
    bn.average_statistics(model, [model, copy.deepcopy(model)], weights=[0.999, 0.001])
    assert same(contents(model), before)


def test_models_that_do_not_fit_change_nothing():
    net, other = network(bn.BatchNorm1d), network(bn.BatchNorm1d)
    other[4] = bn.BatchNorm1d(5)
    before = contents(net)
    cases: list[tuple[Any, Any, str]] = [
        ([], None, "0 models"),
        ([other], [1.0], "layer '4' has 3 channels"),
        ([net, other], [1.0, 1.0], "has shapes"),
        ([nn.Sequential(bn.BatchNorm1d(3))], [1.0], "model 0 has no 1.running_mean"),
        ([net], [1.0, 2.0], "expected as many"),
        ([net], [-1.0], "expected as many"),
        ([net], None, "tracked no batch"),
    ]
    for models, weights, reason in cases:
        with pytest.raises(InputError, match=reason):
            bn.average_statistics(net, models, weights=weights)
    assert same(contents(net), before)


# Adaptation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [0, 5, 100.0, math.inf])
def test_adapted_statistics_are_the_mixture(kind: type[nn.Module], prior: float):
    net, data = network(kind).train(), [torch.randn(n, 4) * 2 + 3 for n in (6, 9)]
    net(data[0])
    measured = bn.calibrate(copy.deepcopy(net), data)
    before, source = contents(net), copy.deepcopy(net)
    assert bn.adapt(net, data, prior=prior) is net
    for i in (1, 4):
        pair = [
            reference.Statistics(n[i].running_mean.double().numpy(), n[i].running_var.double().numpy())
            for n in (source, measured)
        ]
        want = reference.adapt_statistics(*pair, prior=prior, samples=15)
        np.testing.assert_allclose(net[i].running_mean, want.mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(net[i].running_var, want.var, rtol=1e-6)
        assert net[i].num_batches_tracked == source[i].num_batches_tracked
    assert net.training
    bn.restore(net)
    assert same(contents(net), before)
    assert bn.restore(net) is net


@pytest.mark.parametrize("method", ["statistics", "tent"])
def test_adapting_twice_is_adapting_to_the_second(method: Any):
    once, twice = network(bn.BatchNorm1d), network(bn.BatchNorm1d)
    first, second = [torch.randn(9, 4)], [torch.randn(9, 4) + 3]
    bn.adapt(twice, first, method=method)
    bn.adapt(twice, second, method=method)
    bn.adapt(once, second, method=method)
    assert same(contents(once), contents(twice))
    bn.restore(twice)
    assert same(contents(twice), contents(network(bn.BatchNorm1d)))


def test_statistics_of_the_shifted_data_help():
    """Under a shift torch's layer in evaluation gives wrong classes; adapted it is right again."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        net[1].bias.zero_()
    clean = torch.randn(400, 2)
    label, shifted = (clean[:, 0] < 0).long(), clean * 4 + 20
    net.eval()
    assert (net(shifted).argmax(1) == label).float().mean() < 0.6
    bn.adapt(net, shifted, prior=4)
    assert (net(shifted).argmax(1) == label).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_tent_lowers_the_entropy_by_gamma_and_beta_alone(kind: type[nn.Module]):
    net, data = network(kind).train(), [torch.randn(32, 4) for _ in range(20)]
    net[1].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)

    def entropy(net: nn.Module) -> float:
        log_p = net.eval()(torch.cat(data)).log_softmax(-1)
        return float(-(log_p.exp() * log_p).sum(-1).mean().detach())

    before, start = contents(net), entropy(bn.adapt(copy.deepcopy(net), data, prior=0))
    bn.adapt(net, data, method="tent", prior=0, learning_rate=0.05)
    after = contents(net)
    assert net.training
    assert entropy(copy.deepcopy(net)) < start - 0.05
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{i}.{k}" for i in (1, 4) for k in ("weight", "bias", "running_mean", "running_var")}
    assert type(net[1]) is kind
    assert not net[1].bias.requires_grad
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    bn.restore(net)
    assert same(contents(net), before)


def test_an_adaptation_that_fails_changes_nothing():
    net = network(nn.BatchNorm1d).train()
    before = contents(net)
    good, bad = torch.randn(8, 4), torch.full((8, 4), math.nan)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([good], {"prior": -1}, "got prior=-1"),
        ([good], {"method": "entropy"}, "got method='entropy'"),
        ([], {}, "no batches"),
        ([good, bad], {}, "not finite"),
        ([good, bad], {"method": "tent"}, "not finite"),
        (iter([good]), {"method": "tent"}, "one-shot"),
    ]
    for data, options, reason in cases:
        with pytest.raises(InputError, match=reason):
            bn.adapt(net, data, **options)
        assert same(contents(net), before)
        assert net.training
        assert type(net[1]) is nn.BatchNorm1d
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
    bn.restore(net)
    assert same(contents(net), before)


# calibrate, with our layers' options and over ranks


@pytest.mark.parametrize("method", ["pooled", "ioffe", "sequential"])
def test_calibrated_under_options_and_modes(method: Any):
    data = [torch.randn(n, 3) * 2 + 1 for n in (5, 9)]
    options = {"source": "batch", "update": "always", "running_var": "biased", "example_weight": 0.5}
    net, plain = nn.Sequential(bn.BatchNorm1d(3, **options)), nn.Sequential(nn.BatchNorm1d(3))
    shown = repr(net)
    bn.calibrate(net, data, method=method)
    bn.calibrate(plain, data, method=method)
    torch.testing.assert_close(net[0].running_var, plain[0].running_var * (13 / 14))
    torch.testing.assert_close(net[0].running_mean, plain[0].running_mean)
    assert repr(net) == shown
    before = contents(net)
    with pytest.raises(InputError, match="not finite"):
        bn.calibrate(net, [data[0], torch.full((4, 3), math.nan)], method=method)
    assert same(contents(net), before)


def _calibrate_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parts = torch.load(f"{folder}/data.pt", weights_only=True)
    for method in ("pooled", "ioffe", "sequential"):
        net = network(nn.BatchNorm1d)
        mine = [parts[0], parts[1]] if rank == 0 else [parts[2]]
        bn.calibrate(net, mine, method=method, process_group="world")
        torch.save(net.state_dict(), f"{folder}/{method}{rank}.pt")
    net = network(nn.BatchNorm1d)
    before = contents(net)
    bad = torch.full((4, 4), math.nan)
    with pytest.raises(InputError, match="not finite" if rank else "1 other rank"):
        bn.calibrate(net, [bad if rank else parts[0]], process_group="world")
    assert same(contents(net), before)
    bn.calibrate(net, [] if rank else [parts[0]], process_group="world")
    other = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 2 + rank), bn.BatchNorm1d(2 + rank))
    with pytest.raises(SynchronizationError, match=r"layer '3'.*rank 0: \(2,\), rank 1: \(3,\)"):
        bn.calibrate(other, [torch.randn(6, 4)], process_group="world")
    before = contents(net)
    if rank == 0:  # comes last: the other one does not answer
        with pytest.raises(SynchronizationError, match=r"rank 0.*layer '.*rank\(s\) \[1\].*timeout=1 seconds"):
            bn.calibrate(net, [parts[0]], process_group="world", timeout=1)
        assert same(before, contents(net))
        (Path(folder) / "done").touch()
    while not (Path(folder) / "done").exists():
        time.sleep(0.1)
    torch.save(net.state_dict(), f"{folder}/empty{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_on_the_statistics_of_all_data(tmp_path):
    parts = [torch.randn(n, 4) * (n / 4) for n in (5, 8, 13)]
    torch.save(parts, tmp_path / "data.pt")
    multiprocessing.spawn(_calibrate_on_a_rank, (str(tmp_path),), nprocs=2)
    for method in ("pooled", "ioffe", "sequential", "empty"):
        ranks = [torch.load(tmp_path / f"{method}{r}.pt", weights_only=True) for r in range(2)]
        assert same(*ranks)
        alone = network(nn.BatchNorm1d)
        if method == "empty":
            bn.calibrate(alone, parts[:1])
        else:
            bn.calibrate(alone, parts, method=method)
        torch.testing.assert_close(dict(ranks[0]), dict(alone.state_dict()), rtol=1e-6, atol=1e-7)
