"""The input's gradient takes the place of the output's: only where nobody can see it, and with the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
import batchnorm.ops
from batchnorm.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")

SHAPE = (6, 5, 9, 7)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Upstream(torch.autograd.Function):
    """Its backward makes dy with `make`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return y.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.make(), None


def loss_of(y: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Its gradient is what `make` makes. Python has seen that, so nothing writes it, unless ``make`` is `fresh`."""
    if make is fresh or make is fresh_channels_last:
        return (y * make()).sum()
    result: Tensor = Upstream.apply(y, make)
    return result


class Taken:
    """How many gradients take the place of another meanwhile."""

    def __enter__(self) -> Taken:
        self.before = cpu.calls.gradients_in_place()
        return self

    def __exit__(self, *_: Any) -> None:
        self.count = cpu.calls.gradients_in_place() - self.before


def fresh() -> Tensor:
    return normal(*SHAPE, seed=3) + 0


def fresh_channels_last() -> Tensor:
    return fresh().contiguous(memory_format=torch.channels_last)


def layer_of(activation: str | None = "relu") -> bn.BatchNorm2d:
    layer = bn.BatchNorm2d(5, activation=activation)
    with torch.no_grad():
        layer.weight.copy_(normal(5, seed=1))
        layer.bias.copy_(normal(5, seed=2))
    return layer


def gradients(
    make: Callable[[], Tensor] = fresh,
    activation: str | None = "relu",
    residual: bool = False,
    before: Callable[[Tensor], Any] = lambda y: None,
    x: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], int]:
    """Those of x, residual, gamma and beta; how many took the place of dy."""
    layer = layer_of(activation)
    x = (normal(*SHAPE) if x is None else x).requires_grad_()
    r = normal(*SHAPE, seed=5).requires_grad_() if residual else None
    y = layer(x, r)
    before(y)
    with Taken() as taken:
        loss_of(y, make).backward(**options)
    found = [x.grad, *([] if r is None else [r.grad]), *(p.grad for p in layer.parameters())]
    return [g.clone() for g in found], taken.count


def by_python(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "call", None)
        patch.setattr(cpu, "torch_below", 0)
        return gradients(**given)[0]


def assert_same_bits(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_dx_takes_the_place_of_dy(activation: str | None, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch):
    make = fresh if memory is torch.contiguous_format else fresh_channels_last
    given = {"make": make, "activation": activation, "x": normal(*SHAPE).contiguous(memory_format=memory)}
    found, taken = gradients(**given)
    assert taken == 1
    assert_same_bits(found, by_python(monkeypatch, **{**given, "x": given["x"].detach().clone()}))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_with_a_residual_its_gradient_does(activation: str, monkeypatch: pytest.MonkeyPatch):
    found, taken = gradients(activation=activation, residual=True)
    assert taken == 1
    assert_same_bits(found, by_python(monkeypatch, activation=activation, residual=True))


def test_without_an_activation_the_residual_holds_dy(monkeypatch: pytest.MonkeyPatch):
    found, taken = gradients(activation=None, residual=True)
    assert taken == 0
    assert_same_bits(found[1], fresh())
    assert_same_bits(found, by_python(monkeypatch, activation=None, residual=True))


def test_two_layers_in_a_row():
    first, second, x = layer_of(), layer_of("gelu"), normal(*SHAPE).requires_grad_()
    with Taken() as taken:
        loss_of(second(first(x)), fresh).backward()
    assert taken.count == 2


_held: dict[str, Any] = {}


def _held_by_list() -> Tensor:
    _held["tensor"] = dy = fresh()
    return dy


def _held_by_view() -> Tensor:
    dy = fresh()
    _held["view"] = dy[2:, 1]
    return dy


def _held_as_view() -> Tensor:
    _held["base"] = whole = torch.zeros(2, *SHAPE)
    whole[1] = fresh()
    return whole[1]


def _held_by_storage() -> Tensor:
    dy = fresh()
    _held["storage"] = dy.untyped_storage()
    return dy


def _held_by_numpy() -> Tensor:
    dy = fresh()
    _held["array"] = dy.numpy()
    return dy


def _lent_by_numpy() -> Tensor:
    _held["lender"] = fresh().numpy().copy()
    return torch.from_numpy(_held["lender"])


def _lent_by_a_buffer() -> Tensor:
    _held["bytes"] = bytearray(fresh().numpy().tobytes())
    return torch.frombuffer(_held["bytes"], dtype=torch.float32).view(SHAPE)


def _lent_by_dlpack() -> Tensor:
    _held["dlpack"] = fresh()
    return torch.from_dlpack(_held["dlpack"])


def _shared_memory() -> Tensor:
    _held["shared"] = fresh().share_memory_()
    return torch.empty(0).set_(_held["shared"].untyped_storage(), 0, SHAPE)


def _with_gaps() -> Tensor:
    return torch.cat([fresh(), fresh()], 3)[..., :7]


@pytest.mark.parametrize(
    "make",
    [_held_by_list, _held_by_view, _held_as_view, _held_by_storage, _held_by_numpy, _lent_by_numpy, _lent_by_a_buffer,
     _lent_by_dlpack, _shared_memory, fresh_channels_last, _with_gaps],
)  # fmt: skip
def test_what_somebody_holds_is_not_written(make: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch):
    _held.clear()
    found, taken = gradients(make)
    assert taken == 0
    for held in _held.values():
        values = np.frombuffer(held, np.float32) if isinstance(held, bytearray) else np.asarray(held).ravel()
        if isinstance(held, torch.UntypedStorage):
            values = torch.empty(0).set_(held).numpy()
        elif isinstance(held, Tensor) and held.ndim == 5:
            values = held[1].flatten().numpy()
        elif isinstance(held, Tensor) and held.ndim == 3:
            np.testing.assert_array_equal(held.numpy(), fresh()[2:, 1].numpy())
            continue
        np.testing.assert_array_equal(values, fresh().numpy().ravel())
    assert_same_bits(found, by_python(monkeypatch))


def test_retained_and_hooked_gradients_are_seen_as_they_were():
    seen: list[Tensor] = []
    kept: list[Tensor] = []

    def before(y: Tensor) -> None:
        y.retain_grad()
        y.register_hook(seen.append)
        y.grad_fn.register_prehook(lambda dys: kept.extend(dys))
        y.grad_fn.register_hook(lambda _, dys: kept.extend(dys))
        _held["y"] = y

    found, _ = gradients(before=before)
    for dy in (_held["y"].grad, *seen, *kept):
        assert_same_bits(dy, fresh())
    assert len(seen) == 1
    assert len(kept) == 2
    assert_same_bits(found, gradients()[0])


def test_module_hooks_see_it():
    layer, x = layer_of(), normal(*SHAPE).requires_grad_()
    seen: list[Tensor] = []
    layer.register_full_backward_hook(lambda _, dx, dy: seen.extend(dy))
    loss_of(layer(x), fresh).backward()
    assert_same_bits(seen, [fresh()])


def test_two_readers():
    """One of them hands on the very tensor that the other gets: an addition's gradient is one for both operands."""
    layer, x, other = layer_of(), normal(*SHAPE).requires_grad_(), normal(*SHAPE).requires_grad_()
    y = layer(x)
    (loss_of(y + other, fresh) + loss_of(y * 2, fresh)).backward()
    assert_same_bits(other.grad, fresh())
    expected = torch.autograd.grad(layer_of()(x), x, fresh() + fresh() * 2)
    assert_same_bits(x.grad, expected[0])


def test_expanded_gradients():
    layer, x = layer_of("gelu"), normal(*SHAPE).requires_grad_()
    layer(x).sum().backward()
    (expected,) = torch.autograd.grad(layer_of("gelu")(x), x, torch.ones(SHAPE))
    assert_same_bits(x.grad, expected)


def test_given_and_accumulated_gradients_stay():
    layer, x, dy = layer_of(), normal(*SHAPE).requires_grad_(), fresh()
    for times in (1, 2):
        layer(x).backward(dy)
        assert_same_bits(dy, fresh())
        if times == 1:
            once = x.grad.clone()
    assert_same_bits(x.grad, once + once)
    y = layer(x)
    (captured,) = torch.autograd.grad(loss_of(y, fresh), y, retain_graph=True)
    assert_same_bits(captured, fresh())
    dx, captured = torch.autograd.grad(loss_of(y, fresh), [x, y])
    assert_same_bits([dx, captured], [once, fresh()])


def test_twice_through_one_graph():
    found, _ = gradients(retain_graph=True)
    assert_same_bits(found, gradients()[0])
    layer, x = layer_of(), normal(*SHAPE).requires_grad_()
    loss = loss_of(layer(x), fresh)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, x), first)


