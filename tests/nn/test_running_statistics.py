"""What running statistics become under every combination of options, and what leaves them alone."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import InputError
from batchnorm.nn import configured

COMBINATIONS = list(
    product(("ema", "debiased", "cumulative"), ("unbiased", "biased"), ("propagate", "skip", "skip_channel"))
)
# Compilation takes seconds: half of them, in which each option meets each of the others.
EACH_PAIR = [found for k, found in enumerate(COMBINATIONS) if (k // 3 + k % 3 + k // 6) % 2 == 0]


def batches(count: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4 + i, 3, 2, generator=generator) * (i + 1) + i for i in range(count)]


def truth(running: str, kind: str, data: list[Tensor], momentum: float = 0.1) -> reference.Statistics:
    arrays = [x.double().numpy() for x in data]
    unbiased = kind == "unbiased"
    if running == "ema":
        return reference.running_statistics(arrays, momentum, unbiased=unbiased)
    if running == "debiased":
        return reference.debiased_statistics(arrays, momentum, unbiased=unbiased)
    return reference.cumulative_statistics(arrays, unbiased=unbiased)


def assert_statistics(layer: nn.Module, expected: reference.Statistics, channels: Any = slice(None)) -> None:
    np.testing.assert_allclose(layer.running_mean.numpy()[channels], expected.mean[channels], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy()[channels], expected.var[channels], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("running", "kind", "nonfinite"), COMBINATIONS)
def test_every_estimate(running: str, kind: str, nonfinite: str):
    layer = bn.BatchNorm1d(3, running=running, running_var=kind, nonfinite=nonfinite)
    data = batches()
    for x in data:
        layer(x)
    assert_statistics(layer, truth(running, kind, data))
    assert layer.num_batches_tracked == len(data)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.load_state_dict(layer.state_dict())
        copied(data[0])
        assert_statistics(copied, truth(running, kind, [*data, data[0]]))
    shown = repr(layer)
    for name, value, default in (
        ("running", running, "ema"), ("running_var", kind, "unbiased"), ("nonfinite", nonfinite, "propagate"),
    ):  # fmt: skip
        assert (f" {name}={value!r}" in shown) == (value != default)


@pytest.mark.parametrize(("running", "kind", "nonfinite"), COMBINATIONS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_batch(running: str, kind: str, nonfinite: str, bad: float):
    """torch's running statistics are poisoned for good; here the batch, or its channel, never was."""
    data = batches()
    poisoned = [x.clone() for x in data]
    poisoned[2][1, 1, 0] = bad
    layer = bn.BatchNorm1d(3, running=running, running_var=kind, nonfinite=nonfinite)
    theirs = nn.BatchNorm1d(3)
    for x in poisoned:
        theirs(x)
        layer(x)
    assert not torch.isfinite(theirs.running_var[1])
    without = truth(running, kind, data[:2] + data[3:])
    if nonfinite == "propagate":
        assert not torch.isfinite(layer.running_var[1])
        assert_statistics(layer, truth(running, kind, data), [0, 2])
    elif nonfinite == "skip":
        assert_statistics(layer, without)
        assert layer.num_batches_skipped == 1
        assert layer.num_batches_tracked == 4
    else:
        assert_statistics(layer, truth(running, kind, data), [0, 2])
        assert_statistics(layer, without, [1])
        assert layer.num_batches_skipped.tolist() == [0, 1, 0]
        assert layer.num_batches_tracked == 5


def test_what_overflows_the_buffer_is_not_finite():
    layer = bn.BatchNorm1d(2, nonfinite="skip_channel", dtype=torch.float16)
    x = torch.tensor([[3e4, 1.0], [-3e4, 2.0]], dtype=torch.float16)
    layer(x)
    assert layer.num_batches_skipped.tolist() == [1, 0]
    assert layer.running_var.isfinite().all()


