"""Outputs made again in the backward: the same bits, freed in between, and kept where they cannot be."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.ops import recomputation
from batchnorm.ops.schemas import ACTIVATIONS
from benchmarks.whole import live_bytes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation: str = "relu", **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [bn.BatchNorm2d(4, activation=activation, **options) for _ in range(2)]
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False)
    return nn.Sequential(first, norms[0], second, norms[1], nn.Flatten(), nn.Linear(144, 5))


class Kept:
    """How many outputs of batch normalization are alive after the forward."""

    def __init__(self, net: nn.Module) -> None:
        self._storages: list[Any] = []
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda _, args, y: self._storages.append(y.untyped_storage()._weak_ref()))

    def count(self) -> int:
        gc.collect()
        return sum(torch.UntypedStorage._new_with_weak_ptr(each) is not None for each in self._storages)


def step(net: nn.Module, recompute: bool, call: Callable[[Tensor], Tensor] | None = None) -> tuple[list[Any], int]:
    """Loss, gradients and buffers, and the number of outputs kept between forward and backward."""
    net = copy.deepcopy(net)
    kept = Kept(net)
    x = normal(6, 3, 10, 10).requires_grad_()
    with bn.recompute_outputs() if recompute else nullcontext():
        loss = (net(x) if call is None else call(net)(x)).square().mean()
    alive = kept.count()
    loss.backward()
    return [loss, x.grad, *(p.grad for p in net.parameters()), *net.buffers()], alive


def assert_same_bits(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_same_bits_of_less_memory(activation: str, training: bool):
    """Read by a convolution, and by a linear layer through a view."""
    net = network(activation).train(training)
    (ours, kept), (expected, before) = step(net, True), step(net, False)
    assert_same_bits(ours, expected)
    assert (kept, before) == (0, 2)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_more_normalization_gives_the_same_bits(dtype: torch.dtype, memory: torch.memory_format):
    """What it all rests on, at sizes that the kernels cut in different ways."""
    for shape in ((40, 20), (3, 7, 5, 5), (2, 3, 90, 90), (8, 40, 20, 20)):
        x = normal(*shape).to(dtype)
        x = x.to(memory_format=memory) if x.ndim == 4 else x
        weight, bias = normal(shape[1], seed=1).to(dtype), normal(shape[1], seed=2).to(dtype)
        for pool_size in (0, 3):
            fusion = (None, pool_size, 1e-5, ACTIVATIONS.index("gelu"), 0.0, False)
            y, mean, var, _ = torch.ops.batchnorm.forward(x, weight, bias, *fusion)
            assert_same_bits(torch.ops.batchnorm.normalize(x, mean, var, weight, bias, *fusion, own=True)[0], y)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_channel_of_a_tiny_scale_leaves_its_neighbours_their_bits(memory: torch.memory_format):
    x, weight = normal(8, 64, 32, 32).to(memory_format=memory), torch.ones(64)
    weight[0], weight[9] = 1e-22, 1e-38
    fusion = (None, None, 8, 1e-5, ACTIVATIONS.index("relu"), 0.0, False)
    y, mean, var, _ = torch.ops.batchnorm.forward(x, weight, *fusion)
    assert_same_bits(torch.ops.batchnorm.normalize(x, mean, var, weight, *fusion, own=True)[0], y)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, weight.double(), None, True).relu()
    assert float(((y - expected).abs().amax((0, 2, 3)) / expected.amax((0, 2, 3)) * 2**24).max()) < 2


def test_readers_may_be_several_and_functions():
    def twice(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            y = net[1](net[0](x))
            return torch.cat([net[2](y), torch.nn.functional.conv2d(y, net[2].weight * 2)])

        return call

    (ours, kept), (expected, before) = (step(network(), recompute, twice) for recompute in (True, False))
    assert_same_bits(ours, expected)
    assert (kept, before) == (0, 1)


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda y: F.max_pool2d(y, 2),
    "softplus": F.softplus,
    "interpolate": lambda y: F.interpolate(F.hardswish(y), scale_factor=2, mode="bilinear"),
    "bmm": lambda y: torch.bmm(y.flatten(2), y.flatten(2).transpose(1, 2)),
    "of its parts": lambda y: torch.stack([F.softplus(each) for each in y.chunk(2, 1)]),
    "of one of several results": lambda y: torch.sort(F.elu(y), dim=1).values,
    "a view of a view": lambda y: F.softplus(y.flatten(2).transpose(1, 2)),
}


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_any_kind(reader: str):
    """Those that C++ knows, and others, at which Python looks."""

    def call(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
        return lambda x: READERS[reader](net[1](net[0](x)))

    (ours, kept), (expected, before) = (step(network(), recompute, call) for recompute in (True, False))
    assert_same_bits(ours, expected)
    assert (kept, before) == (0, 1)


@pytest.mark.usefixtures("calls")
def test_contexts_nest_and_are_entered_again():
    net, context = network(), bn.recompute_outputs()

    def call(of: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with context, bn.recompute_outputs(), torch.device("cpu"), context:
                h = of[:3](x)
            with context:
                return of[3:](h)

        return run

    (ours, kept), (expected, _) = step(net, False, call), step(net, False)
    assert_same_bits(ours, expected)
    assert kept == 0
    assert step(net, False)[1] == 2


@pytest.mark.usefixtures("calls")
def test_threads_have_contexts_of_their_own():
    net, kept, ready = network(), {}, threading.Barrier(2)

    def run(recompute: bool) -> None:
        ready.wait()
        kept[recompute] = step(net, recompute)[1]

    threads = [threading.Thread(target=run, args=[each]) for each in (True, False)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert kept == {True: 0, False: 2}


@pytest.mark.usefixtures("calls")
def test_a_backward_inside_may_itself_be_derived():
    net = network("gelu").double()

    def penalty(recompute: bool) -> list[Tensor]:
        x = normal(6, 3, 10, 10).double().requires_grad_()
        with bn.recompute_outputs() if recompute else nullcontext(), torch.profiler.profile():
            (gradient,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
            return list(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))

    assert_same_bits(penalty(True), penalty(False))


def test_what_python_says_of_a_reader_goes_no_further(monkeypatch: pytest.MonkeyPatch):
    """An error of a look is told and changes nothing."""
    if cpu.calls is None:
        pytest.skip(f"needs the C++ call: {cpu.call_error}")

    def fails(node: Any) -> None:
        raise ZeroDivisionError

    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(recomputation, "_forget_in", fails)
    call = lambda net: lambda x: F.softplus(net[1](net[0](x)))  # noqa: E731
    (ours, kept), (expected, _) = (step(network(), recompute, call) for recompute in (True, False))
    assert_same_bits(ours, expected)
    assert kept == 1
    assert {each.exc_type for each in told} == {ZeroDivisionError}


def test_what_is_not_made_again_is_kept():
    def residual(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
        return lambda x: net[2](net[1](h := net[0](x), h))

    def in_place(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
        return lambda x: net[2](net[1](net[0](x)).mul_(2))

    def hooked(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return net[:3](x)

        return call

    for call, activation in ((residual, "relu"), (in_place, None), (hooked, "relu")):
        (ours, kept), (expected, before) = (step(network(activation), recompute, call) for recompute in (True, False))
        assert_same_bits(ours, expected)
        assert (kept, before) == (1, 1), call
    for reentrant in (True, False):

        def checkpointed(net: nn.Sequential, reentrant: bool = reentrant) -> Callable[[Tensor], Tensor]:
            return lambda x: checkpoint(net, x, use_reentrant=reentrant)

        (ours, _), (expected, _) = (step(network(), recompute, checkpointed) for recompute in (True, False))
        assert_same_bits(ours, expected)


def test_operands_that_changed_are_refused():
    net, x = network("gelu"), normal(6, 3, 10, 10)
    with bn.recompute_outputs():
        h = net[0](x)
        y = net[2](net[1](h))
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(bn.errors.StateError, match="modified by an inplace operation"):
        y.sum().backward()
    with bn.recompute_outputs():
        h = net[2](y := net[1](net[0](x)))
        y.add_(1)  # of which nothing is kept
    h.sum().backward()


def test_second_derivatives_and_a_second_backward():
    net = network("gelu").double()

    def penalty(recompute: bool) -> list[Tensor]:
        x = normal(6, 3, 10, 10).double().requires_grad_()
        with bn.recompute_outputs() if recompute else nullcontext():
            loss = net(x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(loss, x, retain_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))

    assert_same_bits(penalty(True), penalty(False))


def test_nothing_outlives_the_context():
    net, x = network(), normal(6, 3, 10, 10)
    with bn.recompute_outputs(), torch.no_grad():
        net(x)
    with pytest.raises(ZeroDivisionError), bn.recompute_outputs():
        raise ZeroDivisionError
    y = net[1](net[0](x))
    assert y.grad_fn.name() == "BatchNormBackward"  # at once again
    out = net[2](y)
    assert out.grad_fn._saved_input is y


class Chain(nn.Module):
    """Each block adds its input to what it computes, as residual networks do; the first adds a projection."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.projection = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.shortcut = bn.BatchNorm2d(4)
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(bn.BatchNorm2d(4, activation="relu") for _ in range(blocks))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.shortcut(self.projection(x)), self.stem(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolution(h), y)
            h = y
        return self.last(h)


@pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")
def test_outputs_with_a_residual_are_made_again_but_every_third():
    """Of the outputs y1 ... y7: y1 needs the projection's; y2 would need y1, too, and is kept, so y3 needs none.

    y4 needs y3, and y5 is kept; y6 and y7 as y3 and y4.
    """
    (ours, kept), (expected, before) = (step(Chain(7), recompute) for recompute in (True, False))
    assert_same_bits(ours, expected)
    assert (kept, before) == (2, 7)


@pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")
def test_a_layer_may_keep_its_output():
    net = network()
    net[1].keeps_output = True
    (ours, kept), (expected, _) = step(net, True), step(net, False)
    assert_same_bits(ours, expected)
    assert kept == 1


def test_calls_inside_are_made_at_once_but_for_others_modes():
    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    if cpu.call is None:
        pytest.skip(f"needs the C++ call: {cpu.call_error}")
    layer, x = bn.BatchNorm1d(3), normal(6, 3)
    with bn.recompute_outputs(), bn.recompute_outputs():
        assert layer(x).grad_fn.name() == "BatchNormBackward"
        assert cpu.calls.source(layer(x)) is not None
        with Other():
            assert layer(x).grad_fn.name() != "BatchNormBackward"
    with Other(), bn.recompute_outputs():
        assert layer(x).grad_fn.name() != "BatchNormBackward"
    assert cpu.calls.source(layer(x)) is None


