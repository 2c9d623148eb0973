"""fold(net)(x) = net(x), or a refusal that says why."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Calls, mobilenet, randomize, resnet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.surgery.folding import fold


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def norms(net):
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def kept(result):
    return {item.layer: item.reason for item in result.certificate.kept}


CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


@settings(max_examples=60, deadline=None)
@given(
    axes=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 3, 6]),
    per_group=st.integers(1, 2),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 1000),
)
def test_any_convolution(axes, transposed, groups, per_group, stride, padding, dilation, bias, affine, eps, seed):
    torch.manual_seed(seed)
    kind = CONVOLUTIONS[axes][1 if transposed else 0]
    outputs = groups * per_group
    conv = kind(6, outputs, 2, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias)
    bn = CONVOLUTIONS[axes][2](outputs, eps=eps, affine=affine)
    net = randomize(nn.Sequential(conv, bn), seed).double().eval()
    x = torch.randn(2, 6, *[5] * axes, dtype=torch.float64)
    result = fold(net, x)
    assert not norms(result.model)
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_residual_networks_fold_whole_and_the_argument_stays(make):
    net = randomize(make()).eval()
    before, modules = state(net), list(net.modules())
    x = torch.randn(2, 3, 16, 16)
    rng = torch.get_rng_state()
    result = fold(net, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert not norms(result.model)
    assert len(result.certificate.folded) == len(norms(net))
    assert result.certificate.relative <= 1e-5
    expected, actual = net(x), result.model(x)
    assert (expected - actual).abs().max() <= 1e-5 * expected.abs().max()
    assert identical(before, state(net))
    assert all(a is b for a, b in zip(modules, net.modules(), strict=True))


def test_the_certificate_tells_the_true_difference():
    net = randomize(resnet()).eval()
    x = torch.randn(2, 3, 16, 16)
    result = fold(net, x)
    differences = result.certificate.differences
    own = [d for d in differences if (d.inputs, d.dtype) == ("example", "float32")]
    with torch.no_grad():
        difference = (net(x) - result.model(x)).abs().max().item()
    assert [d.absolute for d in own] == [difference]
    exact = [d for d in differences if d.dtype == "float64 unrounded"]
    assert exact
    assert max(d.relative for d in exact) < 1e-12
    assert "3.bn1 -> 3.conv1" in str(result.certificate)
    assert result.certificate.to_dict()["folded"][0] == {"layer": "1", "into": "0"}


def test_a_fold_that_differs_raises(monkeypatch):
    from batchnorm.surgery import absorption

    wrong = absorption.affine_of
    monkeypatch.setattr(absorption, "affine_of", lambda layer: (wrong(layer)[0], wrong(layer)[1] * 1.0001))
    net = randomize(resnet()).eval()
    before = state(net)
    with pytest.raises(SurgeryError, match="differs by"):
        fold(net, torch.randn(2, 3, 16, 16))
    assert identical(before, state(net))


def test_chains_of_norms_and_identities():
    net = nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False))
    net = randomize(net).eval()
    result = fold(net, torch.randn(6, 4))
    assert [item.into for item in result.certificate.folded] == ["0", "0"]
    assert "0.bias" in result.model.state_dict()
    assert set(result.model.state_dict()) == {"0.weight", "0.bias"}


def test_one_rounding_of_float64_arithmetic():
    net = randomize(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))).eval()
    layer, bn = net
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = (layer.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    model = fold(net, torch.randn(6, 4)).model
    assert torch.equal(model[0].weight, (layer.weight.double() * scale[:, None]).float())
    assert torch.equal(model[0].bias, shift.float())
    assert model[0].weight.requires_grad


def test_nested_outputs_and_keyword_inputs():
    def forward(self, x, *, scale=None):
        y = self.bn(self.conv(x))
        if scale is not None:
            y = y * scale
        return {"maps": (y, [y.mean()]), "size": 3}

    net = Calls(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    result = fold(net, {"x": x, "scale": torch.tensor(2.0)})
    paths = {d.output for d in result.certificate.differences}
    assert paths == {"output['maps'][0]", "output['maps'][1][0]"}
    assert fold(net, (x,)).certificate.folded[0].into == "conv"


def test_python_that_depends_on_shapes_is_followed_on_the_example():
    def forward(self, x):
        if x.shape[2] > 4:
            x = self.bn(self.conv(x))
        for _ in range(int(x.shape[1])):
            x = x + 1
        return self.bn2(self.conv2(x))

    net = Calls(
        forward,
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        conv2=nn.ConvTranspose2d(4, 4, 3, groups=2),
        bn2=nn.BatchNorm2d(4),
    )
    result = fold(net, torch.randn(2, 3, 6, 6))
    assert result.certificate.captured_by == "torch.fx on the example's shapes"
    assert {(i.layer, i.into) for i in result.certificate.folded} == {
        ("bn", "conv"),
        ("bn2", "conv2"),
    }


def test_data_dependent_python_is_refused():
    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x

    net = Calls(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    with pytest.raises(SurgeryError, match=r"cannot be captured.*torch\.export"):
        fold(net, torch.randn(2, 3, 6, 6))


def test_values_that_are_written_into():
    """By x[...] = y, which torch.fx does not record: the layer behind is kept, the one before it folds."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        y[:, 0] = self.conv2(y[:, :1])[:, 0]
        return self.bn2(y) if len(y) else y

    net = Calls(forward, conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3), conv2=nn.Conv2d(1, 1, 1), bn2=nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 6, 6)
    result = fold(net, x)
    assert [item.layer for item in result.certificate.folded] == ["bn"]
    assert [item.layer for item in result.certificate.kept] == ["bn2"]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)


