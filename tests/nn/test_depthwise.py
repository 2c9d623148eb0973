"""A depthwise convolution and the layers around it, computed at once, are what they are one after the other."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.surgery.chains import Before
from batchnorm.surgery.conversion import revert
from batchnorm.surgery.depthwise import is_depthwise, normalized_convolution

pytestmark = pytest.mark.skipif(cpu.call is None, reason=f"needs the C++ call: {cpu.call_error}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """A layer, or none; a depthwise convolution; a layer."""

    def __init__(
        self,
        channels: int,
        kernel: tuple[int, ...],
        *,
        before: str | None = "absent",
        activation: str | None = "relu",
        **conv: Any,
    ) -> None:
        super().__init__()
        axes = len(kernel)
        norm = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d}[axes]
        self.before = norm(channels, activation=before) if before != "absent" else None
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d}[axes](channels, channels, kernel, groups=channels, **conv)
        self.norm = norm(channels, activation=activation)
        self.together = True
        for k, (name, each) in enumerate(self.named_parameters()):
            with torch.no_grad():
                each.copy_(normal(*each.shape, seed=k) + (1 if each.ndim == 1 and "weight" in name else 0))

    def forward(self, x: Tensor) -> Tensor:
        before = None if self.before is None else Before(self.before)
        if self.together:
            return normalized_convolution(self.conv, self.norm, x, before=before)
        return self.norm(self.conv(x if before is None else before(x)))


def is_together(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == "DepthwiseBatchNormBackward"


def step(chain: Chain, x: Tensor, together: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, the gradients and the buffers; in float64, not at once, if asked."""
    chain, x = copy.deepcopy(chain), x.detach().clone()
    if dtype is not None:
        chain, x = chain.to(dtype), x.to(dtype)
    x.requires_grad_()
    chain.together = together
    y = chain(x)
    assert is_together(y) == together
    y.backward(normal(*y.shape, seed=9).to(torch.float32).to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, **dict(chain.named_buffers())}
    return found | {name: each.grad for name, each in chain.named_parameters()}