# ---------------------------------------------------------------------------------------------- where outputs lie
needs_calls = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")


def large(layers: int, seen: Callable[[Tensor], Any]) -> nn.Sequential:
    """Convolutions and batch normalizations with outputs of 288 KB, which forward hooks see."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for _ in range(layers):
        norm = bn.BatchNorm2d(8, activation="relu")
        norm.register_forward_hook(lambda _, args, y: seen(y))
        net.extend([nn.Conv2d(8, 8, 3, padding=1), norm])
    return net


@needs_calls
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_outputs_take_the_place_of_those_that_are_forgotten(memory: torch.memory_format):
    places: list[int] = []
    net = large(8, lambda y: places.append(y.data_ptr())).to(memory_format=memory)
    x = normal(4, 8, 48, 48).to(memory_format=memory)
    with bn.recompute_outputs():
        ours = net(x)
    assert ours.is_contiguous(memory_format=memory)
    assert len(set(places)) <= 3
    gradients = torch.autograd.grad(ours.square().mean(), list(net.parameters()))
    expected = net(x)
    assert_same_bits(ours, expected)
    assert_same_bits(gradients, torch.autograd.grad(expected.square().mean(), list(net.parameters())))


@needs_calls
@pytest.mark.parametrize("held", ["itself", "a view", "NumPy's", "its storage", "for a reader that keeps it"])
def test_outputs_that_are_held_keep_their_place(held: str, tmp_path: Path):
    kept: list[tuple[Any, Tensor]] = []
    hold: dict[str, Callable[[Tensor], Any]] = {
        "itself": lambda y: y,
        "a view": lambda y: y[1:].flatten(),
        "NumPy's": lambda y: y.detach().numpy(),
        "its storage": lambda y: y.untyped_storage(),
        "for a reader that keeps it": lambda y: Cube.apply(y),
    }
    net = large(8, lambda y: kept.append((hold[held](y), y.detach().clone())))
    with bn.recompute_outputs():
        y = net(normal(4, 8, 48, 48))
    y.sum().backward()
    large(8, lambda y: None)(normal(4, 8, 48, 48, seed=1)).sum().backward()
    for each, values in kept:
        if held == "its storage":
            assert each.nbytes() == values.nbytes
            assert each.resizable()
            now = torch.empty(0).set_(each, 0, values.shape)
        elif held == "for a reader that keeps it":
            (now,) = each.grad_fn.saved_tensors
        else:
            now = torch.as_tensor(each)
        assert_same_bits(now.detach().flatten(), (values[1:] if held == "a view" else values).flatten())
    torch.save(kept[0][1], tmp_path / "copy.pt")
    if held == "itself":
        torch.save(kept[0][0].detach(), tmp_path / "output.pt")
        assert abs((tmp_path / "output.pt").stat().st_size - (tmp_path / "copy.pt").stat().st_size) < 100
        kept[0][0].detach().untyped_storage().resize_(0)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * dy * ctx.saved_tensors[0] ** 2


@needs_calls
def test_an_output_may_be_freed_by_another_thread_and_behind_its_context():
    outputs: list[Tensor] = []
    net = large(3, lambda y: outputs.append(y))
    with bn.recompute_outputs():
        net(normal(4, 8, 48, 48))
        thread = threading.Thread(target=outputs.clear)
        thread.start()
        thread.join()
        y = net(normal(4, 8, 48, 48))
    expected = [each.detach().clone() for each in outputs]
    y.sum().backward()
    assert_same_bits([each.detach() for each in outputs], expected)
    outputs.clear()


# ---------------------------------------------------------------------------------------------- convolutions made again


def wide(**options: Any) -> nn.Conv2d:
    """A convolution that takes little time and makes no less than it reads."""
    return nn.Conv2d(4, 8, 1, **options)


def inputs_kept(net: nn.Sequential, x: Tensor, recompute: bool, **autocast: Any) -> tuple[list[Any], list[bool]]:
    """Loss, gradients and buffers; and which inputs of the batch normalizations are alive before the backward."""
    net, x, storages = copy.deepcopy(net), x.clone().requires_grad_(), []
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args: storages.append(args[0].untyped_storage()._weak_ref()))
    with torch.autocast("cpu", **autocast) if autocast else nullcontext():
        with bn.recompute_outputs() if recompute else nullcontext():
            loss = net(x).float().square().mean()
        gc.collect()
        alive = [torch.UntypedStorage._new_with_weak_ptr(each) is not None for each in storages]
        loss.backward()
    return [loss, x.grad, *(p.grad for p in net.parameters()), *net.buffers()], alive


@needs_calls
@pytest.mark.parametrize(
    "convolution",
    [
        wide(),
        wide(bias=False),
        nn.Conv2d(4, 16, 3, padding=1, stride=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="zeros"),
    ],
    ids=["bias", "plain", "strided", "depthwise"],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_output_of_a_cheap_convolution_is_made_again(
    convolution: nn.Conv2d, memory: torch.memory_format, dtype: torch.dtype
):
    if dtype == torch.bfloat16 and memory == torch.channels_last and convolution.dilation != (1, 1):
        pytest.skip("torch 2.13.0 gives the kernels another gradient in each call")
    torch.manual_seed(0)
    norm = bn.BatchNorm2d(convolution.out_channels, activation="silu")
    net = nn.Sequential(convolution, norm, nn.Conv2d(convolution.out_channels, 2, 3)).to(dtype)
    x = normal(6, 4, 64, 64).to(dtype).to(memory_format=memory)
    (ours, kept), (expected, before) = (inputs_kept(net, x, recompute) for recompute in (True, False))
    assert_same_bits(ours, expected)
    # With the channels last, or in 16 bits, the convolution would take too long.
    is_cheap = memory == torch.contiguous_format and dtype != torch.bfloat16
    assert (kept, before) == ([not is_cheap], [True])


@needs_calls
def test_of_a_chain_of_convolutions_the_widest_are_made_again():
    """As in an inverted residual: narrow, expanded, depthwise, narrow, expanded."""
    torch.manual_seed(0)
    shapes = [(4, 12, 1, 1), (12, 12, 3, 12), (12, 4, 1, 1), (4, 12, 1, 1)]
    layers: list[nn.Module] = []
    for i, o, k, groups in shapes:
        layers += [nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), bn.BatchNorm2d(o, activation="relu")]
    net = nn.Sequential(*layers, nn.Conv2d(12, 2, 3))
    (ours, kept), (expected, before) = (
        inputs_kept(net, normal(6, 4, 64, 64), recompute) for recompute in (True, False)
    )
    assert_same_bits(ours, expected)
    assert (kept, before) == ([False, True, True, False], [True] * 4)


@needs_calls
@pytest.mark.parametrize(("window", "times"), [(2, 1), (1, 2)], ids=["small", "the largest"])
@pytest.mark.parametrize("readers", [1, 2])
def test_a_small_convolution_is_made_once_for_its_reader_and_its_batch_normalization(
    window: int, times: int, readers: int
):
    """The largest is made for each, so that only one of the two tensors is there."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(4, 8, 5, padding=2), bn.BatchNorm2d(8, activation="relu"), nn.MaxPool2d(window))
    cheap, norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), bn.BatchNorm2d(8, activation="relu")
    after = nn.ModuleList(nn.Conv2d(8, 2, 3) for _ in range(readers))
    x = normal(6, 4, 40 * window, 40 * window)

    def step(recompute: bool) -> tuple[list[Any], int]:
        net = copy.deepcopy(nn.ModuleList([first, cheap, norm, after]))
        with bn.recompute_outputs() if recompute else nullcontext():
            y = net[2](net[1](net[0](x)))
            loss = torch.stack([each(y).square().mean() for each in net[3]]).sum()
        with torch.profiler.profile() as profile:
            loss.backward()
        made = sum(each.count for each in profile.key_averages() if each.key == "aten::convolution")
        return [p.grad for p in net.parameters()], made

    (ours, made), (expected, none) = step(True), step(False)
    assert_same_bits(ours, expected)
    assert none == 0
    assert made == (1 if times == 1 else readers + 1)


