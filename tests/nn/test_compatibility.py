"""PyTorch's own sample inputs of its batch norm layers and function, ours beside torch's.

Outputs, gradients of every input and parameter, and buffers afterwards are held to the error budget
against the formula in float64. The harness is itself tested: torch's layers pass it, and layers
with one fault each do not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import functional
from batchnorm.errors import BatchNormError
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from operator_contract import LAYOUTS, assert_within_budget, batch_norm_terms, plain_batch_norm, random_like

with warnings.catch_warnings():  # what PyTorch's test modules warn about while they load
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

# One of PyTorch's samples has a momentum that looks like TensorFlow's; our layers say so once.
pytestmark = pytest.mark.filterwarnings("ignore:momentum=")

OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
MODULES = {info.module_cls: info for info in module_db if info.module_cls in OURS}
FUNCTION = next(info for info in op_db if info.name == "nn.functional.batch_norm")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Dtypes of the input, and of the parameters and buffers.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def short(value: Any) -> str:
    """A test id: 'bfloat16' of torch.bfloat16, 'BatchNorm2d' of the class."""
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One of PyTorch's samples: how to construct the layer, and what to call it on."""

    base: type[nn.Module]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor

    def __str__(self) -> str:
        return f"{self.base.__name__}-{self.name}"


def module_cases() -> Iterator[Case]:
    for base, info in MODULES.items():
        torch.manual_seed(0)
        samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
        for sample in samples:
            made, (x,) = sample.constructor_input, sample.forward_input.args
            yield Case(base, sample.desc or "default", made.args, made.kwargs, x)


def torch_layer(case: Case, dtype: torch.dtype, training: bool) -> nn.Module:
    """torch's layer of the case, with random parameters and statistics, three batches counted."""
    layer = case.base(*case.args, **case.kwargs).to(dtype).train(training)
    for i, (name, tensor) in enumerate(layer.state_dict().items()):
        values = random_like(tensor, i) if tensor.is_floating_point() else torch.tensor(3)
        tensor.copy_(values.exp() if name == "running_var" else values)
    return layer


def observe(layer: Callable[[Tensor], Tensor], state: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step under the upstream gradient dy."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    parameters = dict(state.named_parameters())
    grads = torch.autograd.grad(y, [leaf, *parameters.values()], dy.to(y.dtype))
    seen = {"output": y, "gradient of input": grads[0]}
    seen |= {f"gradient of {k}": g for k, g in zip(parameters, grads[1:], strict=True)}
    return seen | {k: v.clone() for k, v in state.named_buffers()}


class Oracle(nn.Module):
    """The formula, with the settings and the widened state of a torch layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = deepcopy(layer).double()

    def forward(self, x: Tensor) -> Tensor:
        layer, momentum = self.layer, self.layer.momentum
        if layer.training and layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
            momentum = 1 / layer.num_batches_tracked.item() if momentum is None else momentum
        training = layer.training or layer.running_mean is None
        return plain_batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training,
            momentum or 0.0, layer.eps,
        )  # fmt: skip

    @torch.no_grad()
    def terms(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """What rounds before it cancels, of the step that comes next."""
        layer = self.layer
        batch = layer.training or layer.running_mean is None
        mean, var = (None, None) if batch else (layer.running_mean, layer.running_var)
        y, dx = batch_norm_terms(x, dy, layer.weight, layer.bias, mean, var, layer.eps)
        found = {"output": y, "gradient of input": dx}
        if layer.training and layer.running_mean is not None and x.numel():
            dims = [d for d in range(x.dim()) if d != 1]
            found["running_mean"] = torch.maximum(layer.running_mean.abs(), x.mean(dims).abs())
            found["running_var"] = torch.maximum(layer.running_var, x.var(dims))
        return found


def compare(
    ours: dict[str, Tensor],
    truth: dict[str, Tensor],
    torchs: dict[str, Tensor],
    terms: dict[str, Tensor],
) -> None:
    """Hold what was seen of ours to the budget; `terms` are what rounds before it cancels."""
    assert ours.keys() == torchs.keys()
    for name, peer in torchs.items():
        if not peer.is_floating_point():
            assert torch.equal(ours[name], peer), f"{name}: {ours[name]}, torch has {peer}"
        elif peer.dtype == torch.float64:  # no wider truth: the last few bits are anyone's
            torch.testing.assert_close(ours[name], peer, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_within_budget(ours[name], truth[name], peer, terms=terms.get(name), name=name)


def assert_memory_format(ours: Tensor, peer: Tensor, x: Tensor) -> None:
    """Ours is laid out as torch's output; an order that torch has no name for may be kept."""
    if not x.numel() or ours.stride() == peer.stride():
        return
    named = x.dim() > 3 and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
    kept = ours.stride() == x.stride() and not x.is_contiguous() and not named
    assert kept, f"output: strides {ours.stride()}, torch has {peer.stride()}"


def check_case(candidate: type[nn.Module], case: Case, dtypes: tuple[torch.dtype, torch.dtype], training: bool) -> None:
    """Hold `candidate` to torch's layer on one sample, in every layout."""
    for layout in LAYOUTS:
        x = layout(case.x.to(dtypes[0]))
        dy = random_like(x, 7)
        theirs = torch_layer(case, dtypes[1], training)
        ours = candidate(*case.args, **{**case.kwargs, "dtype": dtypes[1]}).train(training)
        ours.load_state_dict(theirs.state_dict())
        oracle = Oracle(theirs)
        terms = oracle.terms(x.double(), dy.double())
        truth = observe(oracle, oracle.layer, x.double(), dy)
        seen, peer = observe(ours, ours, x, dy), observe(theirs, theirs, x, dy)
        compare(seen, truth, peer, terms)
        assert_memory_format(seen["output"], peer["output"], x)
        assert repr(ours) == repr(theirs)
        eager = ours.eval()(x)
        with torch.inference_mode():
            assert torch.equal(ours(x), eager)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(short, pair)))