# Channels, kernel, size, samples, and what the convolution has besides. Long planes are walked one by one, short ones
# as rows of channels, a vector at a time with some channels left.
SHAPES: list[tuple[int, tuple[int, ...], tuple[int, ...], int, dict[str, Any]]] = [
    (40, (3, 3), (6, 6), 5, {"padding": 1}),
    (48, (5, 5), (3, 3), 4, {"padding": 2}),
    (35, (3, 3), (7, 8), 3, {"padding": 1, "stride": 2}),
    (33, (5, 3), (9, 4), 2, {"padding": (1, 3), "stride": (3, 1), "dilation": (2, 1)}),
    (3, (3, 3), (37, 50), 2, {"padding": 1}),
    (2, (5, 5), (20, 24), 3, {"padding": 2, "bias": False}),
    (5, (3, 3), (31, 46), 2, {"padding": 1, "stride": 2}),
    (4, (7, 7), (18, 21), 2, {"padding": 3, "stride": (1, 2)}),
    (3, (3, 3), (6, 5), 9, {"padding": 0}),
    (2, (4, 2), (9, 9), 3, {"padding": (4, 1), "dilation": (1, 3)}),
    (2, (1, 1), (2, 1), 2049, {}),
    (3, (9,), (40,), 3, {"padding": 4}),
    (40, (4,), (13,), 4, {"stride": 3}),
    (3, (33,), (90,), 2, {"padding": "same"}),
    (2, (64,), (70,), 2, {"padding": "valid", "dilation": 1}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", ["absent", None, "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_once_is_one_after_the_other(shape: Any, before: str | None, dtype: torch.dtype):
    """As near to float64 as torch's convolution with our layers, but for a few roundings."""
    channels, kernel, size, samples, options = shape
    activation = "hardswish" if before == "silu" else "relu"
    chain = Chain(channels, kernel, before=before, activation=activation, **options).to(dtype)
    x = (normal(samples, channels, *size) + 0.5).to(dtype)
    ours, apart, exact = step(chain, x, True), step(chain, x, False), step(chain, x, False, torch.float64)
    # What a batch normalization behind it takes off has no gradient but roundings.
    least = 0.01 * max(float(exact[name].abs().max()) for name, _ in chain.named_parameters())
    for name, expected in exact.items():
        largest = expected.abs().max().clamp_min(least if name in dict(chain.named_parameters()) else 1e-6)
        error = (ours[name].to(torch.float64) - expected).abs().max() / largest
        theirs = (apart[name].to(torch.float64) - expected).abs().max() / largest
        assert ours[name].dtype == apart[name].dtype
        assert error <= 3 * theirs + (5000 if dtype == torch.float64 else 200) * torch.finfo(dtype).eps, (
            name,
            float(error),
            float(theirs),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("before", ["absent", "silu"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape[1]) == 2], ids=str)
def test_with_the_channels_last(shape: Any, before: str, dtype: torch.dtype):
    channels, kernel, size, samples, options = shape
    """Kernels of 20 values and more; torch's convolution by a smaller one takes less time in this order."""
    chain = Chain(channels, kernel, before=before, activation="silu", **options).to(dtype)
    x = normal(samples, channels, *size).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    takes = chain.conv.weight[0].numel() >= 20
    ours, expected = step(chain, last, takes or last.stride() == x.stride()), step(chain, x, True)
    assert all(ours[name].is_contiguous(memory_format=torch.channels_last) for name in ("y", "x"))
    eps = torch.finfo(dtype).eps
    least = 0.01 * max(float(expected[name].abs().max()) for name, _ in chain.named_parameters())
    for name in ("conv.bias", *(["conv.weight"] if chain.conv.weight[0].numel() == 1 else [])):
        expected.pop(name, None)  # which has no gradient but roundings
    for name, value in expected.items():
        error = (ours[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(least)
        assert error <= 2000 * eps if dtype != torch.bfloat16 else error <= 20 * eps, (name, float(error))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_statistics_of_the_population(shape: Any):
    channels, kernel, size, samples, options = shape
    chain = Chain(channels, kernel, before="relu", **options).double().eval()
    chain.before.running_mean.normal_()
    chain.norm.running_var.uniform_(0.5, 2)
    x = normal(samples, channels, *size).double()
    torch.testing.assert_close(step(chain, x, True), step(chain, x, False), rtol=1e-9, atol=1e-9)
    chain.before.train()
    torch.testing.assert_close(step(chain, x, True), step(chain, x, False), rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        inferred = chain(x)
        chain.together = False
        torch.testing.assert_close(inferred, chain(x), rtol=1e-9, atol=1e-9)


def test_any_number_of_threads_gives_the_same_bits():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(
                [step(Chain(c, k, before="relu", **o), normal(n, c, *s), True) for c, k, s, n, o in SHAPES[:8]]
            )
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", ["x", "conv.weight", "norm.weight", "before.weight", "norm.bias", "all but x"])
def test_gradients_that_nobody_wants_are_left_out(frozen: str):
    chain, x = Chain(6, (3, 3), before="relu", padding=1).double(), normal(3, 6, 8, 8).double()
    expected = step(chain, x, False)
    leaves = {"x": x.requires_grad_(), **dict(chain.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_((name == "x") if frozen == "all but x" else name != frozen)
    y = chain(x)
    assert is_together(y)
    y.backward(normal(*y.shape, seed=9).to(torch.float32).double())
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-9, atol=1e-9)


def test_a_channel_that_is_not_finite_stays_alone():
    chain, x = Chain(35, (3, 3), before="relu", padding=1), normal(4, 35, 5, 5)
    expected = step(chain, x, True)
    spoiled = x.clone()
    spoiled[1, 7, 2, 3] = torch.inf
    found = step(chain, spoiled, True)
    others = [c for c in range(35) if c != 7]
    assert not found["y"][:, 7].isfinite().all()
    for name, each in found.items():
        if each.ndim and name not in ("norm.num_batches_tracked", "before.num_batches_tracked"):
            axis = 1 if name in ("x", "y") else 0
            torch.testing.assert_close(
                each.index_select(axis, torch.tensor(others)),
                expected[name].index_select(axis, torch.tensor(others)),
                rtol=0,
                atol=0,
            )


def test_what_lies_between_is_not_kept():
    """Of the forward's memory two outputs of this size are gone: those of the layer before and of the convolution."""
    chain, x = Chain(32, (3, 3), before="relu", padding=1), normal(8, 32, 24, 24).requires_grad_()

    def kept(together: bool) -> int:
        chain.together = together
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = chain(x)
        assert is_together(y) == together
        return sum(storages.values())

    size = x.numel() * x.element_size()
    assert 1.99 * size < kept(False) - kept(True) < 2.1 * size


def test_a_changed_input_is_told():
    chain, x = Chain(4, (3, 3)), normal(2, 4, 6, 6).requires_grad_()
    given = x * 1
    y = chain(given)
    with torch.no_grad():
        given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        chain.conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Watched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda chain: chain.conv.register_forward_hook(lambda *_: None),
        lambda chain: chain.norm.register_forward_pre_hook(lambda *_: None),
        lambda chain: chain.before.register_forward_hook(lambda *_: None),
        lambda chain: parametrize.register_parametrization(chain.conv, "weight", Watched()),
        lambda chain: bn.convert(chain, ghost_size=2),
        lambda chain: bn.convert(chain, channel_groups=2),
        lambda chain: setattr(chain.conv, "padding_mode", "reflect"),
        lambda chain: setattr(chain, "norm", nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
    ],
)
def test_what_someone_watches_or_changes_is_computed_in_turn(change: Callable[[Chain], Any]):
    chain, x = Chain(4, (3, 3), before="relu", padding=1), normal(4, 4, 6, 6)
    change(chain)
    y = chain(x)
    assert y.grad_fn.name() != "DepthwiseBatchNormBackward" or chain.before._forward_hooks
    chain.together = False
    chain.norm.train()
    torch.testing.assert_close(y, chain(x), rtol=1e-5, atol=1e-5)


def test_hooks_of_everyone_and_of_functions_are_seen():
    chain, x, seen = Chain(4, (3, 3), before="relu", padding=1), normal(2, 4, 6, 6), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        chain(x)
    finally:
        handle.remove()
    assert {"Conv2d", "BatchNorm2d"} <= set(seen)


def test_other_orders_devices_and_casts_go_through_torch():
    chain, x = Chain(4, (3, 3), padding=1), normal(2, 4, 6, 6)
    assert not is_together(chain(x.transpose(2, 3)))
    torch.testing.assert_close(chain(x.transpose(2, 3)), chain(x.transpose(2, 3).contiguous()), rtol=1e-4, atol=1e-4)
    # Rows of channels of all samples would be held at once: of very many places they are not.
    patches = normal(2, 4, 40, 40)
    assert is_together(Chain(4, (3, 3), stride=16)(patches))
    assert not is_together(Chain(4, (3, 3), stride=17)(patches))
    many = normal(3, 2, 160, 160).to(memory_format=torch.channels_last)
    assert not is_together(Chain(2, (5, 5), padding=2)(many))
    assert is_together(Chain(2, (5, 5), padding=2)(many[:2]))
    assert chain.to("meta")(x.to("meta")).shape == x.shape
    chain = Chain(4, (3, 3), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chain(x).dtype == torch.bfloat16
    for wrong in (normal(2, 4, 6), normal(2, 5, 6, 6), normal(2, 4, 6, 6).double()):
        with pytest.raises((RuntimeError, bn.errors.InputError)):
            chain(wrong)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        Chain(4, (3, 3))(normal(2, 4, 2, 2))


def test_statistics_that_are_not_finite_are_refused_as_ever():
    chain = bn.convert(Chain(4, (3, 3), before="relu", padding=1), nonfinite="skip")
    x = normal(2, 4, 6, 6)
    x[0, 1, 2, 2] = torch.nan
    before = {name: each.clone() for name, each in chain.named_buffers()}
    assert is_together(chain(x))
    for name, each in chain.named_buffers():
        if "running" in name:
            torch.testing.assert_close(each, before[name], rtol=0, atol=0)
        if "skipped" in name:
            assert each == 1


def test_further_derivatives_and_compiled_autograd():
    chain = Chain(2, (2, 3), before="silu", activation="silu", padding=1, stride=(2, 1)).double()
    chain.before.update = chain.norm.update = "never"
    x = normal(2, 2, 3, 4).double().requires_grad_()
    parameters = list(chain.parameters())

    def function(x: Tensor, *given: Tensor) -> Tensor:
        for parameter, value in zip(parameters, given, strict=True):
            assert parameter is value
        return chain(x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))
    y = chain(x)
    expected = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), retain_graph=True)
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(torch.ones_like(y))
    torch.testing.assert_close([each.grad for each in (x, *parameters)], list(expected), rtol=1e-9, atol=1e-9)


def test_a_compiled_chain_is_the_same():
    chain, x = Chain(4, (3, 3), before="relu", padding=1), normal(2, 4, 6, 6)
    expected = chain(x)
    torch.testing.assert_close(torch.compile(chain, backend="eager", fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", ["absent", "relu"])
def test_outputs_are_made_again(before: str):
    torch.manual_seed(0)
    chain, after = Chain(40, (3, 3), before=before, padding=1), nn.Conv2d(40, 5, 1)
    first, x = bn.BatchNorm2d(40, activation="relu"), normal(4, 40, 6, 6).requires_grad_()
    expand = nn.Conv2d(40, 40, 1)

    def gradients(recompute: bool) -> tuple[Any, bool]:
        with bn.recompute_outputs() if recompute else torch.enable_grad():
            y = chain(expand(x) if before == "relu" else first(expand(x)))
            out = after(y)
        assert is_together(y)
        weak = y.untyped_storage()._weak_ref()
        del y
        gc.collect()
        alive = torch.UntypedStorage._new_with_weak_ptr(weak) is not None
        leaves = [x, *expand.parameters(), *chain.parameters(), *after.parameters()]
        return torch.autograd.grad(out.square().sum(), leaves), alive

    (ours, kept), (expected, was) = gradients(True), gradients(False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (kept, was) == (False, True)
    with bn.recompute_outputs():
        given = expand(x)
        out = after(chain(given))
    with torch.no_grad():
        given.add_(1)
    with pytest.raises((bn.errors.StateError, RuntimeError), match="inplace"):
        out.sum().backward()


def test_gradients_take_the_place_of_others():
    chain, x = Chain(32, (3, 3), padding=1), normal(2, 32, 12, 12).requires_grad_()
    before = cpu.calls.gradients_in_place()
    (chain(x) * 2).sum().backward()
    assert cpu.calls.gradients_in_place() > before
    held = []
    y = chain(x)
    y.register_hook(lambda dy: held.append((dy, dy.clone())))
    (y * 2).sum().backward()
    torch.testing.assert_close(*held[0], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- accelerate
def separable(channels: int, activation: Callable[[], nn.Module] = nn.ReLU6) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        activation(),
    ]


class Inverted(nn.Module):
    """The block of Sandler et al. 2018, its parts in containers of their own."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Sequential(*separable(wide)),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Called(nn.Module):
    """Activations are calls, and the modules have no container."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2, self.norm2, _ = separable(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(x))
        return nn.functional.silu(self.norm2(self.conv2(x)))


class Separate(nn.Module):
    """Someone else reads the output of the convolution, or of the layer before it."""

    def __init__(self, of_conv: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2, self.norm2, _ = separable(6)
        self.of_conv = of_conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        y = self.conv2(x)
        return self.norm2(y) * (y if self.of_conv else x)


def kinds_of(y: Tensor) -> dict[str, int]:
    found, open_, seen = {}, [y.grad_fn], set()
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[node.name()] = found.get(node.name(), 0) + 1
            open_ += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    ("make", "norms", "depthwise"),
    [
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), *separable(6), *separable(6, nn.SiLU), nn.Flatten()), 0, 2),
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), *separable(6)), 0, 1),
        (lambda: nn.Sequential(Inverted(6, 12), Inverted(6, 18)), 2, 2),
        (Called, 0, 1),
        (lambda: Separate(of_conv=True), 2, 0),
        (lambda: Separate(of_conv=False), 1, 1),
    ],
)
def test_accelerate_takes_in_convolutions(make: Callable[[], nn.Module], norms: int, depthwise: int):
    torch.manual_seed(0)
    net, x = make(), normal(3, 6, 9, 9)
    ours = bn.accelerate(net, x, inplace=False)
    kinds = kinds_of(ours(x))
    assert (kinds.get("BatchNormBackward", 0), kinds.get("DepthwiseBatchNormBackward", 0)) == (norms, depthwise)
    assert len(ours.report.convolved) == depthwise
    for name in ours.report.convolved:
        assert "a depthwise convolution" in ours.report.fused[name]
    net(x)
    torch.testing.assert_close(ours.state_dict(), net.state_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(ours)(x), net(x), rtol=1e-4, atol=1e-4)
    with bn.recompute_outputs():
        torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-4)
    back = revert(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]
    assert kinds_of(back(x)) == kinds_of(net(x))