@needs_calls
def test_convolutions_that_take_long_or_have_many_weights_or_small_outputs_are_not_made_again():
    for convolution, side in ((nn.Conv2d(8, 8, 3, padding=1), 64), (nn.Conv2d(16, 700, 1), 4), (wide(), 10)):
        channels = convolution.out_channels
        net = nn.Sequential(convolution, bn.BatchNorm2d(channels, activation="relu"), nn.Conv2d(channels, 2, 1))
        assert inputs_kept(net, normal(6, convolution.in_channels, side, side), True)[1] == [True]


@needs_calls
def test_convolutions_under_autocast_are_not_made_again():
    """In 16 bits they take too long."""
    torch.manual_seed(0)
    net = nn.Sequential(wide(bias=False), bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 2, 1))
    (ours, kept), (expected, _) = (
        inputs_kept(net, normal(6, 4, 64, 64), recompute, dtype=torch.bfloat16) for recompute in (True, False)
    )
    assert_same_bits(ours, expected)
    assert kept == [True]


def peak(net: nn.Module, x: Tensor, recompute: bool) -> int:
    """The most bytes at once in a step beside the gradients of parameters."""

    def run() -> None:
        net.zero_grad(set_to_none=True)
        with bn.recompute_outputs() if recompute else nullcontext():
            loss = net(x).square().mean()
        loss.backward()

    run()
    net.zero_grad(set_to_none=True)
    return live_bytes(run, net)


