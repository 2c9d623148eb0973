"""The specification against finite differences, against the laws, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import reference as ref

SHAPES = [((7, 3), 1), ((4, 3, 5), 1), ((3, 2, 4, 5), 1), ((3, 4, 5, 2), -1)]
EPS = 1e-3


def problem(shape, axis, seed=0):
    """x with large means, dy, and gamma, beta away from 1 and 0 (one gamma negative)."""
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    x = rng.normal(size=shape) * 2 + ref.along(rng.normal(size=channels) * 3, len(shape), axis)
    gamma = rng.uniform(0.5, 2, channels) * np.where(np.arange(channels) % 2, -1, 1)
    return x, rng.normal(size=shape), gamma, rng.normal(size=channels)


def numeric_gradient(f, at, step=1e-6):
    """Central differences of the scalar f in every element of `at`."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (f(up) - f(down)) / (2 * step)
    return gradient


def check(gradients, loss, x, gamma, beta):
    """dx, dgamma and dbeta against central differences of loss(x, gamma, beta)."""
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(gradients.dx, numeric_gradient(lambda v: loss(v, gamma, beta), x), **close)
    np.testing.assert_allclose(gradients.dgamma, numeric_gradient(lambda v: loss(x, v, beta), gamma), **close)
    np.testing.assert_allclose(gradients.dbeta, numeric_gradient(lambda v: loss(x, gamma, v), beta), **close)


class TestTransform:
    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    def test_output_has_mean_beta_and_the_variance_that_eps_leaves(self, shape, axis):
        x, _, gamma, beta = problem(shape, axis)
        out = ref.batch_norm(x, gamma, beta, eps=EPS, axis=axis)
        pool = ref.pool_axes(x.ndim, axis)
        np.testing.assert_allclose(out.y.mean(axis=pool), beta, atol=1e-12)
        np.testing.assert_allclose(out.y.var(axis=pool), gamma**2 * out.var / (out.var + EPS))

    def test_agrees_with_torch_in_float64(self):
        x, _, gamma, beta = problem((4, 3, 5), 1)
        theirs = F.batch_norm(torch.from_numpy(x), None, None, torch.from_numpy(gamma), torch.from_numpy(beta), True)
        np.testing.assert_allclose(ref.batch_norm(x, gamma, beta).y, theirs.numpy(), atol=1e-12)

    def test_channels_last_is_the_same_function(self):
        x, _, gamma, beta = problem((3, 2, 4, 5), 1)
        last = ref.batch_norm(np.moveaxis(x, 1, -1), gamma, beta, axis=-1).y
        np.testing.assert_allclose(np.moveaxis(last, -1, 1), ref.batch_norm(x, gamma, beta).y)

    @given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-50, 50))
    def test_shift_scale_and_permutation_of_the_input(self, seed, scale, shift):
        x, _, gamma, beta = problem((6, 3, 2), 1, seed)
        y = ref.batch_norm(x, gamma, beta, eps=1e-12).y
        order = np.random.default_rng(seed).permutation(6)
        np.testing.assert_allclose(ref.batch_norm(scale * x + shift, gamma, beta, eps=1e-12).y, y, atol=1e-8)
        np.testing.assert_allclose(
            ref.batch_norm(x[order], gamma, beta).y[order.argsort()],
            ref.batch_norm(x, gamma, beta).y,
            atol=1e-12,
        )

    def test_batch_statistics_given_to_inference_give_the_training_output(self):
        x, _, gamma, beta = problem((4, 3, 5), 1)
        train = ref.batch_norm(x, gamma, beta)
        np.testing.assert_allclose(ref.inference(x, train.mean, train.var, gamma, beta).y, train.y, atol=1e-14)

    def test_line_11_is_inference_as_an_affine_map(self):
        x, _, gamma, beta = problem((4, 3, 5), 1)
        mean, var = np.array([1.0, -2, 3]), np.array([0.5, 2, 1e-4])
        line = ref.inference_affine(mean, var, gamma, beta, eps=EPS)
        expected = ref.inference(x, mean, var, gamma, beta, eps=EPS).y
        np.testing.assert_allclose(ref.along(line.scale, 3) * x + ref.along(line.shift, 3), expected, atol=1e-12)

    def test_ghosts_are_batches_of_their_own_and_the_last_may_be_smaller(self):
        x, _, gamma, beta = problem((7, 3, 2), 1)
        out = ref.ghost_batch_norm(x, 3, gamma, beta)
        assert out.mean.shape == (3, 3)
        np.testing.assert_array_equal(out.y[6:], ref.batch_norm(x[6:], gamma, beta).y)
        np.testing.assert_array_equal(out.y[:3], ref.batch_norm(x[:3], gamma, beta).y)

    def test_channel_groups_of_one_channel_are_batch_norm(self):
        x, _, gamma, beta = problem((4, 6, 5), 1)
        grouped = ref.group_batch_norm(x, 6, gamma, beta).y
        np.testing.assert_allclose(grouped, ref.batch_norm(x, gamma, beta).y, atol=1e-12)

    @pytest.mark.parametrize(("shape", "axis"), [((4, 6, 5), 1), ((4, 5, 6), -1)])
    def test_channel_groups_for_one_sample_are_group_norm(self, shape, axis):
        x, _, gamma, beta = problem((1, *shape[1:]), axis)
        first = torch.from_numpy(np.moveaxis(x, axis, 1))
        theirs = F.group_norm(first, 3, torch.from_numpy(gamma), torch.from_numpy(beta))
        ours = ref.group_batch_norm(x, 3, gamma, beta, axis=axis).y
        np.testing.assert_allclose(np.moveaxis(ours, axis, 1), theirs.numpy(), atol=1e-12)