def test_a_container_can_be_cut_extended_and_pickled():
    net = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), *separable(6), nn.Conv2d(6, 2, 1))
    x = normal(3, 6, 5, 5)
    bn.accelerate(net, x)
    for cut in (net[:4], net[:5], net[:6], net[3:6], net[4:], nn.Sequential(*list(net)[:5])):
        for module in cut:
            module.train()
        given = x
        for module in cut:
            given = module(given)
        torch.testing.assert_close(cut(x), given, rtol=1e-4, atol=1e-5)
    net.eval()
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)
    assert type(revert(again)) is nn.Sequential
    net[3] = nn.Identity()
    net.append(nn.Flatten())
    assert net(x).shape == (3, 50)
    seen = []
    net[2].register_forward_hook(lambda *_: seen.append("activation"))
    net[3] = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    net(x)
    assert seen == ["activation"]


def test_other_verbs_after_it():
    torch.manual_seed(0)
    net, x = nn.Sequential(Inverted(6, 12), nn.Flatten()), normal(3, 6, 9, 9)
    ours = bn.accelerate(net, x, inplace=False)
    plan = bn.save_memory(ours, x, budget=10.0)
    assert all(each.remade for name, each in plan.outputs.items() if name == "0.conv.1.1")
    loss, expected = ours(x).square().mean(), net(x).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(ours.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    folded = bn.fold(ours.eval(), x).model
    torch.testing.assert_close(folded(x), ours(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_is_depthwise():
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert is_depthwise(nn.Conv1d(4, 4, 3, groups=4, padding="same"))
    for other in (
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(1, 1, 3),
        nn.Conv3d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=4, padding_mode="circular", padding=1),
        nn.Conv1d(4, 4, 4, groups=4, padding="same"),
        nn.ConvTranspose2d(4, 4, 3, groups=4),
        nn.Identity(),
    ):
        assert not is_depthwise(other)


def test_one_layer_before_and_behind():
    """Its running statistics take in the batch before the convolution first, as ever."""
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(6)
    net, x = nn.Sequential(shared, *separable(6)[:1], shared), normal(4, 6, 8, 8)
    ours = bn.accelerate(copy.deepcopy(net), x)
    apart = nn.Sequential(nn.BatchNorm2d(6), copy.deepcopy(net[1]), nn.BatchNorm2d(6))
    later = bn.accelerate(copy.deepcopy(apart), x)
    assert len(later.report.convolved) == 1
    apart[2], later[2] = apart[0], later[0]
    for mine, theirs in ((ours, net), (later, apart)):
        for k in range(3):
            mine(x + k)
            theirs(x + k)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)


class WritesBetween(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.norm1, self.place = nn.BatchNorm2d(6, affine=False), place
        self.conv2, self.norm2, _ = separable(6)
        self.conv2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach() * 1.0
        y = self.norm1(z)
        if self.place == 1:
            z.mul_(3.0)
        y = self.conv2(y)
        if self.place == 2:
            z.mul_(3.0)
        return self.norm2(y) * z


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nothing_is_read_after_it_was_written(place: int):
    net, x = WritesBetween(place), normal(3, 6, 7, 7)
    ours = bn.accelerate(net, x, inplace=False)
    assert len(ours.report.convolved) == (place < 2)
    assert ("norm1" in ours.report.fused) == (place == 0)
    torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-5)


def test_gradients_that_are_zero_but_for_rounding_are_no_difference():
    for seed in (537, 1, 2):
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 18, dtype=torch.double)
        net = nn.Sequential(
            nn.BatchNorm1d(8, momentum=None), nn.ELU(), nn.Conv1d(8, 8, 1, groups=8), nn.BatchNorm1d(8), nn.Hardswish()
        )
        for layer in (net[0], net[3]):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        assert bn.accelerate(net.double(), x).report.convolved == ("3",)


