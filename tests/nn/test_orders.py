"""Inputs that lie in rows, as sequences do: they are read where they lie, and results lie as torch's do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
import batchnorm.ops
from batchnorm.kernels import cpu

compiled_call = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")

Lay = Callable[[Tensor], Tensor]
ORDERS: dict[str, Lay] = {
    "sequences": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "planes": lambda t: t.contiguous(),
}
SHAPES = [(3, 5, 7), (2, 33, 130), (8, 64, 50), (1, 4, 9), (40, 1, 6), (7, 100, 2), (64, 96, 65)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(channels: int, dtype: torch.dtype, **options: Any) -> bn.BatchNorm1d:
    layer = bn.BatchNorm1d(channels, **options)
    with torch.no_grad():
        layer.weight.copy_(normal(channels, seed=1) + 1)
        layer.bias.copy_(normal(channels, seed=2))
        layer.running_mean.copy_(normal(channels, seed=3))
    return layer.double() if dtype == torch.float64 else layer


def step(layer: nn.Module, lay: Lay, lay_dy: Lay, x: Tensor, residual: Tensor | None, **call: Tensor) -> list[Tensor]:
    """y, the gradients of the inputs, gamma and beta, and the buffers."""
    layer = copy.deepcopy(layer)
    inputs = [lay(t.detach()).requires_grad_() for t in (x, residual) if t is not None]
    y = layer(*inputs, **call)
    dy = lay_dy(normal(*x.shape, seed=9, dtype=x.dtype))
    return [y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy), *layer.buffers()]


def assert_same(ours: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """To some roundings of the sums, which other orders make in other orders."""
    for a, b in zip(ours, expected, strict=True):
        tolerance = 4 * torch.finfo(a.dtype if a.dtype.is_floating_point else dtype).eps
        sums = math.sqrt(ours[0].numel()) if a.dtype == torch.float64 or a.ndim == 1 else 1
        torch.testing.assert_close(a, b, rtol=tolerance * sums, atol=tolerance * sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["sequences", "time first"])
def test_every_order_gives_what_planes_give(order: str, shape: tuple[int, ...], dtype: torch.dtype):
    x, residual = normal(*shape, seed=5, dtype=dtype) * 2 + 1, normal(*shape, seed=6, dtype=dtype)
    lay, planes = ORDERS[order], ORDERS["planes"]
    for k, activation in enumerate((None, "relu", "silu")):
        layer = layer_of(shape[1], dtype, activation=activation)
        for training in (True, False):
            for added in (None, residual):
                ours = step(layer.train(training), lay, lay if k != 1 else planes, x, added)
                expected = step(layer, planes, planes, x, added)
                assert ours[0].is_contiguous()
                assert_same(ours, expected, dtype)


@pytest.mark.parametrize("order", ["sequences", "time first"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ghost_size": 4}, {"channel_groups": 4}, {"renorm": bn.Renorm()}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_options_and_padding_read_every_order(order: str, options: dict[str, Any]):
    shape, lay, planes = (8, 64, 50), ORDERS[order], ORDERS["planes"]
    x = normal(*shape, seed=5)
    layer = layer_of(64, torch.float32, activation="relu", **options)
    calls: list[dict[str, Tensor]] = [{}]
    if not options:
        valid = torch.rand(8, 50, generator=torch.Generator().manual_seed(7)) < 0.6
        calls += [{"lengths": torch.tensor([50, 1, 3, 25, 50, 49, 2, 30])}, {"mask": valid}]
    for call in calls:
        assert_same(step(layer, lay, lay, x, None, **call), step(layer, planes, planes, x, None, **call), torch.float32)


@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(6, 1, 5, 7), (6, 3, 1, 1), (1, 4, 5, 7), (6, 4, 5, 7)], ids=str)
def test_images_of_one_channel_or_place_are_in_both_orders(shape: tuple[int, ...], lies: torch.memory_format):
    x, residual = (normal(*shape, seed=k).to(memory_format=lies) for k in (5, 6))
    layer = bn.BatchNorm2d(shape[1], activation="relu")
    double = nn.BatchNorm2d(shape[1]).double()
    for dy_lies in (torch.contiguous_format, torch.channels_last):
        dy = normal(*shape, seed=9).to(memory_format=dy_lies)
        inputs = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        y, true = layer(*inputs), torch.relu(double(wide[0]) + wide[1])
        torch.testing.assert_close(y, true.float(), rtol=1e-6, atol=1e-6)
        found, expected = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(true, wide, dy.double())
        torch.testing.assert_close(found, tuple(t.float() for t in expected), rtol=1e-5, atol=1e-5)
        assert min(shape[1:]) == 1 or y.stride() == nn.BatchNorm2d(shape[1])(x).stride()


@compiled_call
@pytest.mark.parametrize("order", ["sequences", "time first"])
def test_gradients_lie_as_the_input_and_take_the_place_of_the_output_s(order: str):
    lay, shape = ORDERS[order], (16, 64, 50)
    x = lay(normal(*shape, seed=5)).requires_grad_()
    layer = layer_of(64, torch.float32)
    for dy in (lay(normal(*shape, seed=9)), normal(*shape, seed=9)):
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        assert dx.stride() == (x.stride() if dy.stride() == x.stride() else dy.stride())
    factor = lay(torch.full(shape, 2.0))
    before = cpu.calls.gradients_in_place()
    (dx,) = torch.autograd.grad((layer(x) * factor).sum(), x)
    assert cpu.calls.gradients_in_place() == before + 1
    torch.testing.assert_close(dx, torch.autograd.grad(layer(x), x, factor)[0], rtol=0, atol=0)
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("order", ["sequences", "time first"])
def test_compiled_layers_and_second_derivatives_take_every_order(order: str):
    lay, shape = ORDERS[order], (4, 8, 6)
    x = lay(normal(*shape, seed=5, dtype=torch.float64)).requires_grad_()
    layer = layer_of(8, torch.float64, activation="silu")
    assert torch.autograd.gradgradcheck(copy.deepcopy(layer), (x,))
    single = layer_of(300, torch.float32, activation="relu")
    sequences = lay(normal(8, 300, 64, seed=5)).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(single, fullgraph=True)
    dy = lay(normal(8, 300, 64, seed=9))
    found = torch.autograd.grad(compiled(sequences), sequences, dy)
    torch.testing.assert_close(found, torch.autograd.grad(single(sequences), sequences, dy), rtol=1e-6, atol=1e-6)


@compiled_call
def test_outputs_of_sequences_are_made_again():
    x = ORDERS["sequences"](normal(8, 64, 50, seed=5)).requires_grad_()
    layer, after = layer_of(64, torch.float32, activation="relu"), nn.Conv1d(64, 8, 3)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(after(layer(x)).square().sum(), [x, *layer.parameters(), *after.parameters()])

    expected = gradients()
    with bn.recompute_outputs():
        out = after(layer(x)).square().sum()
    found = torch.autograd.grad(out, [x, *layer.parameters(), *after.parameters()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