class TestGradient:
    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    @pytest.mark.parametrize("form", [ref.backward, ref.backward_stepwise])
    def test_both_forms_against_finite_differences(self, form, shape, axis):
        x, dy, gamma, beta = problem(shape, axis)

        def loss(x, gamma, beta):
            return (dy * ref.batch_norm(x, gamma, beta, eps=EPS, axis=axis).y).sum()

        check(form(dy, x, gamma, eps=EPS, axis=axis), loss, x, gamma, beta)

    @given(st.integers(0, 999), st.sampled_from([1e-12, 1e-5, 1e-3, 10.0]))
    def test_step_by_step_and_compact_agree(self, seed, eps):
        x, dy, gamma, _ = problem((5, 3, 2), 1, seed)
        steps = ref.backward_stepwise(dy, x, gamma, eps=eps)
        compact = ref.backward(dy, x, gamma, eps=eps)
        for name in ("dx", "dgamma", "dbeta"):
            np.testing.assert_allclose(getattr(steps, name), getattr(compact, name), atol=1e-10)

    def test_intermediate_gradients_against_finite_differences(self):
        x, dy, gamma, beta = problem((5, 3), 1)
        steps = ref.backward_stepwise(dy, x, gamma, eps=EPS)
        train = ref.batch_norm(x, eps=EPS)

        def loss_of_var(var):
            return (dy * ref.inference(x, train.mean, var, gamma, beta, eps=EPS).y).sum()

        def loss_of_mean(mean):  # the variance follows the mean, as it does in the chain rule
            var = ((x - mean) ** 2).mean(axis=0)
            return (dy * ref.inference(x, mean, var, gamma, beta, eps=EPS).y).sum()

        np.testing.assert_allclose(steps.dvar, numeric_gradient(loss_of_var, train.var), rtol=1e-6)
        np.testing.assert_allclose(steps.dmean, numeric_gradient(loss_of_mean, train.mean), rtol=1e-6)

    @given(st.integers(0, 999), st.sampled_from([1e-5, 1e-2, 1.0]))
    def test_dx_sums_to_zero_and_what_eps_leaves_along_xhat(self, seed, eps):
        x, dy, gamma, _ = problem((5, 3, 2), 1, seed)
        out, dx = ref.batch_norm(x, eps=eps), ref.backward(dy, x, gamma, eps=eps).dx
        along_xhat = gamma * out.inv_std * (dy * out.xhat).sum(axis=(0, 2)) * eps / (out.var + eps)
        np.testing.assert_allclose(dx.sum(axis=(0, 2)), 0, atol=1e-11)
        np.testing.assert_allclose((dx * out.xhat).sum(axis=(0, 2)), along_xhat, atol=1e-10)

    def test_gradient_of_the_sum_is_zero(self):
        x, dy, gamma, _ = problem((5, 3, 2), 1)
        np.testing.assert_allclose(ref.backward(np.ones_like(dy), x, gamma).dx, 0, atol=1e-12)

    def test_a_bias_before_it_gets_no_gradient(self):
        x, dy, gamma, beta = problem((5, 3), 1)
        numeric = numeric_gradient(lambda b: (dy * ref.batch_norm(x + b, gamma, beta).y).sum(), np.zeros(3))
        np.testing.assert_allclose(numeric, 0, atol=1e-8)

    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    def test_frozen_statistics(self, shape, axis):
        x, dy, gamma, beta = problem(shape, axis)
        mean, var = np.linspace(-1, 1, shape[axis]), np.linspace(0.5, 2, shape[axis])

        def loss(x, gamma, beta):
            return (dy * ref.inference(x, mean, var, gamma, beta, eps=EPS, axis=axis).y).sum()

        gradients = ref.backward_frozen(dy, x, mean, var, gamma, eps=EPS, axis=axis)
        check(gradients, loss, x, gamma, beta)

    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    def test_variance_detached(self, shape, axis):
        x, dy, gamma, beta = problem(shape, axis)
        pool, var = ref.pool_axes(x.ndim, axis), ref.batch_norm(x, axis=axis).var

        def loss(x, gamma, beta):
            mean = x.mean(axis=pool)
            return (dy * ref.inference(x, mean, var, gamma, beta, eps=EPS, axis=axis).y).sum()

        gradients = ref.backward_variance_detached(dy, x, gamma, eps=EPS, axis=axis)
        check(gradients, loss, x, gamma, beta)

    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    def test_mean_detached(self, shape, axis):
        x, dy, gamma, beta = problem(shape, axis)
        pool, mean = ref.pool_axes(x.ndim, axis), ref.batch_norm(x, axis=axis).mean

        def loss(x, gamma, beta):
            var = ((x - ref.along(mean, x.ndim, axis)) ** 2).mean(axis=pool)
            return (dy * ref.inference(x, mean, var, gamma, beta, eps=EPS, axis=axis).y).sum()

        gradients = ref.backward_mean_detached(dy, x, gamma, eps=EPS, axis=axis)
        check(gradients, loss, x, gamma, beta)

    def test_ghost_batches(self):
        x, dy, gamma, beta = problem((7, 2, 2), 1)

        def loss(x, gamma, beta):
            return (dy * ref.ghost_batch_norm(x, 4, gamma, beta, eps=EPS).y).sum()

        check(ref.ghost_backward(dy, x, 4, gamma, eps=EPS), loss, x, gamma, beta)

    @pytest.mark.parametrize(("shape", "axis"), [((3, 4, 2), 1), ((3, 2, 4), -1)])
    def test_channel_groups(self, shape, axis):
        x, dy, gamma, beta = problem(shape, axis)

        def loss(x, gamma, beta):
            return (dy * ref.group_batch_norm(x, 2, gamma, beta, eps=EPS, axis=axis).y).sum()

        check(ref.group_backward(dy, x, 2, gamma, eps=EPS, axis=axis), loss, x, gamma, beta)

    def test_renormalization_with_and_without_clipping(self):
        x, dy, gamma, beta = problem((6, 3), 1)
        plain = ref.batch_norm(x, eps=EPS)
        # The first channel's statistics lie within the limits, the others' do not.
        run_mean = plain.mean + np.array([0.1, 20, 0])
        run_var = plain.var * np.array([1.5, 1, 100])
        limits = {"r_max": 2.0, "d_max": 1.0, "eps": EPS}
        fixed = ref.renormalize(x, run_mean, run_var, gamma, beta, **limits)
        assert fixed.d[1] == -1.0
        assert fixed.r[2] == 0.5

        def loss(x, gamma, beta):  # r and d are constants
            xhat = ref.batch_norm(x, eps=EPS).xhat
            return (dy * (gamma * (xhat * fixed.r + fixed.d) + beta)).sum()

        gradients = ref.renormalize_backward(dy, x, run_mean, run_var, gamma, **limits)
        check(gradients, loss, x, gamma, beta)


