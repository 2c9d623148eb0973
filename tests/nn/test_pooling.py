"""Pooling of a layer's output, computed at once with it, is what both are one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.surgery.chains import Before
from batchnorm.surgery.conversion import revert
from batchnorm.surgery.pooling import is_pointwise, is_pooling, pooled

pytestmark = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module, channels: int, activation: str | None = "relu", conv: Any = None) -> None:
        super().__init__()
        self.norm, self.pool, self.conv = bn.BatchNorm2d(channels, activation=activation), pool, conv
        self.together = True
        with torch.no_grad():
            self.norm.weight.copy_(normal(channels, seed=1))
            self.norm.bias.copy_(normal(channels, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        if self.together:
            return pooled(self.pool, x, Before(self.norm), self.conv)
        y = self.norm(x)
        return self.pool(y if self.conv is None else self.conv(y))


def is_together(y: Tensor) -> bool:
    names, node = [], y.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return "PooledBatchNormBackward" in names


def step(net: Pooled, x: Tensor, together: bool) -> dict[str, Tensor]:
    net, x = copy.deepcopy(net), x.detach().clone().requires_grad_()
    net.together = together
    y = net(x)
    assert is_together(y) == together
    y.backward(normal(*y.shape, seed=9).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **dict(net.named_buffers())} | {n: p.grad for n, p in net.named_parameters()}


POOLS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.MaxPool2d(3, 2, 1), (2, 5, 48, 48)),
    (nn.MaxPool2d(2), (3, 3, 17, 9)),
    (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 14, 21)),
    (nn.MaxPool2d((5, 2), (1, 3), (2, 1)), (2, 40, 11, 10)),
    (nn.MaxPool2d(3, 1, 1), (2, 3, 40, 33)),
    (nn.MaxPool2d(1, 4), (2, 3, 9, 9)),
    (nn.MaxPool2d((16, 15), (3, 2), (8, 7)), (2, 2, 20, 20)),
    (nn.AvgPool2d(2), (4, 6, 24, 24)),
    (nn.AvgPool2d(3, 2), (2, 3, 15, 20)),
    (nn.AvgPool2d((2, 5), (1, 4)), (3, 2, 6, 30)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pool", "shape"), POOLS, ids=str)
def test_at_once_is_one_after_the_other(pool: nn.Module, shape: tuple[int, ...], dtype: torch.dtype):
    for activation in ("relu", "silu", None):
        net, x = Pooled(pool, shape[1], activation).to(dtype), (normal(*shape) + 0.3).to(dtype)
        ours, expected = step(net, x, True), step(net, x, False)
        eps = torch.finfo(dtype).eps
        for name, value in expected.items():
            bound = 8 * eps * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(ours[name], value, rtol=8 * eps, atol=bound, msg=f"{name} {activation}")


def test_ties_infinities_and_nans_go_where_torch_has_them():
    """The first of equal values, but the last that is no number, also where all values are -inf."""
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1), nn.MaxPool2d(4, 3, 2)):
        net = Pooled(pool, 3, None).eval()
        with torch.no_grad():
            net.norm.weight.fill_(1)
            net.norm.bias.fill_(0)
        x = normal(2, 3, 9, 10).mul(2).round()
        x[0, 0, 2:5, 3:6], x[0, 1, :4] = torch.nan, -torch.inf
        x[1, 2, 7, 7], x[1, 1, 0, 0] = torch.inf, torch.nan
        ours, expected = step(net, x, True), step(net, x, False)
        torch.testing.assert_close(ours["y"], expected["y"], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ours["x"], expected["x"], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([step(Pooled(pool, shape[1]), normal(*shape), True) for pool, shape in POOLS])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


def test_gradients_that_nobody_wants_and_the_population():
    net, x = Pooled(nn.MaxPool2d(3, 2, 1), 4).double().eval(), normal(2, 4, 9, 9).double()
    expected = step(net, x, False)
    torch.testing.assert_close(step(net, x, True), expected, rtol=1e-12, atol=1e-12)
    net.norm.requires_grad_(False)
    given = x.clone().requires_grad_()
    y = net(given)
    y.backward(normal(*y.shape, seed=9).double())
    torch.testing.assert_close(given.grad, expected["x"], rtol=1e-12, atol=1e-12)
    net.norm.requires_grad_()
    y = net(x)
    y.backward(normal(*y.shape, seed=9).double())
    torch.testing.assert_close(net.norm.weight.grad, expected["norm.weight"], rtol=1e-12, atol=1e-12)


def test_what_lies_between_is_not_kept():
    net, x = Pooled(nn.MaxPool2d(3, 2, 1), 8), normal(4, 8, 32, 32).requires_grad_()

    def kept(together: bool) -> int:
        net.together = together
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x)
        return sum(storages.values())

    size = x.numel() * x.element_size()
    assert kept(False) > 2.4 * size  # x, the output, and int64 places of a quarter
    assert kept(True) < 1.1 * size


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.pool.register_forward_hook(lambda *_: None),
        lambda net: net.norm.register_forward_pre_hook(lambda *_: None),
        lambda net: bn.convert(net, ghost_size=2),
        lambda net: setattr(net.pool, "dilation", 2),
        lambda net: net.to("meta"),
    ],
)
def test_what_someone_watches_or_changes_is_computed_in_turn(change: Callable[[Pooled], Any]):
    net = Pooled(nn.MaxPool2d(3, 2, 1), 4)
    change(net)
    x = normal(4, 4, 12, 12).to(net.norm.weight.device)
    y = net(x)
    assert not is_together(y)
    net.together = False
    if y.device.type != "meta":
        torch.testing.assert_close(y, net(x), rtol=0, atol=0)


def test_other_orders_and_compilers_go_through_torch():
    net, x = Pooled(nn.MaxPool2d(3, 2, 1), 4), normal(2, 4, 12, 12)
    last = net(x.to(memory_format=torch.channels_last))
    assert not is_together(last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.contiguous(), net(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        Pooled(nn.MaxPool2d(2, 2, 2), 4)(x)


def test_further_derivatives_and_compiled_autograd():
    for pool in (nn.MaxPool2d(2, 2, 1), nn.AvgPool2d(2)):
        net = Pooled(pool, 2, "silu").double()
        net.norm.update = "never"
        x, parameters = normal(2, 2, 4, 5).double().requires_grad_(), list(net.norm.parameters())
        assert torch.autograd.gradcheck(lambda x, *_, net=net: net(x), (x, *parameters))
        assert torch.autograd.gradgradcheck(lambda x, *_, net=net: net(x), (x, *parameters))
        y = net(x)
        assert is_together(y)
        expected = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), retain_graph=True)
        torch.compiler.reset()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward(torch.ones_like(y))
        torch.testing.assert_close([t.grad for t in (x, *parameters)], list(expected), rtol=1e-9, atol=1e-9)


def test_a_pointwise_convolution_goes_behind_means():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 1)
    net, x = Pooled(nn.AvgPool2d(2), 6, conv=conv).double(), normal(3, 6, 8, 8).double()
    torch.testing.assert_close(step(net, x, True), step(net, x, False), rtol=1e-10, atol=1e-10)
    seen = []
    net.conv.register_forward_hook(lambda _, args, y: seen.append((args[0].shape, y.shape)))
    assert not is_together(net(x))
    assert seen == [((3, 6, 8, 8), (3, 4, 8, 8))]


class Stem(nn.Module):
    """The first layers of He et al. 2016, with modules or a call."""

    def __init__(self, calls: bool, pool: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.pool = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), pool
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.pool(torch.relu(x) if self.calls else self.relu(x)) * 2


class Transition(nn.Module):
    """That of Huang et al. 2017, with a call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.pool = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, bias=False), nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(torch.relu(self.norm(x))))