def conv_bn(**more):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), **more}


TRAPS = {
    "shared convolution": (
        lambda self, x: self.bn(self.conv(x)) + self.conv(x),
        conv_bn(),
        "used 2 times",
    ),
    "shared norm": (
        lambda self, x: self.bn(self.conv(x)) + self.bn(x),
        conv_bn(),
        "used 2 times",
    ),
    "output also elsewhere": (
        lambda self, x: (lambda y: self.bn(y) + torch.tanh(y))(self.conv(x)),
        conv_bn(),
        "also goes to a call of tanh",
    ),
    "output is returned": (
        lambda self, x: (lambda y: (self.bn(y), y))(self.conv(x)),
        conv_bn(),
        "also goes to the network's output",
    ),
    "changed in place between": (
        lambda self, x: (lambda y: (y.mul_(2), self.bn(y))[1])(self.conv(x)),
        conv_bn(),
        "also goes to a call of mul",
    ),
    "a view of it changed in place": (
        lambda self, x: (lambda y: (y.view(-1).mul_(2), self.bn(y))[1])(self.conv(x)),
        conv_bn(),
        "also goes to a call of view",
    ),
    "relu between": (
        lambda self, x: self.bn(F.relu(self.conv(x))),
        conv_bn(),
        "comes from a call of relu",
    ),
    "zero gamma before padding": (lambda self, x: self.conv(self.bn(x)), conv_bn(), "gamma is 0"),
    "weights in a call": (
        lambda self, x: self.bn(F.conv2d(x, self.conv.weight)),
        conv_bn(),
        "call of conv2d",
    ),
    "weights read elsewhere": (
        lambda self, x: self.bn(self.conv(x)) + self.conv.weight.mean(),
        conv_bn(),
        "also read by",
    ),
    "gamma read elsewhere": (
        lambda self, x: self.bn(self.conv(x)) * self.bn.weight.sum(),
        conv_bn(),
        "also read by",
    ),
    "not on the path": (lambda self, x: self.conv(x), conv_bn(), "not called"),
    "linear over sequences": (
        lambda self, x: self.bn(self.conv(x.flatten(1, 2))),
        {"conv": nn.Linear(6, 18), "bn": nn.BatchNorm1d(18)},
        "axis 1 of a tensor with 3 axes",
    ),
    "convolution without a batch": (
        lambda self, x: self.bn(self.conv(x[0, 0])),
        {"conv": nn.Conv1d(6, 6, 1), "bn": nn.BatchNorm1d(6)},
        "axis 1 of a tensor with 2 axes",
    ),
    "batch statistics": (
        lambda self, x: self.bn(self.conv(x)),
        {"conv": nn.Conv2d(3, 3, 3), "bn": nn.BatchNorm2d(3, track_running_stats=False)},
        "statistics of each batch",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_kept_with_the_reason(trap):
    forward, layers, reason = TRAPS[trap]
    net = Calls(forward, **copy.deepcopy(layers))
    x = torch.randn(2, 3, 6, 6)
    result = fold(net, x)
    assert not result.certificate.folded
    assert reason in kept(result)["bn"]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-6, atol=1e-6)


def test_own_forward_methods_are_left_alone():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    for kind in (Doubling, Standardized):
        net = randomize(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4))).eval()
        assert "1" in kept(fold(net, torch.randn(2, 3, 6, 6)))
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    plain = net[0].forward
    net[0].forward = lambda x: -plain(x)
    assert "1" in kept(fold(net, torch.randn(2, 3, 6, 6)))