@needs_calls
def test_what_is_made_again_last_makes_room_for_the_gradients_of_the_layers_before():
    """The peak is where the first convolutions, without normalization, have their gradients, as in a DCGAN's critic."""

    def critic(norm: Callable[[int], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        begin = [nn.Conv2d(3, 32, 3, bias=False), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(32, 16, 3, stride=2)]
        return nn.Sequential(*begin, norm(16), nn.Conv2d(16, 8, 3), norm(8), nn.Conv2d(8, 1, 3))

    def torchs(channels: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, inplace=True))

    def ours(channels: int) -> nn.Module:
        norm = bn.BatchNorm2d(channels, activation="leaky_relu", negative_slope=0.2)
        norm.keeps_output = False
        return norm

    x = normal(8, 3, 48, 48)
    theirs = peak(critic(torchs), x, recompute=False)
    assert peak(critic(ours), x, recompute=False) <= theirs
    assert peak(critic(ours), x, recompute=True) <= theirs


@needs_calls
def test_a_network_that_narrows_does_not_hold_the_place_of_its_widest_outputs():
    """Behind dropout nobody reads them again; what comes later would not fit there."""

    def narrowing(recompute: bool) -> int:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in ((64, 512), (512, 256), (256, 128)):
            layers += [nn.Linear(inputs, outputs), bn.BatchNorm1d(outputs, activation="relu"), nn.Dropout(0.2)]
        return peak(nn.Sequential(*layers), normal(1024, 64), recompute)

    assert narrowing(True) <= narrowing(False) + 8192  # copies of gamma and beta


@needs_calls
def test_networks_in_turn_and_batches_of_several_sizes_give_the_same_bits_in_a_context():
    """What the contexts before asked for tells which memory is used again; it must not matter where it tells wrong."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(3, c, 3), bn.BatchNorm2d(c, activation="relu"), nn.Conv2d(c, d, 3),
                      bn.BatchNorm2d(d, activation="relu"), nn.Conv2d(d, 2, 3))
        for c, d in ((32, 40), (40, 32), (64, 16))
    ]  # fmt: skip
    for number, size in enumerate((8, 8, 8, 5, 8, 8, 3, 8) * 2):
        net = nets[number % 3 if number > 8 else 0]
        x, found = normal(size, 3, 48, 48, seed=number), []
        for recompute in (True, False):
            twin = copy.deepcopy(net)
            with bn.recompute_outputs() if recompute else nullcontext():
                loss = twin(x).square().mean()
            loss.backward()
            found.append([loss, *(p.grad for p in twin.parameters())])
        assert_same_bits(*found)


@needs_calls
def test_statistics_and_signs_go_with_the_backward():
    """The loss may live on, and its graph with it."""
    norm = bn.BatchNorm2d(64, activation="relu")
    x, residual = (normal(64, 64, 16, 16, seed=seed).requires_grad_() for seed in (0, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = norm(x, residual).square().mean()
        loss.backward()
    assert loss.grad_fn is not None
    events = profile.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == "[memory]")
    gradients = sum(each.grad.nbytes for each in (x, residual, norm.weight, norm.bias))
    assert left - gradients < x.numel() // 8  # the signs take one bit an element


@needs_calls
def test_weights_may_change_or_be_freed_before_the_backward():
    """As an optimizer of single layers and sharded parameters do."""
    torch.manual_seed(0)
    first, norm, last = wide(), bn.BatchNorm2d(8, activation="silu"), nn.Conv2d(8, 2, 1)
    x = normal(6, 4, 64, 64)

    def gradient(recompute: bool, change: bool) -> Tensor:
        last.weight.grad = None
        with bn.recompute_outputs() if recompute else nullcontext():
            y = last(norm(first(x))).square().mean()
        weights = [p.data.clone() for p in (first.weight, norm.weight)]
        if change:
            for p in (first.weight, norm.weight):
                p.data.fill_(torch.nan)
        torch.autograd.backward(y, inputs=[last.weight])
        for p, data in zip((first.weight, norm.weight), weights, strict=True):
            p.data.copy_(data)
        return last.weight.grad

    assert_same_bits(gradient(True, True), gradient(False, False))


@needs_calls
def test_convolutions_made_again_in_second_derivatives_and_backwards():
    torch.manual_seed(0)
    net = nn.Sequential(wide(), bn.BatchNorm2d(8, activation="gelu"), nn.Conv2d(8, 2, 3)).double()

    def penalty(recompute: bool) -> list[Tensor]:
        x = normal(6, 4, 64, 64).double().requires_grad_()
        with bn.recompute_outputs() if recompute else nullcontext():
            loss = net(x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(loss, x, retain_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))

    assert_same_bits(penalty(True), penalty(False))


@needs_calls
def test_the_input_of_a_convolution_made_again_must_not_change():
    first, norm, last = wide(), bn.BatchNorm2d(8, activation="gelu"), nn.Conv2d(8, 2, 3)
    x = normal(6, 4, 64, 64)
    with bn.recompute_outputs():
        loss = last(norm(first(x))).sum()
    x.add_(1)
    with pytest.raises(bn.errors.StateError, match="the input of the convolution before it"):
        loss.backward()