class SeenTwice(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.pool(x).mean() + x.mean()


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: Stem(False, nn.MaxPool2d(3, 2, 1)), 1),
        (lambda: Stem(True, nn.AvgPool2d(2)), 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), 1),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten()), 1),
        (Transition, 1),
        (lambda: SeenTwice(False, nn.MaxPool2d(2)), 0),
        (lambda: Stem(False, nn.MaxPool2d(2, dilation=2)), 0),
        (lambda: Stem(False, nn.AvgPool2d(3, 2, 1)), 0),
        (lambda: Stem(False, nn.AdaptiveAvgPool2d(1)), 0),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.AvgPool2d(2)), 0),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2)), 0),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.MaxPool2d(2)), 0),
    ],
)
def test_accelerate_pools_at_once(make: Callable[[], nn.Module], count: int):
    torch.manual_seed(0)
    net, x = make(), normal(2, 3, 12, 12)
    ours = bn.accelerate(net, x, inplace=False)
    assert sum("the pooling behind it" in what for what in ours.report.fused.values()) == count
    y, expected = ours(x), net(x)
    nodes, open_ = set(), [y.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            open_ += [before for before, _ in node.next_functions]
    assert sum(node.name() == "PooledBatchNormBackward" for node in nodes) == count
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    with bn.recompute_outputs():
        again = copy.deepcopy(ours)(x)
    again.square().mean().backward()
    assert [type(m) for m in revert(ours).modules()] == [type(m) for m in net.modules()]


def test_which_modules_these_are():
    assert is_pooling(nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    assert is_pooling(nn.AvgPool2d(2, count_include_pad=False))
    for other in (
        nn.MaxPool2d(3, return_indices=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
        nn.MaxPool1d(2),
        nn.LPPool2d(2, 2),
    ):
        assert not is_pooling(other)
    assert is_pointwise(nn.Conv2d(3, 6, 1, groups=3))
    assert not any(map(is_pointwise, (nn.Conv2d(3, 3, 1, 2), nn.Conv2d(3, 3, 1, padding=1), nn.Conv1d(3, 3, 1))))


class Twice(nn.Module):
    """A pooling feeds a layer that is pooled, too."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.p1 = nn.BatchNorm2d(3), nn.MaxPool2d(2)
        self.b2, self.conv, self.p2 = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p1(torch.relu(self.b1(x)))
        return self.p2(self.conv(torch.relu(self.b2(x))))


class Writes(nn.Module):
    """The input of the layer is overwritten before its output is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool, self.conv = nn.BatchNorm2d(3, affine=False), nn.AvgPool2d(2), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach() * 1.0
        y = self.norm(z)
        z.mul_(3.0)
        return self.conv(self.pool(y)) + self.pool(z)


@pytest.mark.parametrize(("make", "count"), [(Twice, 2), (Writes, 0)])
def test_chains_of_poolings_and_writes_between(make: Callable[[], nn.Module], count: int):
    torch.manual_seed(0)
    net, x = make(), normal(4, 3, 16, 16)
    ours = bn.accelerate(net, x, inplace=False)
    assert sum("the pooling behind it" in what for what in ours.report.fused.values()) == count
    torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-5)
