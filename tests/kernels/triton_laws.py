"""What the Triton kernels owe: inherited by the tests on CUDA, and run on the CPU by Triton's interpreter.

`test_triton.py` starts this file in a process of its own with TRITON_INTERPRET=1, since Triton decides at its import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm.kernels import aten, cpu
from batchnorm.moments import merge_axis
from batchnorm.ops import cuda, registration, schemas
from batchnorm.pools import Pool, Pools, merge_moments
from operator_contract import assert_within_budget, batch_norm_terms

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5
SLOPE = 0.1

if INTERPRETING:
    # numpy 2.4 turns no array into a scalar unasked (triton-lang/triton#9171, mended after Triton 3.6).
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


# What the heuristic would choose for large tensors, on small ones: multiprocessors and knobs.
SCHEMES: dict[str, tuple[int, dict[str, int]]] = {
    "single": (132, {}),
    "whole": (1, {"tile": 256, "single": 0, "waves": 1}),
    "split": (12, {"tile": 256, "single": 0, "whole": 0, "waves": 1, "merged": 1 << 20, "run": 2}),
    "merged": (12, {"tile": 256, "single": 0, "whole": 0, "waves": 1, "merged": 0, "run": 2}),
}


def force(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Makes the heuristic choose this scheme where there is more than one tile."""
    from batchnorm.kernels import triton, triton_table

    processors, knobs = SCHEMES[scheme]
    monkeypatch.setattr(triton, "_device", lambda device: (processors, "test"))
    monkeypatch.setattr(triton_table, "lookup", lambda *key: triton_table.Knobs(**knobs))
    triton._plan.cache_clear()


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding; the interpreter cuts bfloat16 off instead of rounding it."""
    return torch.finfo(dtype).eps / (1 if INTERPRETING and dtype is torch.bfloat16 else 2)


def assert_rounded(ours: Tensor, truth: Tensor, terms: Tensor, roundings: float, name: str) -> None:
    """Off by at most so many roundings (of float32, and one of the result) of the channel's largest terms."""
    dims = [d for d in range(truth.dim()) if d != 1] if truth.dim() > 1 else []
    size = terms.abs().amax(dims, keepdim=True) if dims else terms.abs()
    allowed = size * (roundings * 2.0**-24 + rounding(ours.dtype)) + 1e-7
    error = (ours.double() - truth).abs()
    assert ours.shape == truth.shape, name
    assert bool((error <= allowed).all()), f"{name}: off by {(error / allowed).max().item():.2f} of what is allowed"