class TestRenormalization:
    def test_unclipped_output_is_inference_output(self):
        x, _, gamma, beta = problem((6, 3, 2), 1)
        run_mean, run_var = np.array([0.5, -1, 2]), np.array([1.0, 3, 5])
        ours = ref.renormalize(x, run_mean, run_var, gamma, beta, r_max=1e6, d_max=1e6)
        expected = ref.inference(x, run_mean, run_var, gamma, beta).y
        np.testing.assert_allclose(ours.y, expected, atol=1e-12)

    def test_limits_one_and_zero_are_plain_batch_norm(self):
        x, _, gamma, beta = problem((6, 3, 2), 1)
        ours = ref.renormalize(x, np.ones(3), np.ones(3), gamma, beta, r_max=1, d_max=0)
        np.testing.assert_array_equal(ours.y, ref.batch_norm(x, gamma, beta).y)

    def test_schedule_of_the_paper(self):
        assert ref.renormalization_limits(0) == ref.renormalization_limits(5_000) == (1, 0)
        assert ref.renormalization_limits(15_000) == pytest.approx((1 + 2 * 10 / 35, 2.5))
        assert ref.renormalization_limits(25_000) == pytest.approx((1 + 2 * 20 / 35, 5))
        assert ref.renormalization_limits(40_000) == ref.renormalization_limits(10**6) == (3, 5)