def test_double_backward():
    layer, x = layer_of("gelu").double(), normal(*SHAPE).double().requires_grad_()
    dy = fresh().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, dy: layer(x) * dy.sin(), (x[:2, :, :2, :2], dy[:2, :, :2, :2]))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    with torch.autograd.detect_anomaly():
        found, _ = gradients()
    assert_same_bits(found, gradients()[0])


def test_several_threads_through_one_layer():
    """Each its own graph, above a common part whose gradients are added up."""
    layer, x = layer_of(), normal(*SHAPE).double().float().requires_grad_()
    y = layer.eval()(x)
    losses = [loss_of(y * (k + 1.0), fresh) for k in range(4)]
    found: list[Any] = [None] * 4

    def work(k: int) -> None:
        found[k] = torch.autograd.grad(losses[k], x, retain_graph=True)[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for k in range(4):
        (expected,) = torch.autograd.grad(layer(x), x, fresh() * (k + 1.0))
        assert_same_bits(found[k], expected)


def test_a_training_step_has_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    def step() -> list[Any]:
        torch.manual_seed(0)
        norms = bn.BatchNorm2d(8, activation="relu"), bn.BatchNorm2d(8)
        first, second, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 36, 4)
        net = nn.Sequential(first, norms[0], second, norms[1], nn.Flatten(), last)
        net(normal(4, 3, 10, 10)).square().mean().backward()
        return [p.grad for p in net.parameters()]

    ours = step()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "call", None)
        patch.setattr(cpu, "torch_below", 0)
        assert_same_bits(ours, step())