def test_hooks_stop_the_fold():
    x = torch.randn(2, 3, 6, 6)
    for place in (0, 1):
        net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
        net[place].register_forward_hook(lambda module, args, output: 2 * output)
        result = fold(net, x)
        assert "hooks" in kept(result)["1"]
        torch.testing.assert_close(result.model(x), net(x), rtol=1e-6, atol=1e-6)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    net = randomize(net).eval()
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert "the hooks of '0'" in kept(fold(net, x))["1"]
    assert all(isinstance(value, torch.Tensor) for value in seen)


def test_computed_weights():
    x = torch.randn(2, 3, 6, 6)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    net = randomize(nn.Sequential(conv, nn.BatchNorm2d(4))).eval()
    assert "parametrization" in kept(fold(net, x))["1"]
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    assert fold(net, x).certificate.folded


def test_tied_weights_are_untied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, nn.BatchNorm1d(4), nn.ReLU(), second, nn.BatchNorm1d(4))
    net = randomize(net).eval()
    result = fold(net, torch.randn(6, 4))
    assert len(result.certificate.folded) == 2
    assert result.model[0].weight is not result.model[3].weight
    assert net[0].weight is net[3].weight


def test_dead_channels_and_zero_gamma():
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        net[1].running_var[1] = 1e-40
        net[1].running_mean[1] = 5.0
    x = torch.randn(2, 3, 6, 6)
    result = fold(net, x)
    assert result.certificate.folded
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-3)
    assert result.model[0].weight[0].count_nonzero() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_statistics_that_are_no_statistics(value):
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    net[1].running_mean[0] = value if not value < 0 else 0.0
    net[1].running_var[0] = value if value < 0 else 1.0
    assert "not finite" in kept(fold(net, torch.randn(2, 3, 6, 6)))["1"]


def test_weights_that_would_overflow():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1e-12)).half().eval()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[1].running_var.zero_()
    assert "overflow torch.float16" in kept(fold(net, torch.zeros(2, 4).half()))["1"]


def test_training_mode_is_an_error_with_the_name():
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    net[1].train()
    with pytest.raises(SurgeryError, match=r"'1'.*eval\(\).*freeze"):
        fold(net, torch.randn(2, 3, 6, 6))


def test_what_is_no_network_or_has_nothing_to_fold():
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        fold(torch.sin, torch.randn(2))
    with pytest.raises(SurgeryError, match="no batch normalization"):
        fold(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(SurgeryError, match="lazy"):
        fold(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)).eval(), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"\(2, 5\)"):
        fold(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(2, 5))
    with pytest.raises(SurgeryError, match=r"\.module"):
        fold(nn.DataParallel(nn.Linear(3, 3)), torch.randn(2, 3))


def test_compiled_networks_are_unwrapped():
    inner = randomize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())).eval()
    x = torch.randn(5, 3)
    whole = fold(torch.compile(inner, backend="eager"), x)
    assert [i.layer for i in whole.certificate.folded] == ["1"]
    nested = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(4, 2)).eval()
    part = fold(nested, x)
    assert [i.into for i in part.certificate.folded] == ["0._orig_mod.0"]
    torch.testing.assert_close(part.model(x), nested(x))


def test_bfloat16():
    net = randomize(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).bfloat16().eval()
    result = fold(net, torch.randn(16, 8).bfloat16())
    assert result.certificate.folded
    assert result.model[0].weight.dtype is torch.bfloat16


def test_a_cast_between_is_not_crossed():
    net = Calls(
        lambda self, x: self.bn(self.conv(x.bfloat16()).float()),
        conv=nn.Conv2d(3, 4, 3).bfloat16(),
        bn=nn.BatchNorm2d(4),
    )
    assert "call of float" in kept(fold(net, torch.randn(2, 3, 6, 6)))["bn"]


