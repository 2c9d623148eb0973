"""Plain eager calls made at once in C++: taken where they are plain, with the bits of the way through Python."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.nn.options import DEFAULTS
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (3, 5, 2, 7), (40, 6, 9, 9)], ids=str)
def test_the_gradient_of_a_sum_is_that_of_its_elements(shape: tuple[int, ...], dtype: torch.dtype):
    """One element stands for all of it: the bits are those of a gradient that has memory for each element."""
    x = normal(*shape, dtype=dtype)
    if len(shape) == 4 and shape[1] == 5:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = bn.BatchNorm1d if x.dim() == 2 else bn.BatchNorm2d
    net = layer(shape[1], activation="silu", dtype=dtype)
    dy = torch.tensor(-0.7, dtype=dtype).expand(shape)
    assert_same_bits(*(step(net, x, None, each, at_once=True) for each in (dy, dy.contiguous())))


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
    special = bn.BatchNorm1d(3, nonfinite="skip_channel")
    assert not was_at_once(special(x))


def test_ghost_batches_beside_other_options_go_through_python():
    x = normal(6, 4)
    layer = bn.BatchNorm1d(4, ghost_size=2)
    assert was_at_once(layer(x))
    assert was_at_once(copy.deepcopy(layer)(x))
    assert not was_at_once(layer(x, mask=torch.ones(6, dtype=torch.bool)))
    for option, value in {"channel_groups": 2, "ghost_update": "decay", "nonfinite": "skip"}.items():
        other = bn.BatchNorm1d(4, **{"ghost_size": 2, option: value})
        assert not was_at_once(other(x)), option
        setattr(other, option, DEFAULTS[option])
        assert was_at_once(other(x)), option
    with pytest.raises(bn.BatchNormError, match="expected 4 channels"):
        bn.BatchNorm1d(4, affine=False, track_running_stats=False, ghost_size=2)(normal(6, 3))
    with pytest.raises(bn.BatchNormError, match="expected 4D input"):
        bn.BatchNorm2d(4, ghost_size=2)(x)


@pytest.mark.parametrize(
    "given",
    [{"running": "debiased"}, {"running": "cumulative"}, {"running_var": "biased"}, {"nonfinite": "skip"},
     {"domains": 3}, {"domains": 2, "running": "debiased", "running_var": "biased", "nonfinite": "skip"}],
)  # fmt: skip
def test_other_estimates_of_the_population_are_made_at_once(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The same outputs and buffers as by Python, where a batch is refused in the middle, and in evaluation."""
    layers = [bn.BatchNorm1d(3, **given) for _ in range(2)]
    batches = [normal(6, 3, seed=seed) for seed in range(5)]
    batches[2][1, 1] = float("inf")
    for mode in (True, False):
        for k, x in enumerate(batches if mode else batches[:1]):
            for layer in layers:
                if layer.domains:
                    layer.domain = k % layer.domains
                layer.train(mode)
            ours = layers[0](x)
            assert was_at_once(ours)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "call", None)
                patch.setattr(cpu, "torch_below", 0)
                expected = layers[1](x)
            assert not was_at_once(expected)
            assert_same_bits(ours, expected)
            assert_same_bits([*layers[0].buffers()], [*layers[1].buffers()])
            assert_same_bits(layers[0].running_carry, layers[1].running_carry)


VALID = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
BESIDE: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
    ({"channel_groups": 2}, {}),
    ({"channel_groups": 4, "running_var": "biased", "nonfinite": "skip"}, {}),
    ({"renorm": bn.Renorm(1.1, 0.2, warmup=0)}, {}),
    ({"renorm": bn.Renorm(warmup=4), "running": "debiased", "domains": 2}, {}),
    ({}, {"mask": VALID}),
    ({"nonfinite": "skip", "domains": 2, "running": "cumulative"}, {"mask": VALID[:, None]}),
    ({}, {"lengths": torch.tensor([3, 0, 1, 2, 3, 1])}),
    ({"pool": "sequence"}, {}),
    ({"pool": "sequence"}, {"lengths": torch.tensor([3, 0, 1, 2, 3, 1])}),
    ({"pool": "sequence", "batch_first": False}, {"lengths": torch.tensor([6, 0, 5])}),
    ({"pool": "sequence", "renorm": bn.Renorm(warmup=0)}, {}),
    ({"pool": "sequence", "channel_groups": 2, "domains": 2}, {}),
]


