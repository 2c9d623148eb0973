"""Plain eager calls made at once in C++: taken where they are plain, with the bits of the way through Python."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.ops.schemas import ACTIVATIONS

NODE = "BatchNormBackward"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def through_python(call: Callable[[], Any]) -> Any:
    """The result of a call that C++ does not take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "call", None)
        return call()


def was_at_once(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == NODE


def assert_same_bits(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, at_once: bool) -> list[Any]:
    """Output, gradients and buffers of a copy of the layer after one call."""
    layer = copy.deepcopy(layer)
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    y = layer(*leaves)
    assert was_at_once(y) == at_once
    return [y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], dy), *layer.buffers()]


def test_the_library_is_there():
    assert cpu.call is not None, cpu.call_error


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_same_bits_as_through_python(activation: str, training: bool):
    formats = [torch.contiguous_format, torch.channels_last]
    options: list[dict[str, Any]] = [{}, {"momentum": None}, {"affine": False}, {"bias": False}]
    options += [{"track_running_stats": False}, {"ghost_size": 3}, {"ghost_size": 2, "momentum": None}]
    for fused, memory, option in itertools.product([False, True], formats, options):
        for dtype in (torch.float32, torch.bfloat16) if option == {} else (torch.float32,):
            x = normal(4, 5, 3, 3, dtype=dtype).to(memory_format=memory)
            residual = normal(4, 5, 3, 3, seed=1, dtype=dtype) if fused else None
            dy = normal(4, 5, 3, 3, seed=2, dtype=dtype)
            layer = bn.BatchNorm2d(5, activation=activation, **option).train(training)
            for k, parameter in enumerate(layer.parameters()):
                nn.init.normal_(parameter, 1.0 - k)
            ours = step(layer, x, residual, dy, at_once=True)
            expected = through_python(lambda: step(layer, x, residual, dy, at_once=False))  # noqa: B023
            assert_same_bits(ours, expected)


def test_the_function_too():
    x, rows = normal(6, 3).requires_grad_(), (torch.zeros(3), torch.ones(3))
    y = bn.functional.batch_norm(x, *rows, training=True, activation="relu")
    assert was_at_once(y)
    assert rows[0].ne(0).all()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_what_is_not_plain_goes_through_python():
    layer = bn.BatchNorm1d(3)
    x = normal(6, 3)
    assert was_at_once(layer(x))
    for mode in (Watching(), Overriding()):
        with mode:
            assert not was_at_once(layer(x))
    assert not was_at_once(layer(x.as_subclass(Sub)))
    with forward_ad.dual_level():
        assert not was_at_once(layer(forward_ad.make_dual(x, x)))
        layer.weight.requires_grad_(False)
        y = layer(x.requires_grad_())  # no tangent: the value alone
        assert was_at_once(y)
        assert forward_ad.unpack_dual(y).tangent is None
    special = bn.BatchNorm1d(3, nonfinite="skip")
    assert not was_at_once(special(x))


def test_ghost_batches_beside_other_options_go_through_python():
    x = normal(6, 4)
    layer = bn.BatchNorm1d(4, ghost_size=2)
    assert was_at_once(layer(x))
    assert was_at_once(copy.deepcopy(layer)(x))
    assert not was_at_once(layer(x, mask=torch.ones(6, dtype=torch.bool)))
    for option, value in {"channel_groups": 2, "ghost_update": "decay", "running": "debiased", "domains": 2}.items():
        other = bn.BatchNorm1d(4, **{"ghost_size": 2, option: value})
        assert not was_at_once(other(x)), option
        setattr(other, option, 0 if option in ("channel_groups", "domains") else "merge" if value == "decay" else "ema")
        assert was_at_once(other(x)), option
    with pytest.raises(bn.BatchNormError, match="expected 4 channels"):
        bn.BatchNorm1d(4, affine=False, track_running_stats=False, ghost_size=2)(normal(6, 3))
    with pytest.raises(bn.BatchNormError, match="expected 4D input"):
        bn.BatchNorm2d(4, ghost_size=2)(x)