def test_the_counter_is_state_only_where_it_is_asked_for():
    plain, counting = bn.BatchNorm1d(3), bn.BatchNorm1d(3, nonfinite="skip")
    assert list(plain.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    assert "num_batches_skipped" in counting.state_dict()
    counting(torch.full((3, 3), math.nan))
    again = bn.BatchNorm1d(3, nonfinite="skip")
    again.load_state_dict(counting.state_dict())
    assert again.num_batches_skipped == 1
    again.load_state_dict(plain.state_dict(), strict=True)
    again.nonfinite = "propagate"
    assert list(again.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("running", "kind", "nonfinite"), EACH_PAIR)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_and_exported(running: str, kind: str, nonfinite: str):
    layers = [bn.BatchNorm1d(3, running=running, running_var=kind, nonfinite=nonfinite) for _ in range(3)]
    data = batches()
    torch._dynamo.reset()
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    exported = torch.export.export(
        layers[2], (data[0],), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    ).module()
    for x in data:
        expected = layers[0](x)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(exported(x), expected)
    for other in (layers[1], exported):
        torch.testing.assert_close(dict(other.state_dict()), dict(layers[0].state_dict()))


def test_decay_is_one_minus_momentum(monkeypatch):
    monkeypatch.setattr(configured, "_warned", False)
    layer = bn.BatchNorm1d(3, decay=0.99)
    assert layer.momentum == 1 - 0.99
    assert layer.decay == pytest.approx(0.99)
    assert bn.BatchNorm1d(3).momentum == 0.1
    assert bn.BatchNorm1d(3, momentum=None).decay is None
    with pytest.raises(InputError, match=r"momentum=0\.1 and decay=0\.9"):
        bn.BatchNorm1d(3, momentum=0.1, decay=0.9)
    with pytest.raises(InputError, match="decay must be in"):
        bn.BatchNorm1d(3, decay=1.5)
    with pytest.warns(UserWarning, match=r"write decay=0\.99") as warned:
        bn.BatchNorm1d(3, momentum=0.99)
    assert len(warned) == 1
    bn.BatchNorm1d(3, momentum=0.99)  # warns once: another warning would be an error here


def test_debiased_needs_a_momentum():
    with pytest.raises(InputError, match="needs a momentum"):
        bn.BatchNorm1d(3, running="debiased", momentum=None)
    for name, value in {"running": "mean", "running_var": "both", "nonfinite": "ignore"}.items():
        with pytest.raises(InputError, match=f"unknown {name}"):
            bn.BatchNorm1d(3, **{name: value})


# Transactions


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), kind(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


OPTIONS = [
    {},
    {"momentum": None},
    {"running": "debiased"},
    {"nonfinite": "skip"},
    {"renorm": bn.Renorm(warmup=0)},
    {"update": "always"},
]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_recomputation_does_not_count(options: dict[str, Any], reentrant: bool):
    """A checkpointed block runs twice; torch's statistics take the batch in twice, ours once."""
    x = torch.randn(8, 3, requires_grad=True)

    def run(block: nn.Module, recompute: bool) -> nn.Module:
        for k in range(3):
            y = checkpoint(block, x * (k + 1), use_reentrant=reentrant) if recompute else block(x * (k + 1))
            y.backward(torch.randn(8, 3, generator=torch.Generator().manual_seed(k)))
        return block

    ours = Block(bn.BatchNorm1d, **options)
    plain, recomputed = run(copy.deepcopy(ours), False), run(ours, True)
    assert same_state(plain, recomputed)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    theirs = Block(nn.BatchNorm1d)
    assert not same_state(run(copy.deepcopy(theirs), False), run(theirs, True))


def test_statistics_of_a_skipped_step_are_rolled_back():
    """torch keeps what a step with infinite gradients left; under `transaction` only steps that were taken count."""
    x = torch.randn(8, 3)
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        net = Block(kind)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        states = []
        for scale in (1.0, math.inf, 1.0):
            before = copy.deepcopy(net)
            with bn.transaction(net, optimizer):
                optimizer.zero_grad()
                scaler.scale(net(x).sum() * scale).backward()
                outside = copy.deepcopy(net)
                scaler.step(optimizer)
            scaler.update()
            states.append((same_state(net, before), same_state(net.norm, outside.norm)))
        assert not states[0][0]
        assert states[1] == (True, False)
        assert not states[2][0]
        assert net.norm.num_batches_tracked == 2


def test_a_transaction_that_fails_is_rolled_back():
    net = Block(bn.BatchNorm1d, nonfinite="skip_channel", renorm=bn.Renorm(warmup=0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net)

    def fail() -> None:
        with bn.transaction(net, optimizer):
            net(torch.full((4, 3), math.nan))
            optimizer.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same_state(net, before)
    assert torch.equal(net.norm.renorm_r, torch.ones(3))
    with pytest.raises(InputError, match="no batch normalization"), bn.transaction(nn.Linear(2, 2), optimizer):
        pass


@pytest.mark.parametrize("options", [*OPTIONS[:4], {"running_var": "biased"}], ids=str)
def test_accumulation_is_one_update_by_all(options: dict[str, Any]):
    """Four micro-batches move torch's statistics four times, with the variance within each; ours once, as one batch."""
    whole = torch.randn(24, 3) * 3
    parts = torch.split(whole + torch.arange(24.0)[:, None], [4, 8, 5, 7])
    ours, large = bn.BatchNorm1d(3, **options), bn.BatchNorm1d(3, **options)
    theirs = nn.BatchNorm1d(3)
    large(torch.cat(parts))
    with bn.accumulate(ours):
        for part in parts:
            torch.testing.assert_close(ours(part), theirs(part))
        assert ours.num_batches_tracked == 0
    torch.testing.assert_close(dict(ours.state_dict()), dict(large.state_dict()), rtol=1e-6, atol=1e-6)
    assert (theirs.running_var - large.running_var).abs().max() > 1
    assert ours.num_batches_tracked == 1


def test_accumulation_ends_cleanly():
    net = nn.Sequential(nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with bn.accumulate(net):
        pass
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    def fail() -> None:
        with bn.accumulate(net):
            net(torch.randn(4, 3) + 7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(net[0]) is nn.BatchNorm1d
    with bn.accumulate(net), pytest.raises(InputError, match="already accumulating"), bn.accumulate(net):
        pass


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_accumulation_compiled_once():
    layer, eager = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(2):
        with bn.accumulate(layer), bn.accumulate(eager):
            for k in range(3):
                x = torch.randn(4, 3) + k
                compiled(x)
                eager(x)
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert counter.frame_count == 1


class Deep(nn.Module):
    """Three normalizations, one of them used twice, a branch, and dropout."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)])
        self.norms = nn.ModuleList([kind(4), kind(4), kind(3, eps=0.1)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.layers[0](x)).tanh()
        h = h + self.norms[1](self.layers[1](h)).tanh()
        h = h + self.norms[1](h).sigmoid()
        return self.norms[2](self.layers[2](h))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_exact_accumulation_is_the_large_batch(kind: type[nn.Module]):
    """Plain accumulation gives other gradients than the large batch; these are the same."""
    net = Deep(kind).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    large, plain = copy.deepcopy(net), copy.deepcopy(net)
    x, target = torch.randn(23, 5, dtype=torch.float64), torch.randint(3, (23,))
    parts = [(x[a:b], target[a:b]) for a, b in ((0, 4), (4, 12), (12, 23))]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="sum") / 23

    total = loss(large, (x, target))
    total.backward()
    for part in parts:
        loss(plain, part).backward()
    got = bn.accumulate_exact(net, parts, loss)
    torch.testing.assert_close(got.double(), total.detach(), rtol=1e-6, atol=0)
    for a, b, c in zip(net.parameters(), large.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-8)
        # A bias before a normalization has no gradient, whatever the batch.
        assert b.grad.abs().max() < 1e-9 or (c.grad - b.grad).abs().max() > 1e-4
    torch.testing.assert_close(dict(net.state_dict()), dict(large.state_dict()))
    assert type(net.norms[0]) is kind


def test_exact_accumulation_refuses_what_it_cannot_do():
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).sum()

    net = nn.Sequential(bn.BatchNorm1d(3))
    with pytest.raises(InputError, match="no micro-batches"):
        bn.accumulate_exact(net, [], loss)
    with pytest.raises(InputError, match="normalizes by batch"):
        bn.accumulate_exact(net.eval(), [torch.randn(3, 3)], loss)
    with pytest.raises(InputError, match="renorm"):
        bn.accumulate_exact(nn.Sequential(bn.BatchNorm1d(3, renorm=bn.Renorm())), [torch.randn(3, 3)], loss)
    before = copy.deepcopy(net.train())
    with pytest.raises(InputError, match="not finite"):
        bn.accumulate_exact(net, [torch.full((3, 3), math.nan)], loss)
    assert same_state(net, before)
    assert net[0].source == "auto"


@pytest.mark.parametrize("evaluating", [False, True])
def test_two_forwards_before_a_backward_under_ddp(tmp_path, evaluating: bool):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3))
        alone = copy.deepcopy(net)
        parallel = nn.parallel.DistributedDataParallel(net)  # which broadcasts buffers
        x = torch.randn(2, 8, 3)
        for module in (parallel, alone):
            module.train(not evaluating)
            (module(x[0]).square().sum() + module(x[1]).tanh().sum()).backward()
        del parallel  # its reducer holds the group, whose threads can wait for the interpreter
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert same_state(net, alone)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_that_are_overwritten_before_the_backward(training: bool):
    """As by a broadcast, or by a forward in between: torch refuses the backward, ours is that of the forward."""
    outcomes = {}
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        layer, x = kind(3).train(training), torch.randn(8, 3, requires_grad=True)
        y, dy = layer(x), torch.randn(8, 3)
        (before,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        with torch.no_grad():
            for buffer in layer.buffers():
                buffer.copy_(buffer * 3 + 1)
        try:
            (after,) = torch.autograd.grad(y, x, dy)
        except RuntimeError as error:
            outcomes[kind] = str(error)
        else:
            outcomes[kind] = "same" if torch.equal(before, after) else "changed"
    assert "modified by an inplace operation" in outcomes[nn.BatchNorm1d]
    assert outcomes[bn.BatchNorm1d] == "same"


@pytest.mark.parametrize("space", [(), (1,)])
def test_a_layer_without_running_statistics_says_so(space):
    """The advice to call .eval() would not help: there, too, the batch normalizes."""
    layer = bn.BatchNorm1d(3, track_running_stats=False)
    for each in (layer, layer.eval(), bn.BatchNorm1d(3, track_running_stats=False, ghost_size=4)):
        with pytest.raises(ValueError, match=r"keeps no running statistics.*track_running_stats=True") as caught:
            each(torch.randn(1, 3, *space))
        assert ".eval()" not in str(caught.value)
    with pytest.raises(ValueError, match="source='auto'") as caught:
        bn.BatchNorm1d(3, source="batch").eval()(torch.randn(1, 3))
    assert ".eval()" not in str(caught.value)
    with pytest.raises(ValueError, match="eval"):
        bn.BatchNorm1d(3)(torch.randn(1, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_of_the_update_is_the_update_of_each(momentum):
    generator = torch.Generator().manual_seed(0)
    mean, var = (torch.rand(3, 1, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def buffers():
        return torch.zeros(3, 4), torch.ones(4, 3), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, 4)

    def update(running_mean, running_var, batches, carry, mean, var):
        operator = torch.ops.batchnorm.update_statistics
        operator(running_mean, running_var, batches, mean, var, 8, 8, momentum, True, carry)
        return mean

    mapped, each = buffers(), buffers()
    torch.vmap(update, (0, 1, 0, 0, 0, 0))(*mapped, mean, var)
    for i in range(3):
        update(each[0][i], each[1][:, i], each[2][i], each[3][i], mean[i], var[i])
    assert all(torch.equal(a, b) for a, b in zip(mapped, each, strict=True))
    with pytest.raises(InputError, match="statistics of 3 batches into one running_mean"):
        torch.vmap(lambda m, v: update(torch.zeros(4), None, None, None, m, v))(mean, var)


@pytest.mark.parametrize("options", [{"running": "debiased"}, {"running": "cumulative"}, {"running_var": "biased"}])
def test_an_ensemble_under_vmap_estimates_as_its_layers_do(options):
    layers, batches = [bn.BatchNorm2d(4, **options) for _ in range(2)], torch.randn(3, 2, 3, 4, 5, 5)
    parameters, buffers = torch.func.stack_module_state(copy.deepcopy(layers))

    def call(p, b, x):
        return torch.func.functional_call(layers[0], (p, b), (x,))

    for batch in batches:
        y = torch.func.vmap(call)(parameters, buffers, batch)
        torch.testing.assert_close(y, torch.stack([layer(x) for layer, x in zip(layers, batch, strict=True)]))
    for name, stacked in buffers.items():
        torch.testing.assert_close(stacked, torch.stack([layer.get_buffer(name) for layer in layers]))