def of_option(option: dict[str, Any], call: dict[str, Tensor], seed: int, dtype: torch.dtype) -> Tensor:
    sized = 3 if "lengths" in call or "pool" in option else 0
    shape = (6, sized, 4) if "pool" in option else (6, 4, sized) if sized else (6, 4)
    return normal(*shape, seed=seed, dtype=dtype)


@pytest.mark.parametrize(("option", "call"), BESIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}])
def test_what_parts_or_corrects_a_batch_is_made_at_once(
    option: dict[str, Any], call: dict[str, Tensor], dtype: torch.dtype, affine: dict[str, bool]
):
    """With the bits of Python: outputs, gradients, buffers and carries over a few batches, then in evaluation."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for activation, fused in (("relu", False), ("leaky_relu", True), ("gelu", True), (None, True)):
        layer = bn.BatchNorm1d(4, activation=activation, dtype=wide, **option, **affine)
        for k, parameter in enumerate(layer.parameters()):
            nn.init.normal_(parameter, 1.0 - k)
        twins, results = [layer, copy.deepcopy(layer)], []
        for at_once, twin in zip((True, False), twins, strict=True):

            def steps(twin: Any = twin, at_once: bool = at_once, fused: bool = fused) -> Iterator[Any]:
                for seed in range(4):
                    twin.train(seed < 3)
                    twin.domain = seed % 2 if twin.domains else 0
                    x, dy = (of_option(option, call, 7 * seed + k, dtype).requires_grad_(k == 0) for k in range(2))
                    if seed == 1 and twin.nonfinite == "skip":
                        x.data[0, 0] = float("inf")
                    added = [of_option(option, call, 7 * seed + 2, dtype).requires_grad_()] if fused else []
                    y = twin(x, *added, **call)
                    assert ("BatchNormBackward" in nodes_of(y)) == at_once
                    yield [y, *torch.autograd.grad(y, [x, *added, *twin.parameters()], dy)]

            results.append(list(steps()) if at_once else through_python(lambda steps=steps: list(steps())))
            results[-1] += [*twin.buffers(), twin.running_carry]
        assert_same_bits(*results)


def nodes_of(y: Tensor) -> set[str]:
    """The names of the nodes that made an output, up to the second."""
    assert y.grad_fn is not None
    return {y.grad_fn.name(), *(each.name() for each, _ in y.grad_fn.next_functions if each is not None)}


@pytest.mark.parametrize(("option", "call"), [({}, {"mask": VALID[:5]}), ({"channel_groups": 2}, {}),
                                              ({"renorm": bn.Renorm(1.2, 0.1, warmup=0)}, {})])  # fmt: skip
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_higher_derivatives_of_what_parts_or_corrects_a_batch(
    option: dict[str, Any], call: dict[str, Tensor], activation: str | None
):
    layer = bn.BatchNorm1d(4, activation=activation, update="never", **option).double()
    layer.running_mean.fill_(0.2)
    leaves = [normal(5, 4).double().requires_grad_(), normal(5, 4, seed=1).double().requires_grad_()]
    assert was_at_once(layer(*leaves, **call))
    expected = through_python(lambda: gradients_twice(layer, leaves, call))
    assert_same_bits(gradients_twice(layer, leaves, call), expected)


def gradients_twice(layer: nn.Module, leaves: list[Tensor], call: dict[str, Tensor]) -> list[Tensor]:
    wanted = [*leaves, *layer.parameters()]
    first = torch.autograd.grad(layer(*leaves, **call), wanted, normal(5, 4, seed=2).double(), create_graph=True)
    squares = torch.stack([each.square().sum() for each in first]).sum()
    second = torch.autograd.grad(squares, wanted, allow_unused=True)
    return [*first, *(each for each in second if each is not None)]


@pytest.mark.parametrize(("option", "call"), BESIDE[:5])
def test_compiled_autograd_of_what_parts_or_corrects_a_batch(option: dict[str, Any], call: dict[str, Tensor]):
    layer = bn.BatchNorm1d(4, activation="gelu", update="never", **{**option, "nonfinite": "propagate"})
    leaves = [normal(6, 4).requires_grad_(), normal(6, 4, seed=1).requires_grad_(), *layer.parameters()]
    leaves = leaves[:4]
    expected = torch.autograd.grad(layer(*leaves[:2], **call), leaves, normal(6, 4, seed=2))
    y = layer(*leaves[:2], **call)
    torch.compiler.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(normal(6, 4, seed=2))
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_corrects_with_what_the_forward_used():
    layer, twin = (bn.BatchNorm1d(4, renorm=bn.Renorm(1.3, 0.5, warmup=0)) for _ in range(2))
    for seed in range(3):
        x = normal(6, 4, seed=seed).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        expected = twin(x)
        dy = normal(6, 4, seed=9)
        assert_same_bits(torch.autograd.grad(y, [x, *layer.parameters()], dy),
                         torch.autograd.grad(expected, [x, *twin.parameters()], dy))  # fmt: skip
        assert_same_bits([*layer.buffers()], [*twin.buffers()])


def test_masks_and_lengths_that_do_not_fit_get_the_errors_of_python():
    layer, x = bn.BatchNorm1d(4), normal(6, 4, 3)
    calls: list[dict[str, Any]] = [
        {"lengths": torch.tensor([4, 1, 1, 1, 1, 1])}, {"lengths": torch.tensor([-1, 1, 1, 1, 1, 1])},
        {"lengths": torch.ones(6)}, {"lengths": torch.ones(5, dtype=torch.long)}, {"mask": torch.ones(6, 3)},
        {"mask": torch.ones(6, 2, dtype=torch.bool)}, {"mask": torch.ones(6, 4, 3, dtype=torch.bool)},
        {"mask": torch.ones(6, 3, dtype=torch.bool), "lengths": torch.ones(6, dtype=torch.long)},
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(bn.BatchNormError) as ours:
            layer(x, **call)
        with pytest.raises(type(ours.value)) as expected:
            through_python(lambda call=call: layer(x, **call))
        assert str(ours.value) == str(expected.value)
    assert layer.num_batches_tracked == 0
    with pytest.raises(bn.BatchNormError, match="lengths are of the last axis"):
        layer(x[..., 0], lengths=torch.tensor([1] * 6))


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


@pytest.mark.parametrize("running", ["2.99.0", "3.0.1+cpu", "unknown"])
def test_other_torch_other_way(running: str, monkeypatch: pytest.MonkeyPatch):
    """Beside a torch that the installation has no library for, calls go another way, and the configuration says why."""
    monkeypatch.setattr(cpu, "call", None)
    monkeypatch.setattr(cpu, "call_error", None)
    monkeypatch.setattr(torch, "__version__", running)
    cpu._load_calls(cpu._library, cpu.path)
    assert cpu.call is None
    assert f"none for torch {running} (it has: " in cpu.call_error
    layer, x = bn.BatchNorm1d(3), normal(6, 3)
    assert not was_at_once(layer(x))
    assert layer.num_batches_tracked == 1


def test_a_library_of_another_build_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "call", None)
    monkeypatch.setattr(cpu, "call_error", None)
    monkeypatch.setattr(cpu, "_module", lambda file: SimpleNamespace(torch_version="1.0", call=lambda *_: None))
    cpu._load_calls(cpu._library, cpu.path)
    assert cpu.call is None
    assert "built with torch 1.0" in cpu.call_error


@pytest.mark.parametrize(
    ("built", "running", "expected"),
    [
        ("2.13.0", "2.13.0+cpu", True),
        ("2.14.1", "2.14.0", True),
        ("2.14.1", "2.13.1", False),
        ("2.14.0", "2.14.0a0+git1", False),
        ("2.14.0.dev20260601", "2.14.0", False),
        ("2.14.0a0+git1", "2.14.0a0+git1", True),
    ],
)
def test_releases_of_one_minor_version_share_a_library(built: str, running: str, expected: bool):
    assert cpu.serves(built, running) == expected


def test_tensors_that_lie_elsewhere_are_noticed():
    module, address = cpu.call.__self__, cpu._library.batchnorm_operators()
    probe = torch.empty(0)
    assert module.attach(address, probe, probe._cdata) is True
    assert module.attach(address, probe, probe._cdata + 8) is False
    assert module.attach(address, probe.as_subclass(Sub), probe._cdata) is False


# ------------------------------------------------------------------------------ by torch's own operator
@pytest.fixture
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "call", None)
    monkeypatch.setattr(cpu, "calls", None)
    monkeypatch.setattr(cpu, "torch_below", float("inf"))


ACTIVATE = {None: lambda z: z, "relu": torch.relu, "gelu": F.gelu, "leaky_relu": lambda z: F.leaky_relu(z, 0.01)}


@pytest.mark.usefixtures("_by_torch")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_torch_it_is_what_torch_computes(activation: str | None, training: bool, dtype: torch.dtype):
    for residual, options in itertools.product([False, True], [{}, {"momentum": None}, {"affine": False}]):
        ours, theirs = bn.BatchNorm2d(5, activation=activation, **options), nn.BatchNorm2d(5, **options)
        for layer in (ours.train(training), theirs.train(training)):
            layer.to(dtype)
            for k, parameter in enumerate(layer.parameters()):
                nn.init.normal_(parameter, 1.0 - k, generator=torch.Generator().manual_seed(k))
        for name in ("running_mean", "running_var"):  # ours stay float32 by themselves
            setattr(ours, name, getattr(ours, name).to(dtype))
        if dtype == torch.bfloat16:  # whose running statistics the layer's own operator updates, with their carry
            ours.update = "never"
        x = [normal(4, 5, 3, 3, dtype=dtype).requires_grad_() for _ in range(2)]
        z = [normal(4, 5, 3, 3, seed=1, dtype=dtype).requires_grad_() for _ in range(2)] if residual else [None, None]
        y = ours(x[0], z[0])
        expected = ACTIVATE[activation](theirs(x[1]) if z[1] is None else theirs(x[1]) + z[1])
        for result in (y, expected):
            result.backward(normal(4, 5, 3, 3, seed=2, dtype=dtype))
        assert y.grad_fn.name().rstrip("0123456789") != NODE
        leaves = [[each, *layer.parameters()] for each, layer in ((x[0], ours), (x[1], theirs))]
        gradients = [[leaf.grad for leaf in each] for each in leaves]
        assert_same_bits([y, *gradients[0]], [expected, *gradients[1]])
        if ours.update == "auto":
            assert_same_bits(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.usefixtures("_by_torch")
@pytest.mark.parametrize("training", [True, False])
def test_by_torch_no_gradient_is_left_where_it_errs(training: bool):
    """Axes of one element, of whose free strides torch 2.13 infers another order than the tensor's."""
    sequences = normal(8, 20, 3)
    for see in (
        lambda x: x.unsqueeze(-1).permute(0, 2, 3, 1),
        lambda x: x.unsqueeze(-1).permute(0, 2, 1, 3),
        lambda x: x[:1].unsqueeze(-1).permute(0, 2, 3, 1),
    ):
        found = []
        for layer, x in (
            (bn.BatchNorm2d(3), sequences.clone()),
            (nn.BatchNorm2d(3).double(), sequences.double()),
        ):
            image = (
                see(x.requires_grad_()) if layer.weight.dtype == torch.float32 else see(x.requires_grad_()).contiguous()
            )
            y = layer.train(training)(image).flatten(1)
            (y * torch.arange(60.0, dtype=y.dtype).sin()).square().sum().backward()
            found.append([x.grad, *(p.grad for p in layer.parameters())])
        torch.testing.assert_close(found[0], [t.float() for t in found[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_by_torch")
def test_by_torch_a_layer_may_train_between_forward_and_backward():
    layer, x = bn.BatchNorm1d(3), normal(6, 3).requires_grad_()
    layer.running_var.fill_(4.0)
    y = layer.eval()(x)
    layer.train()(normal(6, 3, seed=1))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((6, 3), 0.5), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("_by_torch")
def test_by_torch_what_is_not_plain_is_ours():
    layer, x = bn.BatchNorm1d(3), normal(6, 3).requires_grad_()
    assert layer(x).grad_fn.name().startswith("NativeBatchNorm")
    for mode in (Watching(), Overriding(), bn.recompute_outputs()):
        with mode:
            assert not layer(x).grad_fn.name().startswith("NativeBatchNorm")
    for special in (bn.BatchNorm1d(3, nonfinite="skip"), bn.BatchNorm1d(3, ghost_size=2)):
        assert not special(x).grad_fn.name().startswith("NativeBatchNorm")
    assert "NativeBatchNorm" not in layer(x.as_subclass(Sub)).grad_fn.name()


@pytest.mark.usefixtures("_by_torch")
def test_by_torch_the_errors_are_ours():
    test_errors_and_detours_are_those_of_python()


def test_only_small_calls_go_by_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "call", None)
    monkeypatch.setattr(cpu, "torch_below", 20)
    layer = bn.BatchNorm1d(3)
    assert layer(normal(6, 3).requires_grad_()).grad_fn.name().startswith("NativeBatchNorm")
    assert not layer(normal(7, 3).requires_grad_()).grad_fn.name().startswith("NativeBatchNorm")
