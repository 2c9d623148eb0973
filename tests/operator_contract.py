"""What every differentiable operator of this package owes its callers, as tests to inherit.

A test class derives from `OperatorContract`, supplies `function`, `oracle`, `peer` and `samples`,
and inherits tests of values, gradients, higher derivatives, functional transforms, compilers,
export and layouts. The oracle is the formula in torch's elementwise operators: it is differentiated
by rules that are not ours, as often as need be, in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Tensor]


def assert_within_budget(
    ours: Tensor,
    oracle: Tensor,
    peer: Tensor,
    *,
    channel_dim: int = 1,
    terms: Tensor | None = None,
    name: str = "result",
) -> None:
    """Assert that our error is at most the peer's plus one rounding, channel by channel.

    One rounding is half a unit in the last place of the channel's largest true value, or of the
    largest of the terms that it is the sum of.

    Args:
        ours: What is judged, in its own dtype.
        oracle: The truth for the same inputs, float64.
        peer: torch's result, of the dtype and shape that ours must have.
        channel_dim: The dimension along which errors are not pooled; a vector is all channels.
        terms: Values of the same shape that round before they cancel; None: nothing cancels.
        name: What to call the tensor in the message.
    """
    assert ours.dtype == peer.dtype, f"{name}: {ours.dtype}, where torch gives {peer.dtype}"
    assert ours.shape == peer.shape == oracle.shape, f"{name}: {ours.shape}, not {peer.shape}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}"
    if ours.numel() == 0:
        return
    half_ulp = torch.finfo(ours.dtype).eps / 2
    smallest = torch.finfo(ours.dtype).smallest_normal * half_ulp  # half the least subnormal step
    channels = -1 if ours.dim() < 2 else channel_dim
    terms = oracle if terms is None else torch.maximum(terms.abs(), oracle.abs())
    ours, oracle, peer, terms = (
        t.detach().double().reshape(-1, 1) if t.dim() < 2 else t.detach().double().movedim(channels, 0)
        for t in (ours, oracle, peer, terms)
    )
    finite = oracle.isfinite()
    torch.testing.assert_close(
        ours[~finite], oracle[~finite], equal_nan=True, msg=f"{name}: not the truth's NaN and inf"
    )

    def worst(values: Tensor) -> Tensor:
        size = values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        return torch.where(finite, size, 0.0).flatten(1).amax(1)

    error, peers = worst(ours - oracle), worst(peer - oracle)
    rounding = half_ulp * worst(terms) + smallest
    over = error > peers + rounding
    assert not over.any(), (
        f"{name}: channels {over.nonzero().flatten().tolist()[:8]} are off by "
        f"{error[over].tolist()[:8]}, torch by {peers[over].tolist()[:8]}, one rounding is "
        f"{rounding[over].tolist()[:8]}"
    )


def plain_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ioffe & Szegedy (2015), Algorithm 1, line by line; running statistics are replaced in place.

    Normalizes by the biased variance (1/m) and keeps the unbiased one (1/(m-1)).
    """
    if x.numel() == 0:
        return x * (1 if weight is None else weight[0]) + (0 if bias is None else bias[0])
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    if training:
        m = x.numel() // x.shape[1]
        mean = x.sum(dims) / m
        centered = x - mean.view(shape)
        var = (centered * centered).sum(dims) / m
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach().to(running_mean), momentum)
            running_var.lerp_((var.detach() * m / (m - 1)).to(running_var), momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
        centered = x - mean.view(shape)
    y = centered / (var + eps).sqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y


def batch_norm_terms(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sums of absolute terms of y and of dx (the compact form); mean None: the batch's."""
    if x.numel() == 0:
        return x, x
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    batch = mean is None or var is None
    if batch:
        mean, var = x.mean(dims), x.var(dims, correction=0)
    inv_std = (var.view(shape) + eps).rsqrt()
    xhat = (x - mean.view(shape)) * inv_std
    gamma = torch.ones_like(inv_std) if weight is None else weight.view(shape)
    y = (gamma * xhat).abs()
    if bias is not None:
        y = y + bias.view(shape).abs()
    dx = dy.abs()
    if batch:
        dx = dx + dy.mean(dims, keepdim=True).abs()
        dx = dx + (xhat * (dy * xhat).mean(dims, keepdim=True)).abs()
    return y, dx * (gamma * inv_std).abs()


@dataclass(frozen=True)
class Sample:
    """Inputs of one call: what is differentiated (float64), and what is not."""

    name: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Fresh leaves of `dtype`, contiguous, that require gradients."""
        return [t.detach().to(dtype, copy=True).requires_grad_() for t in self.tensors]

    def __str__(self) -> str:
        return self.name


def random_like(t: Tensor, seed: int = 1) -> Tensor:
    """Normal numbers of the same kind, the same on every call: an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)


def third_derivatives(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a random cubic form of the output, along two random directions."""
    y = function(*leaves)
    scalar = (y**3 * random_like(y)).sum()
    for order in (2, 3):
        grads = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        scalar = torch.stack([(g * random_like(g, order)).sum() for g in grads]).sum()
    return list(torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True))


class OperatorContract:
    """Derive, supply the four below, and every test of this class runs on every sample."""

    def function(self, *tensors: Tensor, **options: Any) -> Tensor:
        """The operator under test: differentiable in each of `tensors`."""
        raise NotImplementedError

    def oracle(self, *tensors: Tensor, **options: Any) -> Tensor:
        """The formula, in elementwise operators and sums."""
        raise NotImplementedError

    def peer(self, *tensors: Tensor, **options: Any) -> Tensor:
        """What torch itself offers, whose error is the bar."""
        raise NotImplementedError

    def samples(self) -> list[Sample]:
        """Small float64 samples, one for each combination of options that takes its own path."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "sample" in metafunc.fixturenames:
            metafunc.parametrize("sample", self.samples(), ids=str)

    def terms(self, upstream: Tensor, *tensors: Tensor, **options: Any) -> Sequence[Tensor | None]:
        """What rounds before it cancels, of the value and of each gradient; float64."""
        return [None] * (1 + len(tensors))

    def bound(self, sample: Sample, which: str = "function", dtype: torch.dtype = torch.float64) -> Function:
        """`function`, or the oracle or peer, with the options of `sample`, tensors as `dtype`."""
        function = getattr(self, which)

        def call(*tensors: Tensor) -> Tensor:
            options = {
                key: value.to(dtype, copy=True) if isinstance(value, Tensor) else value
                for key, value in sample.options.items()
            }
            return function(*tensors, **options)

        return call

    def value_and_grads(self, function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, random_like(y))]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_value_and_gradients_within_budget(self, sample: Sample, dtype: torch.dtype) -> None:
        leaves = sample.leaves(dtype)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        upstream = random_like(leaves[0])
        results = []
        for which, inputs in (("function", leaves), ("oracle", wide), ("peer", leaves)):
            y = self.bound(sample, which, dtype)(*inputs)
            results.append([y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))])
        names = ["value", *(f"gradient of input {i}" for i in range(len(leaves)))]
        terms = self.terms(upstream.double(), *(t.detach() for t in wide), **sample.options)
        for name, ours, oracle, peer, before in zip(names, *results, terms, strict=True):
            assert_within_budget(ours, oracle, peer, terms=before, name=name)

    def test_gradcheck(self, sample: Sample) -> None:
        torch.autograd.gradcheck(
            self.bound(sample), sample.leaves(), check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True,
        )  # fmt: skip

    def test_gradgradcheck(self, sample: Sample) -> None:
        torch.autograd.gradgradcheck(
            self.bound(sample), sample.leaves(), check_fwd_over_rev=True, check_batched_grad=True,
            gen_non_contig_grad_outputs=True,
        )  # fmt: skip

    def test_third_derivative(self, sample: Sample) -> None:
        ours = third_derivatives(self.bound(sample), sample.leaves())
        truth = third_derivatives(self.bound(sample, "oracle"), sample.leaves())
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)

    def test_gradients_of_each_input_alone(self, sample: Sample) -> None:
        """What is not asked for changes nothing of what is."""
        function = self.bound(sample)
        together = self.value_and_grads(function, sample.leaves())
        for i in range(len(sample.tensors)):
            inputs = [t.detach() for t in sample.leaves()]
            inputs[i].requires_grad_()
            y = function(*inputs)
            (alone,) = torch.autograd.grad(y, [inputs[i]], random_like(y))
            torch.testing.assert_close(alone, together[1 + i], rtol=0, atol=0)

    def test_forward_mode(self, sample: Sample) -> None:
        primals = [t.detach() for t in sample.tensors]
        tangents = [random_like(t) for t in primals]
        truth = torch.func.jvp(self.bound(sample, "oracle"), tuple(primals), tuple(tangents))
        torch.testing.assert_close(torch.func.jvp(self.bound(sample), tuple(primals), tuple(tangents)), truth)
        with forward_ad.dual_level():
            y = self.bound(sample)(*map(forward_ad.make_dual, primals, tangents))
            torch.testing.assert_close(tuple(forward_ad.unpack_dual(y)), truth)

    def test_jacobians_and_hessian(self, sample: Sample) -> None:
        primals = tuple(t.detach() for t in sample.tensors)
        wrt = tuple(range(len(primals)))
        ours, truth = self.bound(sample), self.bound(sample, "oracle")
        jacobian = torch.func.jacrev(truth, wrt)(*primals)
        torch.testing.assert_close(torch.func.jacrev(ours, wrt)(*primals), jacobian)
        torch.testing.assert_close(torch.func.jacfwd(ours, wrt)(*primals), jacobian)

        def scalar(function: Function) -> Function:
            return lambda *tensors: (function(*tensors) ** 3).sum()

        torch.testing.assert_close(
            torch.func.hessian(scalar(ours), wrt)(*primals),
            torch.func.hessian(scalar(truth), wrt)(*primals),
        )

    def test_vmap_is_a_loop(self, sample: Sample) -> None:
        """Over every non-empty choice of inputs, along the first axis and the last, and nested."""
        function, count = self.bound(sample), len(sample.tensors)
        for mapped in itertools.product([True, False], repeat=count):
            if not any(mapped):
                continue
            for axis in (0, -1):
                stacked = [
                    torch.stack([t + 0.1 * k * random_like(t, k + 2) for k in range(3)], axis) if is_mapped else t
                    for t, is_mapped in zip(sample.tensors, mapped, strict=True)
                ]
                in_dims = tuple(axis if is_mapped else None for is_mapped in mapped)
                loop = [
                    function(*(
                        t.select(axis, k) if is_mapped else t
                        for t, is_mapped in zip(stacked, mapped, strict=True)
                    ))
                    for k in range(3)
                ]  # fmt: skip
                result = torch.vmap(function, in_dims)(*stacked)
                torch.testing.assert_close(result, torch.stack(loop))
        twice = [torch.stack([torch.stack([t, 2 * t])] * 3) for t in sample.tensors]
        nested = torch.vmap(torch.vmap(function))(*twice)
        torch.testing.assert_close(nested[2, 1], function(*(2 * t for t in sample.tensors)))

    def test_vmap_of_grad_is_a_loop(self, sample: Sample) -> None:
        function = self.bound(sample)

        def scalar(*tensors: Tensor) -> Tensor:
            return (function(*tensors) ** 3).sum()

        wrt = tuple(range(len(sample.tensors)))
        stacked = [torch.stack([t, t + random_like(t)]) for t in sample.tensors]
        mapped = torch.vmap(torch.func.grad(scalar, wrt))(*stacked)
        for k in range(2):
            one = torch.func.grad(scalar, wrt)(*(t[k] for t in stacked))
            torch.testing.assert_close(tuple(g[k] for g in mapped), one)

    def test_layouts_give_one_answer(self, sample: Sample) -> None:
        """Strided, reversed and channels-last inputs and upstream gradients are only views."""
        function = self.bound(sample)
        expected = self.value_and_grads(function, sample.leaves())
        for layout in LAYOUTS:
            leaves = [layout(t.detach()).requires_grad_() for t in sample.tensors]
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, layout(random_like(y)))
            torch.testing.assert_close([y, *grads], expected)

    def test_expanded_gradient(self, sample: Sample) -> None:
        """The gradient of a sum arrives as one number with zero strides."""
        leaves = sample.leaves()
        y = self.bound(sample)(*leaves)
        ours = torch.autograd.grad(y, leaves, torch.full((), 1.5, dtype=y.dtype).expand_as(y))
        y = self.bound(sample, "oracle")(*leaves)
        truth = torch.autograd.grad(y, leaves, torch.full_like(y, 1.5))
        torch.testing.assert_close(ours, truth)

    def test_same_bits_for_any_number_of_threads(self, sample: Sample) -> None:
        function, runs = self.bound(sample, dtype=torch.float32), []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(self.value_and_grads(function, sample.leaves(torch.float32)))
        for run in runs[1:]:
            torch.testing.assert_close(run, runs[0], rtol=0, atol=0)

    def test_compiles_whole(self, sample: Sample) -> None:
        function = self.bound(sample)
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            self.value_and_grads(compiled, sample.leaves()),
            self.value_and_grads(function, sample.leaves()),
        )

    def test_exports(self, sample: Sample) -> None:
        function = self.bound(sample)

        class Wrapped(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return function(*tensors)

        inputs = tuple(t.detach() for t in sample.tensors)
        program = torch.export.export(Wrapped(), inputs)
        torch.testing.assert_close(program.module()(*inputs), function(*inputs))

    def test_checkpointed(self, sample: Sample) -> None:
        """Recomputation in the backward pass gives the same gradients."""
        function = self.bound(sample)

        def recomputed(*tensors: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)

        torch.testing.assert_close(
            self.value_and_grads(recomputed, sample.leaves()),
            self.value_and_grads(function, sample.leaves()),
            rtol=0,
            atol=0,
        )

    def test_autocast_follows_torch(self, sample: Sample) -> None:
        """Parameters and statistics stay float32; the input comes in either dtype."""
        leaves = sample.leaves(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            for inputs in (leaves, [leaves[0].to(dtype), *leaves[1:]]):
                with torch.autocast("cpu", dtype):
                    ours = self.bound(sample, "function", torch.float32)(*inputs)
                    peer = self.bound(sample, "peer", torch.float32)(*inputs)
                wide = [t.detach().double() for t in inputs]
                truth = self.bound(sample, "oracle", torch.float32)(*wide)
                terms = self.terms(truth, *wide, **sample.options)
                assert_within_budget(ours, truth, peer, terms=terms[0])


def strided(t: Tensor) -> Tensor:
    """Every other element of a tensor whose other half is NaN."""
    return torch.stack([torch.full_like(t, torch.nan), t], -1)[..., 1]


def reversed_dims(t: Tensor) -> Tensor:
    """Stored with the last dimension slowest."""
    order = range(t.dim() - 1, -1, -1)
    return t.permute(*order).contiguous().permute(*order)


def channels_last(t: Tensor) -> Tensor:
    """Stored with the channels fastest."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, one element after an aligned address."""
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)


LAYOUTS = [torch.Tensor.contiguous, strided, reversed_dims, channels_last, misaligned]