class TestWeights:
    def weighted_problem(self, axis=1):
        x, dy, gamma, beta = problem((5, 3, 4) if axis == 1 else (5, 4, 3), axis)
        return x, dy, gamma, beta, np.random.default_rng(1).uniform(0.2, 2, (5, 4))

    @pytest.mark.parametrize("axis", [1, -1])
    def test_gradients_against_finite_differences(self, axis):
        x, dy, gamma, beta, w = self.weighted_problem(axis)

        def loss(x, gamma, beta, w=w):
            return (dy * ref.weighted_batch_norm(x, w, gamma, beta, eps=EPS, axis=axis).y).sum()

        gradients = ref.weighted_backward(dy, x, w, gamma, eps=EPS, axis=axis)
        check(gradients, loss, x, gamma, beta)
        numeric = numeric_gradient(lambda v: loss(x, gamma, beta, v), w)
        np.testing.assert_allclose(gradients.dweights, numeric, rtol=1e-6, atol=1e-7)

    def test_equal_weights_are_no_weights(self):
        x, dy, gamma, beta, _ = self.weighted_problem()
        w = np.full((5, 1, 4), 0.3)
        plain = ref.batch_norm(x, gamma, beta)
        np.testing.assert_allclose(ref.weighted_batch_norm(x, w, gamma, beta).y, plain.y)
        np.testing.assert_allclose(ref.weighted_backward(dy, x, w, gamma).dx, ref.backward(dy, x, gamma).dx, atol=1e-12)

    def test_a_mask_of_rows_drops_the_rows_whatever_they_hold(self):
        x, dy, gamma, beta, _ = self.weighted_problem()
        keep = np.array([1, 0, 1, 1, 0])
        x[1], x[4], dy[4] = np.nan, np.inf, np.nan
        w = np.repeat(keep[:, None], 4, axis=1)
        kept = keep == 1
        forward = ref.weighted_batch_norm(x, w, gamma, beta)
        backward = ref.weighted_backward(dy, x, w, gamma)
        dense = ref.backward(dy[kept], x[kept], gamma)
        np.testing.assert_allclose(forward.y[kept], ref.batch_norm(x[kept], gamma, beta).y)
        np.testing.assert_allclose(backward.dx[kept], dense.dx, atol=1e-12)
        np.testing.assert_allclose(backward.dgamma, dense.dgamma)
        np.testing.assert_allclose(backward.dbeta, dense.dbeta)
        assert not forward.y[~kept].any()
        assert not backward.dx[~kept].any()
        assert not backward.dweights[~kept].any()

    def test_integer_weights_are_repetitions(self):
        x, _, _, _, _ = self.weighted_problem()
        times = np.array([3, 1, 2, 1, 1])
        repeated = np.repeat(x, times, axis=0)
        ours = ref.weighted_batch_norm(x, np.repeat(times[:, None], 4, axis=1))
        np.testing.assert_allclose(ours.mean, repeated.mean(axis=(0, 2)))
        np.testing.assert_allclose(ours.var, repeated.var(axis=(0, 2)))
        np.testing.assert_allclose(
            ref.unbiased_weighted_variance(x, np.repeat(times[:, None], 4, axis=1)),
            repeated.var(axis=(0, 2), ddof=1),
        )

    def test_reliability_weights_are_free_of_scale_and_reduce_to_the_plain_variance(self):
        x, _, _, _, w = self.weighted_problem()
        once = ref.unbiased_weighted_variance(x, w, reliability=True)
        np.testing.assert_allclose(ref.unbiased_weighted_variance(x, 7 * w, reliability=True), once)
        equal = ref.unbiased_weighted_variance(x, np.ones((5, 4)), reliability=True)
        np.testing.assert_allclose(equal, x.var(axis=(0, 2), ddof=1))

    def test_reliability_correction_is_unbiased(self):
        rng = np.random.default_rng(0)
        x, w = rng.normal(0, 2, (4, 50_000)), np.array([[4.0], [1.0], [0.5], [0.1]])
        estimates = ref.unbiased_weighted_variance(x, np.broadcast_to(w, (4, 1)), reliability=True)
        assert estimates.mean() == pytest.approx(4, rel=0.02)

    def test_a_fully_masked_pool_is_no_nan(self):
        x = np.full((4, 3), np.nan)
        forward = ref.weighted_batch_norm(x, np.zeros(4))
        backward = ref.weighted_backward(np.ones((4, 3)), x, np.zeros(4))
        for value in (forward.y, forward.mean, forward.var, backward.dx, backward.dweights):
            np.testing.assert_array_equal(value, np.zeros_like(value))