@pytest.mark.parametrize("case", list(module_cases()), ids=str)
def test_layers_on_pytorch_samples(case, dtypes, training):
    check_case(OURS[case.base], case, dtypes, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", list(module_cases()), ids=str)
def test_the_harness_accepts_torch(case, training):
    check_case(case.base, case, DTYPES[2], training)


class Faulty(nn.BatchNorm2d):
    """torch's layer, of a case that has everything, with one fault."""

    fault: str

    def forward(self, x: Tensor) -> Tensor:
        before = self.running_var.clone()
        y = super().forward(x)
        m = x.numel() // x.shape[1]
        if self.fault == "gradient without gamma":
            missing = (y - y.detach()) * (1 - 1 / self.weight.detach()[:, None, None])
            y = y - (missing - missing.detach())
        elif self.fault == "detached variance":
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
            xhat = (x - mean) / (var.detach() + self.eps).sqrt()
            wrong = xhat * self.weight[:, None, None] + self.bias[:, None, None]
            y = y.detach() + (wrong - wrong.detach())
        elif self.fault == "four roundings":
            y = y * (1 + 2 * torch.finfo(y.dtype).eps)
        elif self.fault == "one memory format":
            y = y.contiguous()
        elif self.fault == "uncounted batch":
            self.num_batches_tracked = self.num_batches_tracked - 1
        elif self.fault == "biased running variance":
            new = self.running_var - (1 - self.momentum) * before
            self.running_var = self.running_var - new / m
        return y


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("gradient without gamma", "gradient of input: channels"),
        ("detached variance", "gradient of input: channels"),
        ("four roundings", "output: channels"),
        ("one memory format", "output: strides"),
        ("uncounted batch", "num_batches_tracked"),
        ("biased running variance", "running_var: channels"),
    ],
)
def test_the_harness_refuses_faults(fault: str, shown: str):
    faulty = type("BatchNorm2d", (Faulty,), {"fault": fault})
    case = next(case for case in module_cases() if case.base is nn.BatchNorm2d)
    with pytest.raises(AssertionError, match=shown):
        check_case(faulty, case, DTYPES[0], training=True)


