"""Normalizing parts along the channels is normalizing their concatenation."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import batchnorm as bn
import batchnorm.ops
from batchnorm.kernels import cpu
from batchnorm.surgery.conversion import revert

pytestmark = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(*space: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of 3, 1 and 5 channels, the second without a gradient."""
    parts = [normal(6, c, *space, seed=c).to(dtype) for c in (3, 1, 5)]
    return [part.requires_grad_(k != 1) for k, part in enumerate(parts)]


def layer_of(activation: str | None = "relu", dtype: torch.dtype = torch.float32) -> bn.BatchNorm1d:
    layer = bn.BatchNorm2d(9, activation=activation)
    with torch.no_grad():
        layer.weight.copy_(normal(9, seed=1))
        layer.bias.copy_(normal(9, seed=2))
    layer._check_input_dim = lambda _: None
    return layer.double() if dtype == torch.float64 else layer


def step(layer: nn.Module, parts: list[Tensor], by_parts: bool) -> list[Any]:
    """y, gradients and buffers."""
    layer = copy.deepcopy(layer)
    y = layer.forward_parts(parts) if by_parts else layer(torch.cat(parts, 1))
    leaves = [*(part for part in parts if part.requires_grad), *layer.parameters()]
    gradients = torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(y.dtype))
    return [y, *gradients, *layer.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_parts_are_their_concatenation(training: bool, activation: str | None, dtype: torch.dtype):
    for space in ((), (7,), (5, 3)):
        layer, parts = layer_of(activation, dtype).train(training), parts_of(*space, dtype=dtype)
        ours, expected = step(layer, parts, True), step(layer, parts, False)
        torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_what_is_measured_once_has_the_same_bits():
    """A second layer over the same parts knows their moments, until one is written."""
    layer, parts = layer_of(), parts_of(5, 3)
    first, second = step(layer, parts, True), step(layer, parts, True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        parts[1].exp_()
    ours, expected = step(layer, parts, True), step(layer, parts, False)
    torch.testing.assert_close(ours, expected, rtol=2e-7, atol=2e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours[0], first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_small_parts_with_the_same_bits(dtype: torch.dtype):
    """Parts that are worth all threads, and such as one thread takes whole; the latter are together worth more."""
    widths = (64, 32, 32, 200, 32, 1, 32, 32, 32, 32)
    parts = [normal(8, c, 6, 6, seed=k).to(dtype).requires_grad_(k != 2) for k, c in enumerate(widths)]
    layer, threads = bn.BatchNorm2d(sum(widths), activation="relu"), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(step(layer, [part.detach().requires_grad_(part.requires_grad) for part in parts], True))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], step(layer, parts, False), rtol=2 * eps, atol=2 * eps)


def test_what_cannot_be_read_in_parts_is_left():
    layer, parts = layer_of(), parts_of(5, 3)
    before = [buffer.clone() for buffer in layer.buffers()]
    last = [part.detach().contiguous(memory_format=torch.channels_last) for part in parts]
    for others in (last, parts[:2], [parts[0], parts[1], parts[2].double()], [*parts[:2], parts[2][:, :, :4]]):
        assert layer.forward_parts(others) is None
    assert layer.forward_parts([parts[0], parts[2], parts[1].to("meta")]) is None
    torch.testing.assert_close(list(layer.buffers()), before, rtol=0, atol=0)
    assert bn.BatchNorm2d(9, ghost_size=2).forward_parts(parts) is None


def test_outputs_are_made_again():
    layer, parts, after = layer_of(), parts_of(5, 3), nn.Conv2d(9, 2, 3)

    def gradients(recompute: bool) -> tuple[Any, int]:
        with bn.recompute_outputs() if recompute else torch.enable_grad():
            y = layer.forward_parts(parts)
            out = after(y)
        weak = y.untyped_storage()._weak_ref()
        del y
        gc.collect()
        alive = torch.UntypedStorage._new_with_weak_ptr(weak) is not None
        return torch.autograd.grad(out.square().sum(), [parts[0], parts[2], *after.parameters()]), alive

    (ours, kept), (expected, before) = gradients(True), gradients(False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (kept, before) == (False, True)
    with bn.recompute_outputs():
        out = after(layer.forward_parts(parts))
    with torch.no_grad():
        parts[1].add_(1)
    with pytest.raises(bn.errors.StateError, match="inplace"):
        out.sum().backward()


def test_growing_outputs_of_a_dense_block_take_over_their_memory():
    """Of 180 KB to 1.6 MB; those that someone holds stay as they are."""
    torch.manual_seed(0)
    norms = nn.ModuleList(bn.BatchNorm2d(5 * n, activation="relu") for n in range(2, 10))
    convolutions = nn.ModuleList(nn.Conv2d(5 * n, 5, 3, padding=1) for n in range(2, 10))
    first = [torch.randn(4, 5, 48, 48).requires_grad_() for _ in range(2)]

    def gradients(recompute: bool, hold: bool) -> tuple[Any, int, list[tuple[torch.Tensor, torch.Tensor]]]:
        features, held, places = list(first), [], set()
        with bn.recompute_outputs() if recompute else torch.enable_grad():
            for norm, convolution in zip(norms, convolutions, strict=True):
                y = norm.forward_parts(features)
                places.add(y.data_ptr())
                if hold:
                    held.append((y, y.detach().clone()))
                features.append(convolution(y))
                del y
        out = torch.cat(features, 1).square().mean()
        parameters = [*norms.parameters(), *convolutions.parameters()]
        return torch.autograd.grad(out, [*first, *parameters]), len(places), held

    expected = gradients(recompute=False, hold=False)[0]
    ours, places, _ = gradients(recompute=True, hold=False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert places < len(norms)
    ours, places, held = gradients(recompute=True, hold=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert places == len(norms)
    for y, values in held:
        torch.testing.assert_close(y.detach(), values, rtol=0, atol=0)


def test_further_derivatives_and_compiled_autograd():
    layer, parts = layer_of("gelu", torch.float64).eval(), parts_of(2, dtype=torch.float64)
    layer.train()
    layer.update = "never"
    given = [parts[0], parts[2]]
    assert torch.autograd.gradgradcheck(lambda a, b: layer.forward_parts([a, parts[1], b]), given)
    y = layer.forward_parts(parts)
    expected = torch.autograd.grad(y, given, torch.ones_like(y), retain_graph=True)
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(torch.ones_like(y))
    torch.testing.assert_close([part.grad for part in given], list(expected), rtol=1e-12, atol=1e-12)


class Dense(nn.Module):
    """Each layer reads what all layers before it have made."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * k) for k in range(3))
        self.relu = nn.ReLU()
        self.made = nn.ModuleList(nn.Conv2d(3 + 4 * k, 4, 3, padding=1) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for norm, made in zip(self.norms, self.made, strict=True):
            found.append(made(norm(torch.cat(found, dim=1))))
        return torch.cat(found, 1)


def test_accelerate_hands_in_parts(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net, x = Dense(), normal(4, 3, 6, 6)
    ours = bn.accelerate(net, x, inplace=False)
    assert ours.report.fused == {f"norms.{k}": "a concatenation" for k in range(3)}
    seen: list[int] = []
    concatenate = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **kwargs: seen.append(1) or concatenate(*args, **kwargs))
    torch.testing.assert_close(ours(x), net(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), net.state_dict(), rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    inputs: list[Tensor] = []
    ours.norms[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    torch.testing.assert_close(ours.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-6)
    assert inputs[0].shape == (4, 11, 6, 6)
    assert type(revert(ours)) is Dense