class TestActivations:
    TORCH = {  # noqa: RUF012
        "relu": F.relu,
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "silu": F.silu,
        "gelu": F.gelu,
        "hardswish": F.hardswish,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "elu": F.elu,
        "mish": F.mish,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        None: lambda z: z * 1,
    }

    @pytest.mark.parametrize("name", [*ref.ACTIVATIONS, None])
    def test_value_and_derivative_are_torchs_kinks_included(self, name):
        z = torch.cat([torch.linspace(-800, 800, 41), torch.linspace(-9, 9, 73)]).double()
        z.requires_grad_()
        y = self.TORCH[name](z)
        (dz,) = torch.autograd.grad(y.sum(), z)
        z = z.detach().numpy()
        np.testing.assert_allclose(ref.activation(z, name), y.detach().numpy(), atol=1e-14)
        np.testing.assert_allclose(ref.activation_gradient(z, name), dz.numpy(), atol=1e-14)

    def test_unknown_name(self):
        for function in (ref.activation, ref.activation_gradient):
            with pytest.raises(ValueError, match="'swish' is none of"):
                function(np.zeros(3), "swish")

    @pytest.mark.parametrize("name", [*ref.ACTIVATIONS, None])
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_fused_gradients_against_finite_differences(self, name, frozen, with_residual):
        x, dy, gamma, beta = problem((4, 2, 3), 1)
        residual = np.random.default_rng(2).normal(size=x.shape) if with_residual else None
        options = {"activation": name, "eps": EPS}
        if frozen:
            options |= {"mean": np.array([0.5, 1]), "var": np.array([2.0, 0.5])}

        def loss(x, gamma, beta, residual=residual):
            return (dy * ref.fused(x, gamma, beta, residual=residual, **options)).sum()

        gradients = ref.fused_backward(dy, x, gamma, beta, residual=residual, **options)
        check(gradients, loss, x, gamma, beta)
        if with_residual:
            numeric = numeric_gradient(lambda v: loss(x, gamma, beta, v), residual)
            np.testing.assert_allclose(gradients.dresidual, numeric, rtol=1e-6, atol=1e-7)


class TestMoments:
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 99))
    def test_any_split_merges_to_the_whole(self, sizes, seed):
        x = np.random.default_rng(seed).normal(100, 3, (sum(sizes), 2, 3))
        merged = ref.merge_all([ref.moments(p) for p in np.split(x, np.cumsum(sizes)[:-1])])
        whole = ref.moments(x)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-11)
        np.testing.assert_array_equal(merged.count, whole.count)

    def test_an_empty_part_changes_nothing(self):
        part = ref.moments(np.random.default_rng(0).normal(size=(5, 2)))
        empty = ref.moments(np.zeros((0, 2)))
        for merged in (ref.merge(part, empty), ref.merge(empty, part)):
            np.testing.assert_array_equal(merged.mean, part.mean)
            np.testing.assert_array_equal(merged.m2, part.m2)

    def test_variance_of_many_one_and_no_values(self):
        x = np.random.default_rng(0).normal(size=(5, 2))
        m = ref.moments(x)
        np.testing.assert_allclose(ref.variance(m, unbiased=False), x.var(axis=0))
        np.testing.assert_allclose(ref.variance(m, unbiased=True), x.var(axis=0, ddof=1))
        for few in (x[:1], x[:0]):
            for unbiased in (False, True):
                np.testing.assert_array_equal(ref.variance(ref.moments(few), unbiased=unbiased), [0, 0])