def function_samples(dtype: torch.dtype) -> list[Any]:
    """PyTorch's samples, reference inputs included, and each of weight and bias alone."""
    torch.manual_seed(0)
    samples = list(FUNCTION.sample_inputs("cpu", dtype))
    samples += list(FUNCTION.reference_inputs("cpu", dtype))
    for given in ("weight", "bias"):
        sample = deepcopy(samples[0])
        mean, var, weight, bias = sample.args
        alone = (weight, None) if given == "weight" else (None, bias)
        sample.args = (mean, var, *alone)
        samples.append(sample)
    return samples


def function_terms(sample: Any, upstream: Tensor) -> dict[str, Tensor]:
    """What rounds before it cancels, of the output and of the gradient of the input."""
    mean, var, weight, bias = (t if t is None else t.detach().double() for t in sample.args)
    if sample.kwargs.get("training"):
        mean = var = None
    eps = sample.kwargs.get("eps", 1e-5)
    x, dy = sample.input.detach().double(), upstream.double()
    return dict(zip(["output", "0"], batch_norm_terms(x, dy, weight, bias, mean, var, eps), strict=True))


def check_function(candidate: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Hold `candidate` to F.batch_norm on every sample, in every layout."""
    for i, sample in enumerate(function_samples(dtype)):
        for layout in LAYOUTS:
            seen, upstream = [], random_like(sample.input, i)
            for function in (candidate, plain_batch_norm, F.batch_norm):
                target = torch.float64 if function is plain_batch_norm else dtype
                x = layout(sample.input.to(target, copy=True)).requires_grad_()
                given = [None if t is None else t.to(target, copy=True) for t in sample.args]
                leaves = [x, *(t.requires_grad_() for t in given[2:] if t is not None)]
                y = function(x, *given, **sample.kwargs)
                grads = torch.autograd.grad(y, leaves, upstream.to(target))
                buffers = [t for t in given[:2] if t is not None]
                seen.append({"output": y} | {str(k): t for k, t in enumerate([*grads, *buffers])})
            try:
                compare(*seen, function_terms(sample, upstream))
            except AssertionError as error:
                raise AssertionError(
                    f"sample {i} {tuple(sample.input.shape)} {sample.kwargs}, {layout.__name__}: {error}"
                ) from error


@pytest.mark.parametrize("dtype", sorted(FUNCTION.dtypes, key=str), ids=short)
def test_function_on_pytorch_samples(dtype: torch.dtype):
    check_function(functional.batch_norm, dtype)


def test_the_harness_tells_functions_apart():
    check_function(F.batch_norm, torch.float32)

    def wrong(*args: Any, eps: float = 1e-5, **kwargs: Any) -> Tensor:
        return F.batch_norm(*args, eps=eps * 1.5, **kwargs)

    with pytest.raises(AssertionError, match="sample"):
        check_function(wrong, torch.float32)


def error_inputs() -> Iterator[Any]:
    for base, info in MODULES.items():
        for training in (True, False):
            found = info.module_error_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
            )
            for i, sample in enumerate(found):
                yield pytest.param(base, sample, training, id=f"{base.__name__}-{training}-{i}")


@pytest.mark.parametrize(("base", "sample", "training"), list(error_inputs()))
def test_pytorch_error_inputs(base, sample, training):
    made, call = (
        sample.module_error_input.constructor_input,
        sample.module_error_input.forward_input,
    )
    assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
    outcomes = []
    for kind in (base, OURS[base]):
        layer = kind(*made.args, **made.kwargs).train(training)
        try:
            outcomes.append(layer(*call.args, **call.kwargs))
        except Exception as error:
            outcomes.append(error)
    theirs, ours = outcomes
    if isinstance(theirs, Tensor):  # eps = 0 is an error in training alone
        torch.testing.assert_close(ours, theirs)
    elif not training and made.kwargs.get("eps") == 0:  # torch 2.10 refuses it there, too
        assert isinstance(ours, Tensor)
    else:
        assert isinstance(ours, (sample.error_type, type(theirs)))
        assert isinstance(ours, BatchNormError)
        if training:
            assert re.search(sample.error_regex, str(ours))


def images(*shape: int) -> Tensor:
    return torch.ones(shape)


# What torch says of a wrong input, and the part of it that callers can hold on to.
ONE = r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3"
LAYER_ERRORS = {
    "1d-1": (nn.BatchNorm1d, images(3), r"expected 2D or 3D input \(got 1D input\)"),
    "1d-4": (nn.BatchNorm1d, images(2, 3, 4, 4), r"expected 2D or 3D input \(got 4D input\)"),
    "2d-3": (nn.BatchNorm2d, images(2, 3, 4), r"expected 4D input \(got 3D input\)"),
    "2d-5": (nn.BatchNorm2d, images(2, 3, 4, 4, 4), r"expected 4D input \(got 5D input\)"),
    "3d-4": (nn.BatchNorm3d, images(2, 3, 4, 4), r"expected 5D input \(got 4D input\)"),
    "channels": (
        nn.BatchNorm2d,
        images(2, 5, 4, 4),
        "running_mean should contain 5 elements not 3",
    ),
    "one value": (nn.BatchNorm1d, images(1, 3), ONE),
    "one pixel": (nn.BatchNorm2d, images(1, 3, 1, 1), ONE),
    "integers": (nn.BatchNorm2d, images(2, 3, 4, 4).long(), "not implemented for 'Long'"),
    "booleans": (nn.BatchNorm2d, images(2, 3, 4, 4).bool(), "not implemented for 'Bool'"),
    "complex": (nn.BatchNorm2d, images(2, 3, 4, 4).cfloat(), "not implemented for 'ComplexFloat'"),
}


def raised(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def check_error(ours: Callable[[], Any], theirs: Callable[[], Any], pattern: str) -> None:
    """Ours is also the built-in error that torch raises, and says what torch says."""
    expected, error = raised(theirs), raised(ours)
    assert re.search(pattern, str(expected)), f"torch now says: {expected}"
    assert isinstance(error, type(expected)), f"{type(error).__mro__}, not {type(expected)}"
    assert isinstance(error, BatchNormError)
    assert re.search(pattern, str(error)), f"ours says: {error}"


@pytest.mark.parametrize("name", LAYER_ERRORS)
def test_errors_of_layers(name: str):
    base, x, pattern = LAYER_ERRORS[name]
    layer = OURS[base](3)
    before = deepcopy(layer.state_dict())
    check_error(lambda: layer(x), lambda: base(3)(x), pattern)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


MEAN, VAR = torch.zeros(3), torch.ones(3)
TRAIN = {"training": True}
FUNCTION_ERRORS = {
    "no statistics": ((None, None), {}, "running_mean must be defined in evaluation mode"),
    "no variance": ((MEAN, None), {}, "running_var must be defined in evaluation mode"),
    "no mean": ((None, VAR), {}, "running_mean must be defined in evaluation mode"),
    "half": ((MEAN, None), TRAIN, "running_mean and running_var must either both be None"),
    "weight": ((MEAN, VAR, torch.ones(4)), {}, "weight should contain 3 elements not 4"),
    "bias": ((MEAN, VAR, None, torch.ones(4)), {}, "bias should contain 3 elements not 4"),
    "mean": ((torch.zeros(4), VAR), {}, "running_mean should contain 3 elements not 4"),
    "variance": ((MEAN, torch.ones(4)), {}, "running_var should contain 3 elements not 4"),
    "zero eps": ((MEAN, VAR), {**TRAIN, "eps": 0.0}, "eps must be positive( during training)?"),
    "negative eps": ((MEAN, VAR), {"eps": -1.0}, "eps must be (non-negative|positive)"),
}


@pytest.mark.parametrize("name", FUNCTION_ERRORS)
def test_errors_of_the_function(name: str):
    args, kwargs, pattern = FUNCTION_ERRORS[name]
    x = torch.randn(4, 3)
    check_error(
        lambda: functional.batch_norm(x, *args, **kwargs),
        lambda: F.batch_norm(x, *args, **kwargs),
        pattern,
    )


@pytest.mark.parametrize("option", ["eps", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_settings_that_are_not_finite_are_refused(option: str, value: float):
    """torch takes these and fills the running statistics with NaN."""
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(BatchNormError, match=option):
        functional.batch_norm(x, mean, var, training=True, **{option: value})
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    with pytest.raises(BatchNormError, match=option):
        BatchNorm1d(3, **{option: value})(x)