class TritonLaws:
    """Supply `device`; the truth is ATen in float64 on the same rounded inputs."""

    device = "cpu"

    @pytest.fixture(autouse=True)
    def _fresh_tilings(self) -> Iterator[None]:
        from batchnorm.kernels import triton

        yield
        triton._plan.cache_clear()

    @property
    def kernels(self) -> Any:
        from batchnorm.kernels import triton

        return triton

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
        t = torch.randn(shape).to(dtype).to(self.device)
        return t.to(memory_format=torch.channels_last) if last else t

    def signs(self, x: Tensor) -> Tensor:
        return torch.empty(schemas.signs_size(x), dtype=torch.uint8, device=self.device)

    def check(
        self, x: Tensor, dy: Tensor, residual: Tensor | None, activation: str, pool_size: int, with_signs: bool,
        population: bool = False,
    ) -> None:  # fmt: skip
        """Forward, backward and statistics of one input against the truth."""
        channels = x.shape[1]
        weight, bias = self.randn(channels) + 0.5, self.randn(channels)
        settings = (pool_size, EPS, activation, SLOPE)
        signs = self.signs(x) if with_signs else None
        wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
        if population:
            mean, var = self.randn(channels).double(), self.randn(channels).double().square() + 0.5
            y = self.kernels.normalize(x, mean, var, weight, bias, residual, *settings, signs)
            true_y = aten.normalize(wide[0], mean, var, *wide[1:], *settings)
        else:
            y, mean, var = self.kernels.forward(x, weight, bias, residual, *settings, signs)
            true_y, true_mean, true_var = aten.forward(*wide, *settings)
            scale = x.double().abs().max()
            assert mean.dtype == var.dtype == torch.float64
            torch.testing.assert_close(mean, true_mean, rtol=1e-7, atol=float(scale) * 1e-7)
            torch.testing.assert_close(var, true_var, rtol=2e-6, atol=1e-9)
        z = aten.normalize(wide[0], mean, var, *wide[1:], pool_size, EPS, "identity", 0.0)
        kink = (z.abs() < 1e-5) | ((z - 6).abs() < 1e-5)
        if activation in schemas.PIECEWISE_LINEAR and kink.any():  # either side is right
            dy = dy.masked_fill(kink, 0.0)
        own = (mean, var) if population else (None, None)
        y_terms, dx_terms = batch_norm_terms(wide[0], dy.double(), weight.double(), bias.double(), *own, EPS)
        if residual is not None:
            y_terms = y_terms + residual.double().abs()
        assert_rounded(y, true_y, y_terms + 1, 24, "y")
        assert y.stride() == schemas.empty_like(x).stride()

        kept = None if with_signs else residual
        got = self.kernels.backward(
            dy, x, weight, bias, kept, signs, mean, var, *settings, population, True, residual is not None
        )
        want = aten.gradients(
            dy.double(), wide[0], wide[1], wide[2], wide[3], mean, var, *settings, population
        )  # fmt: skip
        assert_rounded(got[0], want[0], 2 * dx_terms, 64, "dx")
        assert got[0].stride() == schemas.empty_like(x).stride()
        if residual is not None:
            assert_rounded(got[1], want[1], 2 * dy.double(), 24, "d_residual")
        count = x.numel() / channels
        for name, ours, truth in zip(("d_weight", "d_bias"), got[2:], want[2:], strict=True):
            assert ours.dtype == weight.dtype
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * count, msg=name)

    @pytest.mark.parametrize("last", [False, True], ids=["planar", "interleaved"])
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_every_scheme_agrees_with_the_reference(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, last: bool
    ) -> None:
        """A pool's last rows, a plane's last columns and the last channels are all ragged."""
        force(monkeypatch, scheme)
        x = 3 * self.randn(10, 3, 5, 9, last=last) + 7
        call = self.kernels._Call("forward", x, 0)
        assert call.tiling.scheme == {"merged": "split"}.get(scheme, scheme)
        assert call.tiling.merge_first == (scheme == "merged")
        self.check(x, self.randn(*x.shape, last=last), self.randn(*x.shape, last=last), "relu", 0, with_signs=True)

    @pytest.mark.parametrize("scheme", ["single", "split"])
    def test_ghost_batches_with_a_ragged_tail(self, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
        force(monkeypatch, scheme)
        x = self.randn(7, 2, 5, 9) * torch.arange(1, 8, device=self.device).view(7, 1, 1, 1)
        self.check(x, self.randn(*x.shape), None, "silu", 3, with_signs=False)

    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("activation", schemas.ACTIVATIONS)
    def test_every_activation(self, activation: str, residual: bool) -> None:
        x = 3 * self.randn(6, 5, 4)
        other = 3 * self.randn(6, 5, 4) if residual else None
        self.check(x, self.randn(6, 5, 4), other, activation, 0, with_signs=False)

    @pytest.mark.parametrize("activation", schemas.PIECEWISE_LINEAR)
    @pytest.mark.parametrize("shape", [(5, 3, 7), (9, 13), (4, 8, 2, 4)])
    def test_a_bit_an_element_stands_in_for_the_residual(self, activation: str, shape: tuple[int, ...]) -> None:
        self.check(3 * self.randn(*shape), self.randn(*shape), 3 * self.randn(*shape), activation, 0, with_signs=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("last", [False, True], ids=["planar", "interleaved"])
    def test_narrow_dtypes_round_once(self, dtype: torch.dtype, last: bool) -> None:
        x, dy, residual = (self.randn(6, 12, 5, 4, dtype=dtype, last=last) for _ in range(3))
        self.check(x, dy, residual, "gelu", 0, with_signs=False)

    @pytest.mark.parametrize(
        "shape",
        [(2, 1), (3, 1, 1), (33, 7), (1, 3, 17), (3, 65), (5, 4, 1, 1), (3, 2, 2, 2, 3), (2, 3, 33)],
        ids=str,
    )
    def test_tails(self, shape: tuple[int, ...]) -> None:
        self.check(self.randn(*shape), self.randn(*shape), None, "leaky_relu", 0, with_signs=False)

    @pytest.mark.parametrize("order", ["planar", "interleaved"])
    def test_any_strides(self, order: str) -> None:
        """Sliced, transposed, expanded, misaligned; x, dy and residual each in another way."""
        last = order == "interleaved"
        wide = self.randn(6, 9, 4, 6, last=last)
        x = wide[1:, 2:7]
        dy = self.randn(4, 6, 5, 5).permute(3, 2, 0, 1)
        residual = self.randn(5, 4, 6, 5).permute(0, 3, 1, 2)
        self.check(x, dy, residual, "relu", 0, with_signs=True)
        self.check(x, self.randn(1, 1, 1, 1).expand(5, 5, 4, 6), None, "identity", 2, with_signs=False)
        self.check(wide[:, :3, :, 1:5], self.randn(6, 3, 4, 4), None, "tanh", 0, with_signs=False)

    @pytest.mark.parametrize(("scheme", "last"), [("single", False), ("split", True)])
    def test_population_statistics(self, monkeypatch: pytest.MonkeyPatch, scheme: str, last: bool) -> None:
        force(monkeypatch, scheme)
        x, dy, residual = (self.randn(6, 3, 5, 9, last=last) for _ in range(3))
        self.check(x, dy, residual, "relu6", 0, with_signs=True, population=True)
        self.check(x, dy, None, "hardswish", 4, with_signs=False, population=True)

    def test_a_channel_of_nan_leaves_the_others(self) -> None:
        """Also under the activations that compare, and with constant statistics, whose dx does not hold x."""
        x = self.randn(6, 3, 5)
        x[2, 1, 3] = torch.nan
        y, mean, var = self.kernels.forward(x, None, None, None, 0, EPS, "relu", SLOPE, None)
        assert y[:, 1].isnan().all()
        assert mean[0, 1].isnan()
        assert var[0, 1].isnan()
        assert y[:, [0, 2]].isfinite().all()
        zero, one = torch.zeros(3, device=self.device), torch.ones(3, device=self.device)
        dx, *_ = self.kernels.backward(
            self.randn(6, 3, 5), x, None, None, None, None, zero, one, 0, EPS, "identity", SLOPE, True, True, False
        )
        assert dx.isfinite().all()

    def test_statistics_far_from_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """E[x^2] - E[x]^2 in float32 would be off by several times the variance."""
        force(monkeypatch, "split")
        x = self.randn(16, 2, 60) + 1e4
        true_mean, true_m2 = aten.moments(x.double(), 0)
        mean, m2 = self.kernels.moments(x, 0)
        torch.testing.assert_close(mean, true_mean, rtol=1e-10, atol=0)
        torch.testing.assert_close(m2, true_m2, rtol=1e-5, atol=0)
        y, *_ = self.kernels.forward(x, None, None, None, 0, EPS, "identity", SLOPE, None)
        assert_rounded(y, aten.forward(x.double(), None, None, None, 0, EPS, "identity", 0.0)[0], y.double(), 8, "y")

    @pytest.mark.parametrize(("scheme", "last"), [("single", False), ("split", True)])
    def test_the_four_verbs_make_the_fused_ones(self, monkeypatch: pytest.MonkeyPatch, scheme: str, last: bool) -> None:
        force(monkeypatch, scheme)
        x, dy = (self.randn(5, 3, 4, 10, last=last) for _ in range(2))
        weight, bias = self.randn(3), self.randn(3)
        settings = (2, EPS, "silu", SLOPE)
        count = torch.tensor([80.0, 80.0, 40.0], dtype=torch.float64, device=self.device)[:, None]
        mean, m2 = self.kernels.moments(x, 2)
        y, fused_mean, fused_var = self.kernels.forward(x, weight, bias, None, *settings, None)
        torch.testing.assert_close((mean, m2 / count), (fused_mean, fused_var), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            self.kernels.normalize(x, mean, m2 / count, weight, bias, None, *settings, None), y, rtol=1e-5, atol=1e-5
        )
        saved = (weight, bias, None, None, fused_mean, fused_var)
        sum_dz, sum_dz_centered = self.kernels.backward_reduce(dy, x, *saved, *settings)
        truth = aten.backward_reduce(dy.double(), x.double(), *(t if t is None else t.double() for t in saved[:3]),
                                     fused_mean, fused_var, *settings)  # fmt: skip
        torch.testing.assert_close((sum_dz, sum_dz_centered), truth, rtol=1e-5, atol=1e-4)
        k1 = weight / (fused_var + EPS).sqrt()
        k2, k3 = -k1 / (fused_var + EPS) * sum_dz_centered / count, -k1 * sum_dz / count
        dx, dz = self.kernels.backward_apply(dy, x, *saved, k1, k2, k3, *settings, True)
        fused = self.kernels.backward(dy, x, *saved, *settings, False, True, True)
        torch.testing.assert_close((dx, dz), fused[:2], rtol=1e-4, atol=1e-5)

    def mask_of(self, shape: tuple[int, ...], kind: str) -> Tensor:
        """(N, *space): padded sequences with one that is empty, or holes; the second of two pools has nothing."""
        samples, *space = shape[0], *shape[2:]
        if kind == "holes":
            mask = torch.rand(samples, *space) < 0.6
        else:
            length = space[-1] if space else 1
            lengths = (torch.arange(samples) * 7 + 3) % (length + 1)
            lengths[0] = 0
            mask = (torch.arange(length) < lengths[:, None]).view(samples, *[1] * (len(space) - 1), *space[-1:])
            mask = mask.expand(samples, *space)
        if kind == "empty pool":
            mask = mask & (torch.arange(samples) >= samples // 2).view(-1, *[1] * len(space))
        return mask.to(self.device)

    def check_masked(
        self, x: Tensor, dy: Tensor, residual: Tensor | None, mask: Tensor, activation: str, pool_size: int,
        population: bool = False,
    ) -> None:  # fmt: skip
        """The masked verbs against ATen in float64; what the mask leaves out is NaN."""
        channels, inside = x.shape[1], mask.unsqueeze(1)
        weight, bias = self.randn(channels) + 0.5, self.randn(channels)
        settings = (pool_size, EPS, activation, SLOPE)
        x, dy, residual = (None if t is None else t.masked_fill(~inside, torch.nan) for t in (x, dy, residual))
        wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
        pools = Pools(x, pool_size, mask)
        if population:
            mean, var = self.randn(channels).double(), self.randn(channels).double().square() + 0.5
            y = self.kernels.normalize(x, mean, var, weight, bias, residual, *settings, None, mask)
            true_y = aten.normalize(wide[0], mean, var, *wide[1:], *settings, mask)
        else:
            y, mean, var = self.kernels.forward(x, weight, bias, residual, *settings, None, mask)
            true_y, true_mean, true_var = aten.forward(*wide, *settings, mask)
            torch.testing.assert_close(mean, true_mean, rtol=1e-7, atol=1e-6)
            torch.testing.assert_close(var, true_var, rtol=2e-6, atol=1e-9)
            counted = self.kernels.count_moments(x, pool_size, mask)
            torch.testing.assert_close(counted[0], pools.counts(), rtol=0, atol=0)
            torch.testing.assert_close(counted[1], true_mean, rtol=1e-7, atol=1e-6)
            torch.testing.assert_close(counted[2], true_var * pools.counts(), rtol=2e-6, atol=1e-9)
        xhat = torch.where(inside, (wide[0] - pools.expand(mean, torch.float64)), 0.0)
        xhat = xhat * pools.expand((var + EPS).rsqrt(), torch.float64)
        gamma = weight.double().view(1, -1, *[1] * (x.ndim - 2))
        y_terms = (gamma * xhat).abs() + 7
        if residual is not None:
            y_terms = y_terms + residual.double().nan_to_num().abs()
        assert_rounded(y, true_y, y_terms, 24, "y")
        assert y.masked_select(~inside).eq(0).all()
        got = self.kernels.backward(
            dy, x, weight, bias, residual, None, mean, var, *settings, population, True, True, mask
        )  # fmt: skip
        want = aten.gradients(dy.double(), *wide, mean, var, *settings, population, mask)
        dx_terms = (gamma * pools.expand((var + EPS).rsqrt(), torch.float64)).abs() * (2 + xhat.abs())
        dx_terms = dx_terms * dy.nan_to_num().abs().max()
        assert_rounded(got[0], want[0], dx_terms, 64, "dx")
        assert_rounded(got[1], want[1], 2 * dy.double().nan_to_num(), 24, "d_residual")
        for t in got[:2]:
            assert t.masked_select(~inside).eq(0).all()
        for name, ours, truth in zip(("d_weight", "d_bias"), got[2:], want[2:], strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * x.numel() / channels, msg=name)
        saved = (weight, bias, residual, None, mean, var)
        sums = self.kernels.backward_reduce(dy, x, *saved, *settings, mask)
        truth = aten.backward_reduce(dy.double(), *wide, mean, var, *settings, mask)
        torch.testing.assert_close(sums, truth, rtol=1e-5, atol=1e-6 * x.numel() / channels)
        if not population:
            gamma = weight.double() * torch.stack(sums)
            dx, dz = self.kernels.backward_merged(dy, x, *saved, gamma, pools.counts(), *settings, True, mask)
            torch.testing.assert_close((dx, dz), got[:2], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("scheme", "last"), [("single", False), ("whole", True), ("split", False), ("split", True), ("merged", True)]
    )
    def test_masks_in_every_scheme(self, monkeypatch: pytest.MonkeyPatch, scheme: str, last: bool) -> None:
        """Padding fills whole tiles, whole splits and, of ghost batches, a whole pool."""
        force(monkeypatch, scheme)
        x, dy, residual = (3 * self.randn(9, 2, 5, 9, last=last) + 7 for _ in range(3))
        self.check_masked(x, dy, residual, self.mask_of(x.shape, "empty pool"), "leaky_relu", 4)
        if scheme == "split":
            self.check_masked(x, dy, None, self.mask_of(x.shape, "holes"), "identity", 0)
            self.check_masked(x, dy, None, self.mask_of(x.shape, "lengths"), "relu", 0, population=True)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((7, 5, 11), torch.bfloat16), ((13, 9), torch.float32), ((4, 3, 2, 3, 5), torch.float16)],
        ids=str,
    )
    def test_masks_of_any_shape_and_dtype(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x, dy, residual = (self.randn(*shape, dtype=dtype) for _ in range(3))
        self.check_masked(x, dy, residual, self.mask_of(shape, "lengths"), "silu", 0)

    @pytest.mark.parametrize("last", [False, True], ids=["planar", "interleaved"])
    def test_statistics_far_from_zero_after_padding(self, monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
        """The first tiles of a program are padding, whose mean would be a bad shift."""
        force(monkeypatch, "split")
        x = self.randn(64, 2, 3, 40, last=last) + 1e4
        mask = torch.arange(64, device=self.device).ge(40).view(-1, 1, 1).expand(64, 3, 40)
        count, mean, m2 = self.kernels.count_moments(x, 0, mask)
        true_mean, true_m2 = aten.moments(x.double(), 0, mask)
        assert count.eq(24 * 120).all()
        torch.testing.assert_close(mean, true_mean, rtol=1e-10, atol=0)
        torch.testing.assert_close(m2, true_m2, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(("ranks", "groups"), [(1, 3), (3, 0), (3, 3), (70, 3)])
    def test_ranks_and_groups_merge_where_they_normalize(self, ranks: int, groups: int) -> None:
        """Ranks of which one is empty; 70 are merged by a kernel of their own."""
        # The many are groups that a program walks in several steps.
        shape = (5, 1200) if groups and ranks == 3 else (5, 6, 2, 3)
        x, dy, channels = self.randn(*shape), self.randn(*shape), shape[1]
        weight, bias = self.randn(channels), self.randn(channels)
        settings = (2, EPS, "relu", SLOPE)
        own = self.kernels.count_moments(x, 2)
        others = [own * self.randn(*own.shape).double().abs() for _ in range(ranks - 1)]
        parts = torch.stack([own, *others])
        if ranks > 1:
            parts[1, 0], parts[1, 1], parts[1, 2] = 0.0, torch.nan, 0.0
        y, count, mean, var = self.kernels.normalize_merged(x, parts, weight, bias, None, *settings, groups, None)
        counts, means, m2s = merge_moments(*parts.unbind(1), Pool(groups=groups))
        true_count, true_mean, m2 = merge_axis(counts, means, m2s, 0)
        torch.testing.assert_close((count, mean, var), (true_count, true_mean, m2 / true_count))
        assert torch.equal(y, self.kernels.normalize(x, mean, var, weight, bias, None, *settings, None))
        saved, sums = (weight, bias, None, None, mean, var), self.randn(2, 3, channels).double()
        dx, dz = self.kernels.backward_merged(dy, x, *saved, sums, count, *settings, True)
        inv_std = (var + EPS).rsqrt()
        k = (weight * inv_std, -(inv_std**3) * sums[1] / count, -inv_std * sums[0] / count)
        torch.testing.assert_close((dx, dz), self.kernels.backward_apply(dy, x, *saved, *k, *settings, True))

    @pytest.mark.parametrize("activation", schemas.ACTIVATIONS)
    def test_float64(self, activation: str) -> None:
        """Elements, sums and activations; also where tanh changes its formula."""
        x, dy, residual = (torch.randn(7, 3, 40, dtype=torch.float64, device=self.device) for _ in range(3))
        weight, bias = (torch.randn(3, dtype=torch.float64, device=self.device) for _ in range(2))
        settings = (0, EPS, activation, SLOPE)
        y, mean, var = self.kernels.forward(x, weight, bias, residual, *settings, None)
        truth = aten.forward(x, weight, bias, residual, *settings)
        torch.testing.assert_close((y, mean, var), truth, rtol=1e-13, atol=1e-14)
        got = self.kernels.backward(dy, x, weight, bias, residual, None, mean, var, *settings, False, True, True)
        want = aten.gradients(dy, x, weight, bias, residual, mean, var, *settings, False)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize(("scheme", "last"), [("single", False), ("split", True)])
    def test_the_grid_of_error(self, monkeypatch: pytest.MonkeyPatch, scheme: str, last: bool) -> None:
        """Channels far from zero, hardly varying, constant, with one outlier, subnormal: beside torch, to float64."""
        force(monkeypatch, scheme)
        x = self.randn(16, 8, 4, 9)
        for channel, (scale, shift) in enumerate([(1, 1e2), (1, 1e4), (1, 1e6), (1e-6, 0), (1e-12, 1), (0, 3)]):
            x[:, channel] = x[:, channel] * scale + shift
        x[5, 6, 2, 3] = 1e8
        x[:, 7] *= 1e-39
        x = x.to(memory_format=torch.channels_last) if last else x
        y, mean, var = self.kernels.forward(x, None, None, None, 0, EPS, "identity", SLOPE, None)
        truth, true_mean, true_var = aten.forward(x.double(), None, None, None, 0, EPS, "identity", SLOPE)
        assert bool(((mean - true_mean).abs() <= 1e-8 * true_var.sqrt() + 1e-12 * true_mean.abs()).all())
        torch.testing.assert_close(var, true_var, rtol=1e-5, atol=1e-38)
        peer = torch.nn.functional.batch_norm(x.cpu(), None, None, None, None, True, 0.1, EPS).to(self.device)
        assert_within_budget(y, truth, peer, name="y", terms=truth.abs().clamp_min(1e-38))

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize(("value", "last"), [(torch.nan, False), (torch.inf, True), (-torch.inf, False)])
    def test_what_is_not_finite_stays_in_its_channel(self, value: float, last: bool) -> None:
        x, dy = self.randn(6, 9, 5, 3, last=last), self.randn(6, 9, 5, 3)
        clean = x.clone()
        x[2, 1, 3] = value
        settings = (0, EPS, "relu", SLOPE)
        y, mean, var = self.kernels.forward(x, None, None, None, *settings, None)
        dx, *_ = self.kernels.backward(dy, x, None, None, None, None, mean, var, *settings, False, True, False)
        true_y, *saved = self.kernels.forward(clean, None, None, None, *settings, None)
        true_dx, *_ = self.kernels.backward(dy, clean, None, None, None, None, *saved, *settings, False, True, False)
        others = [c for c in range(9) if c != 1]
        assert torch.equal(y[:, others], true_y[:, others])
        assert torch.equal(dx[:, others], true_dx[:, others])
        assert not mean[0, 1].isfinite()
        assert y[:, 1].isnan().any()
        assert dx[:, 1].isnan().all()

    def test_only_what_is_wanted_is_made(self) -> None:
        x, dy, weight = self.randn(5, 3, 4), self.randn(5, 3, 4), self.randn(3)
        _, mean, var = self.kernels.forward(x, weight, None, None, 2, EPS, "relu", SLOPE, None)
        args = (dy, x, weight, None, None, None, mean, var, 2, EPS, "relu", SLOPE)
        everything = self.kernels.backward(*args, False, True, True)
        assert everything[3] is None
        for want_x, want_residual in ((False, False), (True, False), (False, True)):
            some = self.kernels.backward(*args, False, want_x, want_residual)
            for one, whole, wanted in zip(some, everything, (want_x, want_residual, True, False), strict=True):
                assert (one is not None) == wanted
                if wanted:
                    torch.testing.assert_close(one, whole, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("momentum", [0.3, None])
    @pytest.mark.parametrize("pools", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_running_statistics(self, momentum: float | None, pools: int, dtype: torch.dtype) -> None:
        channels = 130
        mean, var = self.randn(pools, channels).double(), self.randn(pools, channels).double().square()
        for unbiased in (True, False):
            ours = [self.randn(channels, dtype=dtype), self.randn(channels, dtype=dtype).square()]
            truth = [t.clone() for t in ours]
            counts = [torch.tensor(4, device=self.device) for _ in range(2)]
            for _ in range(2):
                args = (mean, var, 20, 8, momentum, unbiased)
                self.kernels.update_statistics(*ours, counts[0], *args)
                aten.update_statistics(*truth, counts[1], *args)
            assert counts[0].item() == counts[1].item() == 6
            allowed = 4 * rounding(dtype)  # two steps, on both sides
            torch.testing.assert_close(ours, truth, rtol=allowed, atol=4 * allowed)
        before = [t.clone() for t in ours]
        self.kernels.update_statistics(None, None, counts[0], mean, var, 20, 8, momentum, True)
        assert counts[0].item() == 7
        torch.testing.assert_close(ours, before, rtol=0, atol=0)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, of infinities, in the interpreter
    @pytest.mark.parametrize("momentum", [0.125, 0.75])  # the interpreter makes float32 of a scalar that gets a name
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_running_statistics_with_a_carry(self, momentum: float, dtype: torch.dtype) -> None:
        """Nothing of ten steps is lost, and an infinity stays one."""
        channels = 5
        mean, var = self.randn(1, channels).double() + 100, self.randn(1, channels).double().square()
        ours = [torch.full((channels,), 100.0, dtype=dtype, device=self.device) for _ in range(2)]
        carry = torch.zeros(2, channels, dtype=dtype, device=self.device)
        exact = [(t.double().clone(), torch.zeros(channels, dtype=torch.float64, device=self.device)) for t in ours]
        for k in range(10):
            batch = (mean + k / 7, var)
            self.kernels.update_statistics(*ours, None, *batch, 20, 20, momentum, False, carry)
            exact = [
                aten.mixed(value, new[0], momentum, rest)  # type: ignore[misc]
                for (value, rest), new in zip(exact, batch, strict=True)
            ]
        for value, rest, (right, _) in zip(ours, carry, exact, strict=True):
            torch.testing.assert_close(value.double() + rest.double(), right, rtol=1e-13, atol=1e-13)
        mean[0, 1], mean[0, 2] = torch.inf, -torch.inf
        for _ in range(2):
            self.kernels.update_statistics(*ours, None, mean, var, 20, 20, momentum, False, carry)
            mean[0, 1] = 3.0
        assert ours[0].isinf().tolist() == [False, True, True, False, False]
        assert carry.isfinite().all()

    def test_the_self_test_passes(self) -> None:
        cuda._kernels = self.kernels
        cuda.self_test(torch.device(self.device))

    @pytest.fixture
    def kernel_calls(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """The operators that the kernels served; on the CPU they take the place of the C++ ones."""
        calls: list[str] = []

        def recorded(name: str, function: Any) -> Any:
            return lambda *args, **settings: calls.append(name) or function(*args, **settings)

        names = [
            "forward", "normalize", "backward", "update_statistics", "count_moments", "normalize_merged",
            "backward_reduce", "backward_merged",
        ]  # fmt: skip
        for name in names:
            monkeypatch.setattr(self.kernels, name, recorded(name, getattr(self.kernels, name)))
        if self.device != "cpu":
            yield calls
            return
        monkeypatch.setattr(cpu, "call", None)  # which goes to the C++ kernels past the operators
        monkeypatch.setattr(cuda, "_kernels", self.kernels)
        monkeypatch.setitem(cuda._reasons, torch.device("cpu"), None)
        with torch.library._scoped_library("batchnorm", "IMPL") as library:
            for name in names:
                library.impl(
                    name, schemas.by_name(name, cuda.implementation(name, pytest.fail)), "CPU", allow_override=True
                )
            # On a device it is made of operators that Triton serves; the CPU has kernels for it.
            composed = schemas.by_name("reduce_merged", registration._reduce_merged)
            library.impl("reduce_merged", composed, "CPU", allow_override=True)
            yield calls

    @pytest.mark.filterwarnings("ignore:.*[oO]verrid.*:UserWarning")
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_layer_trains_as_torch_does(self, kernel_calls: list[str], fused: bool) -> None:
        """Through schemas, autograd and the layer: three steps, then inference."""
        ours = batchnorm.BatchNorm2d(5, activation="relu" if fused else None).to(self.device)
        theirs = torch.nn.BatchNorm2d(5).to(self.device)
        for _ in range(3):
            x, residual, upstream = (self.randn(4, 5, 3, 6) for _ in range(3))
            results = []
            for layer in (ours, theirs):
                a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
                y = layer(a, b) if fused and layer is ours else layer(a) + b
                y = torch.relu(y) if fused and layer is theirs else y
                y.backward(upstream)
                results.append([y, a.grad, b.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
                layer.zero_grad()
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        y = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()(x), torch.relu(y) if fused else y, rtol=1e-5, atol=1e-5)
        assert kernel_calls == ["forward", "update_statistics", "backward"] * 3 + ["normalize"]

    @pytest.mark.filterwarnings("ignore:.*[oO]verrid.*:UserWarning")
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize(
        ("options", "masked", "served"),
        [
            ({}, True, ["forward", "backward"]),
            ({"ghost_size": 3}, True, ["forward", "backward"]),
            ({"ghost_size": 3}, False, ["forward", "backward"]),
            ({"channel_groups": 2}, True, ["count_moments", "normalize_merged", "backward_reduce", "backward_merged"]),
        ],
    )
    def test_layers_of_other_pools(
        self, request: pytest.FixtureRequest, options: dict[str, int], masked: bool, served: list[str], residual: bool
    ) -> None:
        """Masks, ghost batches and channel groups: as in float64, by the operators that these kernels serve."""
        x, dy, other = (self.randn(7, 4, 9) for _ in range(3))
        lengths = torch.tensor([9, 1, 5, 0, 7, 2, 3]) if masked else None
        results = []
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(1)
            layer = batchnorm.BatchNorm1d(4, activation="relu", **options).to(self.device, dtype)
            torch.nn.init.normal_(layer.weight)
            a, b = (t.to(dtype).requires_grad_() for t in (x, other))
            if dtype is torch.float32:
                calls = request.getfixturevalue("kernel_calls")
            y = layer(a, b if residual else None, lengths=lengths)
            y.backward(dy.to(dtype))
            results.append([y, a.grad, b.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        for ours, truth in zip(results[1], results[0], strict=True):
            if truth is not None:
                torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5, check_dtype=False)
        assert [call for call in calls if call != "update_statistics"] == served


class TestUnderInterpreter(TritonLaws):
    """On the CPU."""

    pytestmark = pytest.mark.skipif(not INTERPRETING, reason="test_triton.py starts it with TRITON_INTERPRET=1")

    def test_a_broken_kernel_fails_the_self_test(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And ATen then serves the device, with a warning."""
        whole = self.kernels.forward

        def broken(*args: Any) -> Any:
            y, mean, var = whole(*args)
            return y * 1.01, mean, var

        monkeypatch.setattr(self.kernels, "forward", broken)
        monkeypatch.setattr(cuda, "_reasons", {})
        monkeypatch.setattr(cuda, "_kernels", None)
        with pytest.warns(RuntimeWarning, match="self-test"):
            assert "failed their self-test" in (cuda.reason(torch.device("cpu")) or "")
        served = cuda.implementation("forward", lambda a: "aten")
        given = (self.randn(3, 2), None, None, None, 0, EPS, 0, SLOPE, False)
        assert served(schemas.ARGUMENTS["forward"](*given)) == "aten"
        assert cuda.describe(torch.device("cpu")).startswith("ATen operations, because")