def test_errors_and_detours_are_those_of_python():
    layer = bn.BatchNorm1d(3)
    cases: list[Callable[[], Any]] = [
        lambda: layer(normal(6, 4)),
        lambda: layer(normal(1, 3)),
        lambda: layer(normal(6, 3).double()),
        lambda: layer(normal(6, 3).long()),
        lambda: layer(normal(6, 3), normal(6, 2)),
        lambda: bn.functional.batch_norm(normal(6, 3), None, torch.ones(3), training=True),
        lambda: bn.functional.batch_norm(normal(6, 3), None, None),
        lambda: bn.functional.batch_norm(normal(6, 3), None, None, training=True, eps=-1.0),
        lambda: bn.functional.batch_norm(normal(6, 3), None, None, training=True, momentum=float("nan")),
        lambda: bn.functional.batch_norm(normal(6, 3), None, None, training=True, activation="swish"),
    ]
    for case in cases:
        with pytest.raises(bn.BatchNormError) as ours:
            case()
        with pytest.raises(type(ours.value)) as expected:
            through_python(case)
        assert str(ours.value) == str(expected.value)
    assert layer.num_batches_tracked == 0
    assert_same_bits(layer(torch.empty(0, 3)), torch.empty(0, 3))
    double = bn.BatchNorm1d(3).to(torch.float64)
    double.running_mean = torch.zeros(6, dtype=torch.float64)[::2]  # of a stride that the kernels do not take
    assert not was_at_once(double(normal(6, 3).double()))


def test_gradients_that_nobody_asked_for_are_not_made():
    layer = bn.BatchNorm1d(3, activation="gelu")
    x, residual = normal(6, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    dy = normal(6, 3, seed=2)
    leaves = [x, layer.weight, layer.bias, residual]
    together = torch.autograd.grad(layer(x, residual), leaves, dy)
    for leaf, expected in zip(leaves, together, strict=True):
        assert_same_bits(torch.autograd.grad(layer(x, residual), leaf, dy)[0], expected)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert_same_bits(torch.autograd.grad(layer(x, residual), [x, residual], dy), together[::3])
    layer.eval()
    assert layer(x.detach()).grad_fn is None


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ghost_size", [0, 3])
def test_higher_derivatives(activation: str | None, training: bool, ghost_size: int):
    layer = bn.BatchNorm1d(3, activation=activation, ghost_size=ghost_size).double().train(training)
    leaves = [normal(5, 3).double().requires_grad_(), normal(5, 3, seed=1).double().requires_grad_()]
    assert was_at_once(layer(*leaves))

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    inputs = (*leaves, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, inputs, check_batched_grad=True, check_fwd_over_rev=True)


def test_what_changed_since_the_forward_is_refused():
    layer, x = bn.BatchNorm1d(3), normal(6, 3)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_hooks_see_the_same_saved_tensors():
    """So checkpointing may meet the one way in the forward and the other in the recomputation."""
    x, residual = normal(6, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    for activation, affine, added in itertools.product([None, "relu", "gelu"], [True, False], [None, residual]):
        layer = bn.BatchNorm1d(3, activation=activation, affine=affine)

        def saved(layer: nn.Module = layer, added: Tensor | None = added) -> list[Tensor]:
            packed: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
                layer(x, added)
            return packed

        assert_same_bits(saved(), through_python(saved))


@pytest.mark.parametrize("ghost_size", [0, 2])
def test_compiled_autograd(ghost_size: int):
    layer = bn.BatchNorm1d(3, activation="relu", ghost_size=ghost_size)
    leaves = [normal(6, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_(), *layer.parameters()]
    expected = torch.autograd.grad(layer(*leaves[:2]), leaves, normal(6, 3, seed=2))
    y = layer(*leaves[:2])
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(normal(6, 3, seed=2))
    assert_same_bits([leaf.grad for leaf in leaves], list(expected))


def test_other_torch_other_way(monkeypatch: pytest.MonkeyPatch):
    """A library of another torch is left alone, and the configuration says why."""
    monkeypatch.setattr(cpu, "call", None)
    monkeypatch.setattr(cpu, "call_error", None)
    other = SimpleNamespace(torch_version="1.0", call=lambda *_: None)
    monkeypatch.setattr(cpu.importlib, "import_module", lambda name: other)
    cpu._load_calls(cpu._library)
    assert cpu.call is None
    assert "torch 1.0" in cpu.call_error

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cpu.importlib, "import_module", missing)
    cpu._load_calls(cpu._library)
    assert "not built" in cpu.call_error
    layer, x = bn.BatchNorm1d(3), normal(6, 3)
    assert not was_at_once(layer(x))
    assert layer.num_batches_tracked == 1