class TestStatistics:
    def batches(self, sizes=(6, 6, 6, 6), seed=0):
        rng = np.random.default_rng(seed)
        return [rng.normal(rng.normal(0, 3), 2, (n, 2, 3)) for n in sizes]

    def test_moving_average_is_torchs(self):
        layer = torch.nn.BatchNorm1d(2, momentum=0.3).double()
        for batch in self.batches():
            layer(torch.from_numpy(batch))
        ours = ref.running_statistics(self.batches(), 0.3)
        np.testing.assert_allclose(ours.mean, layer.running_mean.numpy())
        np.testing.assert_allclose(ours.var, layer.running_var.numpy())
        biased = ref.running_statistics(self.batches(), 0.3, unbiased=False)
        assert (biased.var < ours.var).all()

    def test_cumulative_average_is_torchs_with_momentum_none(self):
        layer = torch.nn.BatchNorm1d(2, momentum=None).double()
        for batch in self.batches():
            layer(torch.from_numpy(batch))
        ours = ref.cumulative_statistics(self.batches())
        np.testing.assert_allclose(ours.mean, layer.running_mean.numpy())
        np.testing.assert_allclose(ours.var, layer.running_var.numpy())

    def test_debiased_is_a_weighted_mean_whose_weights_sum_to_one(self):
        batches, p = self.batches(), 0.3
        weights = np.array([p * (1 - p) ** (len(batches) - 1 - i) for i in range(len(batches))])
        means = np.stack([b.mean(axis=(0, 2)) for b in batches])
        variances = np.stack([b.var(axis=(0, 2), ddof=1) for b in batches])
        ours = ref.debiased_statistics(batches, p)
        np.testing.assert_allclose(ours.mean, weights @ means / weights.sum())
        np.testing.assert_allclose(ours.var, weights @ variances / weights.sum())
        first = ref.debiased_statistics(batches[:1], p, unbiased=False)
        np.testing.assert_allclose(first.var, batches[0].var(axis=(0, 2)))

    @given(st.floats(0.01, 0.99), st.integers(1, 20))
    def test_ghost_updates_of_equal_decay(self, momentum, ghosts):
        running = 5.0
        for _ in range(ghosts):
            running = ref.moving_average(running, 2.0, ref.ghost_momentum(momentum, ghosts))
        assert running == pytest.approx(ref.moving_average(5.0, 2.0, momentum))

    def test_line_10_for_equal_batches_is_the_papers(self):
        batches, m = self.batches(), 6 * 3
        ours = ref.ioffe_statistics(batches)
        means, variances = zip(*[(b.mean(axis=(0, 2)), b.var(axis=(0, 2))) for b in batches], strict=True)
        np.testing.assert_allclose(ours.mean, np.mean(means, axis=0))
        np.testing.assert_allclose(ours.var, m / (m - 1) * np.mean(variances, axis=0))

    def test_line_10_for_unequal_batches_is_unbiased_within_batches(self):
        rng = np.random.default_rng(0)
        batches = [rng.normal(0, 3, (n, 20_000)) for n in (5, 2, 3, 1)]
        assert ref.ioffe_statistics(batches).var.mean() == pytest.approx(9, rel=0.02)

    def test_pooled_is_the_concatenated_data(self):
        batches = self.batches((8, 2, 1))
        whole = np.concatenate(batches)
        for unbiased in (False, True):
            ours = ref.pooled_statistics(batches, unbiased=unbiased)
            np.testing.assert_allclose(ours.mean, whole.mean(axis=(0, 2)))
            np.testing.assert_allclose(ours.var, whole.var(axis=(0, 2), ddof=int(unbiased)))

    def test_pooled_has_the_variance_between_batches_and_line_10_has_not(self):
        batches = [b + 10 * i for i, b in enumerate(self.batches())]
        pooled = ref.pooled_statistics(batches, unbiased=True).var
        assert (pooled > 5 * ref.ioffe_statistics(batches).var).all()

    @pytest.mark.parametrize(("shape", "axis"), SHAPES)
    def test_example_weighing_between_population_and_example(self, shape, axis):
        x, _, gamma, beta = problem(shape, axis)
        mean, var = np.linspace(-1, 1, shape[axis]), np.linspace(0.5, 2, shape[axis])
        none = ref.weigh_example(x, mean, var, 0.0, gamma, beta, axis=axis)
        expected = ref.inference(x, mean, var, gamma, beta, axis=axis).y
        np.testing.assert_allclose(none, expected, atol=1e-12)
        own = ref.weigh_example(x, mean, var, 1.0, gamma, beta, axis=axis)
        for i in range(len(x)):
            example = ref.batch_norm(x[i : i + 1], gamma, beta, axis=axis).y
            np.testing.assert_allclose(own[i : i + 1], example, atol=1e-6)

    def test_example_weighing_by_hand(self):
        # E = 0, Var = 1; the example's space is {1, 3}: mean 2, second moment 5.
        y = ref.weigh_example([[[1.0, 3.0]]], [0.0], [1.0], 0.5, eps=0.0)
        np.testing.assert_allclose(y, [[[0, 2 / np.sqrt(2)]]])

    def test_adaptation_between_source_and_target(self):
        source = ref.Statistics(np.array([0.0]), np.array([1.0]))
        target = ref.Statistics(np.array([4.0]), np.array([3.0]))
        mixed = ref.adapt_statistics(source, target, prior=16, samples=48)
        np.testing.assert_allclose([mixed.mean, mixed.var], [[3.0], [2.5]])
        new = ref.adapt_statistics(source, target, prior=0, samples=48)
        np.testing.assert_array_equal([new.mean, new.var], [target.mean, target.var])
        old = ref.adapt_statistics(source, target, prior=np.inf, samples=48)
        np.testing.assert_array_equal([old.mean, old.var], [source.mean, source.var])


