"""Moments are a commutative monoid, and right where sums of squares are not."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

import batchnorm.moments
from batchnorm import reference as ref
from batchnorm.errors import DtypeError, InputError
from batchnorm.moments import Moments

finite = st.floats(-1e6, 1e6, width=32)
samples = st.lists(finite, min_size=0, max_size=12)


def of(values):
    """The moments of one channel that holds these values."""
    return Moments.of(torch.tensor(values, dtype=torch.float64).reshape(-1, 1))


def exact(values):
    """(mean, M2) in exact arithmetic."""
    values = [Fraction(v) for v in values]
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values)


def same(a, b, *values):
    """a and b hold the same moments, up to a few roundings of the values that went in."""
    size = max((abs(v) for v in values), default=0.0)
    torch.testing.assert_close(a.count, b.count.expand_as(a.count), rtol=0, atol=0)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-14 * size)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-13, atol=1e-14 * size**2)


class TestMonoid:
    @given(samples)
    def test_empty_is_the_exact_identity(self, a):
        for merged in (of(a) + Moments.empty(1), Moments.empty(1) + of(a)):
            assert torch.equal(merged.mean, of(a).mean)
            assert torch.equal(merged.m2, of(a).m2)
            assert merged.count == len(a)

    def test_empty_is_the_identity_of_huge_values(self):
        huge = of([1e200, 1e200])
        assert (huge + Moments.empty(1)).m2 == (Moments.empty(1) + huge).m2 == 0

    @given(samples, samples)
    def test_commutative(self, a, b):
        same(of(a) + of(b), of(b) + of(a), *a, *b)

    @given(samples, samples, samples)
    def test_associative(self, a, b, c):
        same((of(a) + of(b)) + of(c), of(a) + (of(b) + of(c)), *a, *b, *c)

    @given(st.lists(samples, min_size=1, max_size=5))
    def test_merge_of_any_split_is_the_whole(self, parts):
        whole = [v for part in parts for v in part]
        same(Moments.merge_all(of(part) for part in parts), of(whole), *whole)

    @given(st.lists(finite, min_size=1, max_size=30))
    def test_error_against_exact_arithmetic(self, values):
        mean, m2 = exact(values)
        merged = Moments.merge_all(of([v]) for v in values)
        size = max(abs(v) for v in values)
        for ours in (of(values), merged):
            assert abs(Fraction(ours.mean.item()) - mean) <= Fraction(1e-14) * Fraction(size)
            assert abs(Fraction(ours.m2.item()) - m2) <= Fraction(1e-12) * (m2 + Fraction(size) ** 2 / 1000)

    def test_two_values_by_hand(self):
        m = of([1.0]) + of([3.0])
        assert (m.count.item(), m.mean.item(), m.m2.item()) == (2, 2, 2)

    def test_merge_all_goes_from_first_to_last(self):
        parts = [of([v]) for v in (0.1, 1e8, -3.0, 7e-5)]
        merged = Moments.merge_all(parts)
        by_hand = ((parts[0] + parts[1]) + parts[2]) + parts[3]
        assert torch.equal(merged.mean, by_hand.mean)
        assert torch.equal(merged.m2, by_hand.m2)


class TestOf:
    def test_large_mean_small_variance_in_float32(self):
        # E[x^2] - E[x]^2 gives 8.0 in float32 where 0.92 is right.
        x = torch.randn(100_000, 1) * 0.92**0.5 + 1e4
        ours = Moments.of(x).variance(unbiased=False).item()
        assert ours == pytest.approx(x.double().var(correction=0).item(), rel=1e-12)
        assert ours == pytest.approx(0.92, rel=0.02)

    def test_mean_at_which_float64_itself_loses_digits(self):
        offsets = torch.tensor([0.0, 1, 2, 4, 9], dtype=torch.float64)
        ours = Moments.of((offsets + 2.0**52).reshape(-1, 1))
        assert ours.mean == 2.0**52 + 3  # 2^52 + 3.2, rounded
        assert ours.m2.item() == pytest.approx(50.8, rel=1e-9)

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [
            ((5, 3), 1),
            ((5, 3), 0),
            ((4, 3, 2, 5), 1),
            ((4, 3, 2, 5), -1),
            ((2, 3, 4), 0),
            ((3,), 0),
        ],
    )
    @pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
    def test_any_axis_and_any_chunk_against_the_reference(self, monkeypatch, shape, axis, chunk):
        monkeypatch.setattr(batchnorm.moments, "_CHUNK", chunk)
        x = torch.randn(shape) * 3 + 100
        ours, expected = Moments.of(x, axis), ref.moments(x.numpy(), axis=axis)
        assert ours.mean.shape == ours.m2.shape == (shape[axis],)
        np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-14)
        np.testing.assert_allclose(ours.m2, expected.m2, rtol=1e-11)
        assert ours.count == x.numel() // shape[axis]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool])
    def test_any_real_dtype_of_the_rounded_values(self, dtype):
        x = (torch.randn(50, 2) * 3).to(dtype)
        ours = Moments.of(x)
        assert ours.mean.dtype == ours.m2.dtype == ours.count.dtype == torch.float64
        torch.testing.assert_close(ours.mean, x.double().mean(0), rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(ours.m2, x.double().var(0) * 49, rtol=1e-12, atol=0)

    def test_strides_do_not_matter(self):
        x = torch.randn(6, 4, 5, 3)
        whole = Moments.of(x[::2, 1:3, :, 1:])
        copied = Moments.of(x[::2, 1:3, :, 1:].contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(whole.m2, copied.m2, rtol=1e-14, atol=0)

    @pytest.mark.parametrize(("axis", "keep_axis"), [(1, True), (1, False), (-1, True), (-1, False)])
    def test_mask_is_the_valid_values_alone(self, axis, keep_axis):
        x = torch.randn(6, 3, 4).movedim(1, axis)
        mask = torch.rand(6, 4) > 0.4
        x[~(mask.unsqueeze(axis).expand_as(x))] = torch.nan
        ours = Moments.of(x, axis, mask=mask.unsqueeze(axis) if keep_axis else mask)
        valid = Moments.of(x.movedim(axis, 2 if axis == 1 else -1)[mask])
        torch.testing.assert_close(ours.mean, valid.mean, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(ours.m2, valid.m2, rtol=1e-13, atol=0)
        assert ours.count == mask.sum()

    @pytest.mark.parametrize("chunk", [5, 1 << 22])
    def test_weights_against_the_reference(self, monkeypatch, chunk):
        monkeypatch.setattr(batchnorm.moments, "_CHUNK", chunk)
        x, w = torch.randn(6, 3, 4) + 50, torch.rand(6, 4)
        w[2] = 0
        x[2] = torch.inf
        ours, expected = Moments.of(x, weights=w), ref.moments(x.numpy(), weights=w.numpy())
        np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-13)
        np.testing.assert_allclose(ours.m2, expected.m2, rtol=1e-11)
        np.testing.assert_allclose(ours.count.expand(3), expected.count)

    def test_integer_weights_are_repetitions_and_a_mask_takes_part(self):
        x, times = torch.randn(5, 2), torch.tensor([3, 0, 2, 1, 1])
        repeated = Moments.of(x.repeat_interleave(times, 0)[:-1])
        mask = torch.tensor([True, True, True, True, False])
        same(Moments.of(x, weights=times, mask=mask), repeated, 3.0)

    @pytest.mark.parametrize("case", ["no samples", "all masked", "no space"])
    def test_no_values_are_the_empty_moments(self, case):
        shape = {"no samples": (0, 3, 2), "all masked": (4, 3, 2), "no space": (4, 3, 0)}[case]
        mask = torch.zeros(4, 2, dtype=torch.bool) if case == "all masked" else None
        m = Moments.of(torch.full(shape, torch.nan), mask=mask)
        for value in (m.count.expand(3), m.mean, m.m2):
            assert torch.equal(value, torch.zeros(3, dtype=torch.float64))

    def test_a_non_finite_value_stays_in_its_channel_and_is_not_hidden(self):
        x = torch.randn(5, 3)
        x[2, 1] = torch.inf
        m = Moments.of(x)
        assert torch.equal(torch.isfinite(m.m2), torch.tensor([True, False, True]))
        assert torch.equal(torch.isfinite(m.mean), torch.tensor([True, False, True]))

    def test_no_gradient_is_lost(self):
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: Moments.of(v).variance(unbiased=True), x)

    @pytest.mark.parametrize(
        ("error", "message", "options"),
        [
            (InputError, "channel_axis=4", {"channel_axis": 4}),
            (InputError, r"mask of shape \(5, 3\)", {"mask": torch.ones(5, 3, dtype=torch.bool)}),
            (DtypeError, "mask of torch.int64", {"mask": torch.ones(5, 4, dtype=torch.int64)}),
            (InputError, r"weights of shape \(4,\)", {"weights": torch.ones(4)}),
            (InputError, "negative", {"weights": -torch.ones(5, 4)}),
            (InputError, "not finite", {"weights": torch.full((5, 4), torch.nan)}),
        ],
    )
    def test_bad_input(self, error, message, options):
        with pytest.raises(error, match=message):
            Moments.of(torch.zeros(5, 3, 4), **options)

    def test_complex_is_refused(self):
        with pytest.raises(DtypeError, match="complex64"):
            Moments.of(torch.zeros(5, 3, dtype=torch.complex64))


class TestVariance:
    def test_biased_and_unbiased(self):
        x = torch.randn(7, 3, dtype=torch.float64)
        for unbiased in (False, True):
            expected = x.var(0, correction=int(unbiased))
            torch.testing.assert_close(Moments.of(x).variance(unbiased=unbiased), expected)
            torch.testing.assert_close(Moments.of(x).std(unbiased=unbiased), expected.sqrt())

    @pytest.mark.parametrize("unbiased", [False, True])
    @pytest.mark.parametrize("count", [0, 1])
    def test_one_value_or_none_gives_zero(self, count, unbiased):
        m = Moments.of(torch.full((count, 2), 5.0))
        assert m.variance(unbiased=unbiased).tolist() == [0, 0]

    def test_total_weight_below_one_gives_the_biased_variance(self):
        m = Moments.of(torch.tensor([[1.0], [3.0]]), weights=torch.tensor([0.25, 0.25]))
        assert m.variance(unbiased=True) == m.variance(unbiased=False) == 1

    def test_the_caller_must_say_which(self):
        with pytest.raises(TypeError, match="unbiased"):
            of([1.0]).variance()


class TestValue:
    def test_numbers_and_rows_of_pools(self):
        rows = Moments(torch.tensor([[2], [0]]), torch.ones(2, 3), torch.ones(2, 3))
        assert rows.count.dtype == torch.float64
        assert (rows + rows).count.tolist() == [[4], [0]]
        assert Moments(3, torch.ones(4), torch.ones(4)).variance(unbiased=True).tolist() == [0.5] * 4

    @pytest.mark.parametrize(("count", "mean", "m2"), [((2,), (3,), (3,)), ((), (3,), (2,)), ((1, 1), (1,), (1,))])
    def test_shapes_that_do_not_fit(self, count, mean, m2):
        with pytest.raises(InputError, match="broadcasts"):
            Moments(torch.ones(count), torch.ones(mean), torch.ones(m2))

    def test_merging_different_channels_is_refused(self):
        with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
            Moments.empty(2).merge(Moments.empty(3))

    def test_merging_nothing_is_refused(self):
        with pytest.raises(InputError, match=r"Moments\.empty"):
            Moments.merge_all([])

    def test_adding_something_else_is_refused(self):
        with pytest.raises(TypeError):
            of([1.0]) + 1

    def test_copies_and_pickles(self):
        m = of([1.0, 2.0])
        for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.to("cpu")):
            same(twin, m)

    def test_without_a_process_group_this_process_is_the_world(self):
        m = of([1.0, 2.0])
        assert m.all_reduce() is m


def _rank(rank, folder):
    """One of two ranks that share x as 5 + 2 and as 7 + 0 samples; saves what it gets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt", weights_only=True)
    results = [Moments.of(x.split(split)[rank]).all_reduce() for split in ([5, 2], [7, 0])]
    torch.save([[m.count, m.mean, m.m2] for m in results], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_all_reduce_merges_unequal_and_empty_ranks_to_the_same_bits(tmp_path):
    x = torch.randn(7, 3) + 1e3
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        same(Moments(*ours), Moments.of(x), 1e3)