def test_results_are_data():
    result = fold(randomize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval(), torch.randn(2, 3))
    assert dataclasses.is_dataclass(result.certificate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.certificate.tolerance = 1.0


def test_state_that_forward_changes_stays():
    def forward(self, x):
        self.calls += 1
        self.count += 1
        return self.bn(self.conv(x))

    net = Calls(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    net.calls = 0
    net.register_buffer("count", torch.zeros(()))
    assert fold(net, torch.randn(2, 3, 6, 6)).certificate.folded
    assert (net.calls, net.count.item()) == (0, 0)


class Skip(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = bn.BatchNorm2d(3, activation=activation, negative_slope=0.3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.last(self.norm(y) if skip is None else self.norm(y, skip))


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
def test_fused_activations_stay_behind(activation):
    net = randomize(Skip(activation)).eval()
    x = torch.randn(2, 3, 6, 6)
    result = fold(net, x)
    assert [(i.layer, i.into) for i in result.certificate.folded] == [("norm", "conv")]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-5)
    result = fold(net, (x, x))
    assert [(i.layer, i.into) for i in result.certificate.folded] == [("norm", "conv")]
    torch.testing.assert_close(result.model(x, x), net(x, x), rtol=1e-5, atol=1e-5)


def test_batch_statistics_by_choice_are_kept():
    net = randomize(nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, source="batch"))).eval()
    assert "statistics of each batch" in kept(fold(net, torch.randn(5, 3)))["1"]


def test_weights_computed_by_hooks_are_an_error_that_says_how_to_mend_it():
    conv = nn.Conv2d(3, 4, 3)
    nn.utils.prune.l1_unstructured(conv, "weight", amount=0.5)
    net = randomize(nn.Sequential(conv, nn.BatchNorm2d(4))).eval()
    net(torch.randn(1, 3, 4, 4))
    with pytest.raises(SurgeryError, match=r"0\.weight is computed.*prune\.remove"):
        fold(net, torch.randn(1, 3, 4, 4))
    nn.utils.prune.remove(conv, "weight")
    assert fold(net, torch.randn(1, 3, 4, 4)).certificate.folded


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({"pool": "sequence"}, True),
        ({"pool": "sequence", "batch_first": False, "ghost_size": 2, "channel_groups": 2}, True),
        ({"pool": "frame", "max_steps": 3}, False),
        ({"pool": "sequence", "domains": 2}, False),
    ],
)
def test_pools_fold_where_inference_is_one_affine_map(options: dict, folds: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), bn.BatchNorm1d(6, **options), nn.ReLU())
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 7, 5)
    result = bn.fold(net.eval(), x)
    assert len(result.certificate.folded) == folds
    torch.testing.assert_close(result.model(x), net(x))


def test_a_layer_that_is_given_lengths_is_kept() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(5, 6, 1), bn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x), lengths=lengths)

    net = Masked().eval()
    result = bn.fold(net, (torch.randn(3, 5, 7), torch.tensor([7, 3, 1])))
    assert [kept.layer for kept in result.certificate.kept] == ["norm"]


def test_a_network_that_multiplies_rounding_folds_as_close_as_it_is_to_itself():
    net = nn.Sequential(nn.Conv1d(1, 4, 1), nn.BatchNorm1d(4), Calls(lambda self, x: torch.sin(1e5 * x))).eval()
    result = fold(net, torch.randn(2, 1, 50))
    assert result.certificate.rounding > 1e-4
    assert result.certificate.relative <= max(d.tolerance for d in result.certificate.differences)


def test_a_refusal_names_the_layer_where_the_difference_begins(monkeypatch):
    monkeypatch.setattr("batchnorm.surgery.folding.affine_of", lambda layer: (torch.ones(4),) * 2)
    monkeypatch.setattr("batchnorm.surgery.absorption.affine_of", lambda layer: (torch.full((4,), 2.0).double(),) * 2)
    net = nn.Sequential(nn.ReLU(), nn.Conv1d(1, 4, 1), nn.BatchNorm1d(4), nn.ReLU()).eval()
    with pytest.raises(SurgeryError, match=r"begins at the output of '[12]'\. The original is well-conditioned"):
        fold(net, torch.randn(2, 1, 50))