class TestFolding:
    def affine(self, channels):
        rng = np.random.default_rng(0)
        gamma = rng.normal(size=channels)
        gamma[0] = -gamma[0]
        return ref.inference_affine(
            rng.normal(size=channels), rng.uniform(0.1, 2, channels), gamma,
            rng.normal(size=channels), eps=EPS,
        )  # fmt: skip

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_convolution_then_batch_norm(self, transposed, groups, bias):
        kind = torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d
        conv = kind(4, 6, 3, padding=1, groups=groups, bias=bias).double().requires_grad_(False)
        x, affine = torch.randn(2, 4, 9, dtype=torch.float64), self.affine(6)
        expected = ref.along(affine.scale, 3) * conv(x).numpy() + ref.along(affine.shift, 3)
        given_bias = conv.bias.numpy() if bias else None
        folded = ref.fold_after(conv.weight.numpy(), given_bias, affine, transposed=transposed, groups=groups)
        run = F.conv_transpose1d if transposed else F.conv1d
        ours = run(x, torch.from_numpy(folded.weight), torch.from_numpy(folded.bias),
                   padding=1, groups=groups)  # fmt: skip
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_batch_norm_then_convolution_with_the_padding_that_keeps_it_exact(self, groups):
        conv = torch.nn.Conv1d(4, 6, 3, groups=groups).double().requires_grad_(False)
        x, affine = torch.randn(2, 4, 9, dtype=torch.float64), self.affine(4)
        normalized = ref.along(affine.scale, 3) * x.numpy() + ref.along(affine.shift, 3)
        expected = conv(F.pad(torch.from_numpy(normalized), (1, 1))).numpy()
        folded = ref.fold_before(conv.weight.numpy(), conv.bias.numpy(), affine, groups=groups)
        border = np.broadcast_to(ref.along(ref.padding_value(affine), 3), (2, 4, 1))
        padded = torch.from_numpy(np.concatenate([border, x.numpy(), border], axis=2))
        ours = F.conv1d(padded, torch.from_numpy(folded.weight), torch.from_numpy(folded.bias), groups=groups)
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)

    def test_zero_padding_is_off_by_the_shift(self):
        # Scale 2, shift 5, kernel 1-2-1: the border is off by 5.
        affine = ref.Affine(np.array([2.0]), np.array([5.0]))
        folded = ref.fold_before([[[1.0, 2, 1]]], None, affine)
        x = torch.ones(1, 1, 4, dtype=torch.float64)
        kernel = torch.tensor([[[1.0, 2, 1]]], dtype=torch.float64)
        weight, bias = torch.from_numpy(folded.weight), torch.from_numpy(folded.bias)
        off = F.conv1d(x, weight, bias, padding=1) - F.conv1d(2 * x + 5, kernel, padding=1)
        np.testing.assert_allclose(off.numpy(), [[[5, 0, 0, 5]]])
