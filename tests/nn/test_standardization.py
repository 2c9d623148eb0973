"""Standardize is scikit-learn's StandardScaler, in one pass, and invertible."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

import batchnorm as bn
from batchnorm.errors import InputError


def data(n=50, features=4):
    """Features of very different means and spreads; the last one is constant."""
    x = torch.randn(n, features, dtype=torch.float64)
    return x * torch.tensor([1.0, 1e-3, 1e4, 0.0]) + torch.tensor([0.0, 1e4, -5.0, 0.1])


class TestFit:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_scikit_learn(self, dtype):
        x = data().to(dtype)
        layer, theirs = bn.Standardize(4).fit(x), StandardScaler().fit(x.double().numpy())
        np.testing.assert_allclose(layer.mean, theirs.mean_, rtol=1e-14)
        np.testing.assert_allclose(layer.var[:3], theirs.var_[:3], rtol=1e-10)
        assert layer.count == theirs.n_samples_seen_
        expected = theirs.transform(x.double().numpy())
        assert layer(x).dtype == dtype
        np.testing.assert_allclose(layer(x), expected, rtol=1e-6, atol=1e-9)

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    def test_does_not_depend_on_how_the_data_are_cut(self, sizes):
        x = data(sum(sizes))
        whole, pieces = bn.Standardize(4).fit(x), bn.Standardize(4).fit(iter(x.split(sizes)))
        one_by_one = bn.Standardize(4)
        for piece in x.split(sizes):
            one_by_one.partial_fit(piece)
        for layer in (pieces, one_by_one):
            torch.testing.assert_close(layer.mean, whole.mean, rtol=1e-13, atol=1e-11)
            torch.testing.assert_close(layer(x), whole(x), rtol=1e-6, atol=1e-6)
            assert torch.equal(layer(x)[:, 3].round(decimals=12), torch.zeros_like(x[:, 3]))

    def test_takes_the_inputs_of_pairs_and_forgets_what_it_knew(self):
        x = data()
        layer = bn.Standardize(4).fit(x + 100).fit((part, part.sum(1)) for part in x.split(20))
        torch.testing.assert_close(layer.mean, x.mean(0))
        assert layer.count == 50

    @pytest.mark.parametrize("axis", [1, -1])
    def test_feature_axis(self, axis):
        rows = data(60)
        x = rows.reshape(3, 20, 4).movedim(2, axis)
        layer = bn.Standardize(4, feature_axis=axis).fit(x)
        assert layer.count == 60
        expected = bn.Standardize(4).fit(rows)(rows)
        torch.testing.assert_close(layer(x).movedim(axis, 2).reshape(60, 4), expected)

    def test_statistics_are_of_the_values_not_of_their_squares(self):
        x = torch.randn(10_000, 1) * 0.92**0.5 + 1e4
        assert bn.Standardize(1).fit(x).var.item() == pytest.approx(0.92, rel=0.05)


class TestTransform:
    def test_output_has_mean_zero_and_biased_variance_one(self):
        x = data()[:, :3]
        y = bn.Standardize(3).fit(x)(x)
        torch.testing.assert_close(y.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-7)
        torch.testing.assert_close(y.var(0, correction=0), torch.ones(3).double())

    def test_inverse_gives_the_input_back_constants_included(self):
        x = data()
        layer = bn.Standardize(4).fit(x)
        torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=1e-13, atol=1e-13)
        assert not layer(x)[:, 3].abs().gt(1e-15).any()

    @pytest.mark.parametrize("constant", [0.0, 0.1, -1e30, 1e-30])
    def test_constants_in_many_unequal_batches(self, constant):
        x = torch.full((100, 1), constant, dtype=torch.float64)
        layer = bn.Standardize(1).fit(x.split([1, 2, 3, 5, 7, 11, 13, 17, 19, 22]))
        y = layer(x)
        assert y.abs().max() <= 1e-15 * abs(constant)
        assert torch.equal(layer.inverse(torch.zeros(1, 1, dtype=torch.float64))[0], layer.mean)

    @given(st.floats(-1e6, 1e6).filter(bool), st.lists(st.integers(1, 9), min_size=2, max_size=6))
    def test_the_scale_of_a_constant_is_one_whatever_is_lost_in_rounding(self, constant, sizes):
        layer = bn.Standardize(1)
        for size in sizes:
            layer.partial_fit(torch.full((size, 1), constant, dtype=torch.float64))
        unseen = torch.tensor([[2 * constant]], dtype=torch.float64)
        assert layer(unseen).item() == pytest.approx(constant)

    def test_a_feature_that_varies_by_its_last_bit_is_a_constant(self):
        x = torch.tensor([[0.1], [0.1 + 2**-56], [0.1]], dtype=torch.float64)
        assert x.std() > 0
        assert bn.Standardize(1).fit(x)(x + 1).flatten().tolist() == pytest.approx([1.0] * 3)

    def test_a_small_spread_is_not_a_constant(self):
        x = torch.tensor([[1e6], [1e6 + 1e-6]], dtype=torch.float64)
        assert bn.Standardize(1).fit(x)(x).flatten().tolist() == pytest.approx([-1, 1])

    def test_identity_before_fit(self):
        x = data().float()
        assert torch.equal(bn.Standardize(4)(x), x)

    def test_integers_become_the_default_dtype(self):
        x = torch.tensor([[1, 5], [3, 9]])
        assert torch.equal(bn.Standardize(2).fit(x)(x), torch.tensor([[-1.0, -1], [1, 1]]))

    def test_gradient_flows_to_the_input(self):
        layer = bn.Standardize(4).fit(data())
        x = data(3).requires_grad_()
        dy = torch.randn(3, 4, dtype=torch.float64)
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        scale = torch.cat([layer.var[:3].sqrt(), torch.ones(1).double()])
        torch.testing.assert_close(dx, dy / scale)

    def test_function_is_fit_then_transform(self):
        x = data().float()
        assert torch.equal(bn.standardize(x), bn.Standardize(4).fit(x)(x))
        assert torch.equal(bn.standardize(x.T, feature_axis=0), bn.standardize(x).T)


class TestLife:
    def test_state_and_copies(self):
        x = data()
        layer, twin = bn.Standardize(4).fit(x), bn.Standardize(4)
        twin.load_state_dict(layer.state_dict())
        assert list(layer.state_dict()) == ["mean", "var", "count"]
        for other in (twin, copy.deepcopy(layer)):
            assert torch.equal(other(x), layer(x))
            assert torch.equal(other.count, layer.count)

    def test_statistics_stay_exact_in_a_network_of_half_precision(self):
        net = torch.nn.Sequential(bn.Standardize(4).fit(data()), torch.nn.Linear(4, 2))
        mean, var = net[0].mean.clone(), net[0].var.clone()
        net.half().float().to("cpu")
        assert torch.equal(net[0].mean, mean)
        assert torch.equal(net[0].var, var)
        assert net[1].weight.dtype == torch.float32

    def test_training_changes_nothing(self):
        layer = bn.Standardize(4).fit(data())
        before = layer.mean.clone()
        layer.train()(data() + 3)
        assert torch.equal(layer.mean, before)

    def test_repr(self):
        assert repr(bn.Standardize(4, feature_axis=-1)) == "Standardize(4, feature_axis=-1)"


class TestErrors:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("partial", [True, False])
    def test_non_finite_input_names_the_feature_and_changes_nothing(self, value, partial):
        layer = bn.Standardize(4).fit(data())
        before, x = layer.mean.clone(), data()
        x[17, 2] = value
        with pytest.raises(InputError, match=r"features \[2\]"):
            layer.partial_fit(x) if partial else layer.fit([data(), x])
        assert torch.equal(layer.mean, before)
        assert layer.count == 50

    def test_the_bad_batch_is_named(self):
        with pytest.raises(InputError, match="batch 1"):
            bn.Standardize(4).fit([data(), data()[:, :3]])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: bn.Standardize(0), "num_features=0"),
            (lambda: bn.Standardize(4)(torch.zeros(2, 3)), r"shape \(2, 3\); expected 4 features"),
            (lambda: bn.Standardize(4)(torch.zeros(4)), r"shape \(4,\)"),
            (lambda: bn.Standardize(4).inverse(torch.zeros(2, 3)), "Standardize.inverse"),
            (lambda: bn.Standardize(4).fit([]), "no data"),
            (lambda: bn.Standardize(4).fit(torch.zeros(0, 4)), "no data"),
            (lambda: bn.Standardize(4).fit([{"x": data()}]), "type dict"),
            (lambda: bn.standardize(torch.tensor([[torch.nan]])), "not finite"),
            (lambda: bn.standardize(torch.zeros(3)), "channel_axis=1"),
        ],
    )
    def test_bad_input(self, call, message):
        with pytest.raises(InputError, match=message):
            call()