class Collecting(nn.Module):
    """Its forward reads what its own hooks collect, and installs them once."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.collected, self.installed = [], False

    def forward(self, x):
        if not self.installed:
            for layer in self.layers[2:]:
                layer.register_forward_hook(lambda module, args, output: self.collected.append(output))
            self.installed = True
        self.collected.clear()
        self.layers(x)
        return self.collected[0] + self.collected[1]


def test_networks_that_need_their_own_hooks_fold():
    net = Collecting()
    net.collected = collected = []
    x = torch.randn(2, 3, 5, 5)

    class Shared(list):
        def __deepcopy__(self, memo):
            return self

    net.collected = Shared(collected)
    randomize(net).eval()(x)
    result = fold(net, x)
    assert [item.into for item in result.certificate.folded] == ["layers.0"]
    torch.testing.assert_close(result.model(x), net(x))


def test_tensors_that_a_forward_makes_of_numbers_are_no_obstacle():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            if x.shape[-1] > 2 and not x.is_sparse and x.layout is torch.strided:  # so that the trace needs the example
                x = x * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
            return self.norm(self.conv(x))

    net, x = randomize(Scaled()).eval(), torch.randn(2, 3, 4, 4)
    result = fold(net, x)
    assert [item.into for item in result.certificate.folded] == ["conv"]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_call_that_a_forward_tries_and_that_fails_is_no_obstacle():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    class Trying(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.act = Inner(), nn.LeakyReLU()

        def forward(self, x):
            if x.shape[1] != 3:  # so that the trace needs the example
                return x
            for layer in (self.inner, nn.ReLU() if x is None else self.act):
                try:
                    x = layer(x, lengths=None)
                except TypeError:
                    x = layer(x)
            return x

    net, x = randomize(Trying()).eval(), torch.randn(2, 3, 4, 4)
    result = fold(net, x)
    assert [item.into for item in result.certificate.folded] == ["inner.conv"]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_captured_prints_nothing(capfd):
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.norm(x)
            return y * 2 if y.mean() > 0 else y

    with pytest.raises(SurgeryError, match="cannot be captured"):
        fold(Deciding().eval(), torch.randn(4, 3))
    assert capfd.readouterr() == ("", "")


class Sliced(nn.Module):
    """A forward that makes modules as it goes: slices of a Sequential, an activation, a pool."""

    def __init__(self, by_shape):
        super().__init__()
        conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.features = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.by_shape = by_shape

    def forward(self, x):
        if self.by_shape and x.shape[1] != 3:  # so that the trace needs the example
            return x
        for start, end in ((0, 2), (2, None)):
            x = self.features[start:end](x)
        return nn.AvgPool2d(2)(nn.ReLU()(self.last(nn.ReLU()(x))))


@pytest.mark.parametrize("by_shape", [True, False])
def test_modules_that_a_forward_makes_are_followed(by_shape):
    torch.manual_seed(0)
    net, x = randomize(Sliced(by_shape)).eval(), torch.randn(2, 3, 9, 9)
    result = fold(net, x)
    assert [item.into for item in result.certificate.folded] == ["features.0", "features.3", "last.0"]
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)
    assert bn.summary(net, x).layers[1].followed_by == ("a call of relu",)
    fast = bn.accelerate(copy.deepcopy(net), x)
    assert list(fast.report.fused) == (["features.1"] if by_shape else ["features.1", "features.4", "last.1"])


class OwnLinear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class Centered(OwnLinear):
    """Scaling its weights scales its output, but it does not compute W x + b."""

    def forward(self, input):
        return super().forward(input - input.mean(-1, keepdim=True))


@pytest.mark.parametrize(("kind", "bias", "folds"), [(OwnLinear, True, 1), (OwnLinear, False, 1), (Centered, True, 0)])
def test_a_norm_before_a_linear_class_of_its_own(kind, bias, folds):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.ReLU(), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), kind(4, 3, bias=bias))
    net, x = randomize(net).eval(), torch.randn(2, 4, 6, 6)
    result = fold(net, x)
    assert [item.into for item in result.certificate.folded] == ["4"] * folds
    assert type(result.model[4]) is kind
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-4, atol=1e-5)