class PaddedFirst(nn.Conv2d):
    """As EfficientNets that were ported from TensorFlow have it: the zeros are a module in the convolution."""

    def __init__(self, channels: int, size: int, around: Any, **options: Any) -> None:
        super().__init__(channels, channels, size, groups=channels, **options)
        self.around = nn.ZeroPad2d(around) if around else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(self.around(x), self.weight, self.bias, *options)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (4, 0)))


class Reflected(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class Wider(nn.Conv2d):
    """In training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 2, 2, 2) if self.training else (1, 1, 1, 1)))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias, 1, self.padding, 1, self.groups)


class OtherStride(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, 2, groups=self.groups)


class Counting(nn.Conv2d):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Alike(nn.Conv2d):
    """Another name, and nothing else."""


SUBCLASSES: list[tuple[nn.Module, bool]] = [
    (Alike(6, 6, 3, groups=6, padding=1), True),
    (PaddedFirst(6, 3, (1, 1, 1, 1)), False),
    (Causal(6, 6, 5, groups=6), False),
    *((kind(6, 6, 3, groups=6), False) for kind in (Reflected, Wider, Standardized, OtherStride, Counting, Doubled)),
]


@pytest.mark.parametrize(("conv", "is_taken"), SUBCLASSES, ids=[type(conv).__name__ for conv, _ in SUBCLASSES])
def test_subclasses_of_convolutions(conv: nn.Module, is_taken: bool):
    """Those that change nothing are taken in; all are computed right."""
    assert is_depthwise(conv) == is_taken
    is_flat = isinstance(conv, nn.Conv1d)
    norm: type[nn.Module] = nn.BatchNorm1d if is_flat else nn.BatchNorm2d
    torch.manual_seed(0)
    first = (nn.Conv1d if is_flat else nn.Conv2d)(3, 6, 1)
    net = nn.Sequential(first, norm(6), nn.ReLU(), copy.deepcopy(conv), norm(6), nn.ReLU())
    x = normal(*((5, 3, 12) if is_flat else (5, 3, 12, 12)))
    original = copy.deepcopy(net)
    bn.accelerate(net, x)
    assert is_together(copy.deepcopy(net)(x)) == is_taken
    found = []
    for each in (net, original):
        twin = copy.deepcopy(each).double()
        z = twin(x.double())
        z.square().sum().backward()
        found.append([z, *(p.grad for p in twin.parameters()), *twin.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_forward_put_into_a_convolution_is_seen():
    plain = nn.Conv2d(6, 6, 3, groups=6)
    assert is_depthwise(plain)
    plain.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_depthwise(plain)
