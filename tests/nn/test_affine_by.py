"""Gamma and beta of each domain, or of each time step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
}


def varied(layer):
    """The layer with random gamma and beta."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer


def of_domain(layer, k):
    """A layer of torch.nn with the state of one domain."""
    alone = nn.BatchNorm2d(layer.num_features)
    names = ("weight", "bias") if not k else (f"weight_{k}", f"bias_{k}")
    state = {"weight": getattr(layer, names[0]), "bias": getattr(layer, names[1])}
    state |= {name: value[k] for name, value in layer.named_buffers()}
    alone.load_state_dict(state)
    return alone.train(layer.training)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_step_in_one_domain_leaves_the_others(optimizer):
    layer = varied(bn.BatchNorm2d(4, domains=3, affine_by="domain"))
    steps = optimizer(bn.param_groups(nn.Sequential(layer), norm_weight_decay=0.1))
    for domain in (1, 0, 2, 0):
        bn.use_domain(layer, domain)
        before = copy.deepcopy(layer.state_dict())
        steps.zero_grad()
        layer(torch.randn(8, 4, 3, 3)).pow(3).sum().backward()
        steps.step()
        own = {"weight", "bias"} if not domain else {f"weight_{domain}", f"bias_{domain}"}
        for key, value in layer.named_parameters():
            assert torch.equal(value, before[key]) == (key not in own), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_domain_is_a_layer_of_its_own(training, dtype):
    layer = varied(bn.BatchNorm2d(4, domains=2, affine="domain").train(training))
    for k in (1, 0):
        alone, x = of_domain(layer, k), torch.randn(8, 4, 3, 3).to(dtype).requires_grad_()
        bn.use_domain(layer, k)
        twin = x.detach().clone().requires_grad_()
        for each, into in ((layer, x), (alone, twin)):
            each(into).pow(2).sum().backward()
        tolerance = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(layer(x), alone(twin), **tolerance)
        torch.testing.assert_close(x.grad, twin.grad, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))
        mine = layer.weight_1 if k else layer.weight
        torch.testing.assert_close(mine.grad, alone.weight.grad, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(layer.running_var[k], alone.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_each_step_is_a_layer_of_its_own(training, dtype):
    options = {"activation": "relu", "dtype": dtype}
    layer = varied(bn.BatchNorm1d(3, pool="frame", max_steps=4, affine="step", **options))
    layer(torch.randn(6, 4, 3, dtype=dtype))
    layer.train(training)
    assert layer.weight.shape == (4, 3)
    x, added = torch.randn(2, 5, 6, 3, dtype=dtype).transpose(1, 2)
    x.requires_grad_()
    lengths = torch.tensor([5, 5, 5, 3, 2, 2])
    before = copy.deepcopy(layer)
    y = layer(x, added, lengths=lengths)
    y.double().pow(2).sum().backward()
    total = torch.zeros(())
    for t in range(5):
        row, there = min(t, 3), lengths > t
        alone = nn.BatchNorm1d(3).double().train(training)
        alone.running_mean.copy_(before.running_mean[row])
        alone.running_var.copy_(before.running_var[row])
        alone.weight, alone.bias = (nn.Parameter(p[row].double()) for p in (before.weight, before.bias))
        wanted = torch.relu(alone(x[there, t].detach().double()) + added[there, t].double())
        wanted.pow(2).sum().backward()
        if row < 3:
            torch.testing.assert_close(layer.weight.grad[row].double(), alone.weight.grad, rtol=2e-2, atol=2e-2)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(y[there, t].double(), wanted, rtol=tolerance, atol=tolerance)
        assert not y[~there, t].any()
        total += there.sum()
    assert total == lengths.sum()


def test_steps_beyond_those_of_training_use_the_last_one_reached():
    layer = varied(bn.BatchNorm1d(3, pool="frame", max_steps=9, affine_by="step"))
    layer(torch.randn(6, 2, 3))
    x = torch.randn(4, 1, 3).expand(4, 5, 3)
    y = layer.eval()(x)
    for t in (2, 3, 4):
        torch.testing.assert_close(y[:, t], y[:, 1])


def test_the_function_takes_rows():
    layer = varied(bn.BatchNorm1d(3, pool="frame", max_steps=4, affine_by="step"))
    x, mean, var = torch.randn(6, 5, 3), torch.zeros(4, 3), torch.ones(4, 3)
    y = bn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, training=True, pool="frame")
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(var, layer.running_var)
    with pytest.raises((InputError, RuntimeError), match="12"):
        bn.functional.batch_norm(x[:, 0], mean[0], var[0], layer.weight, training=True)


def test_states_and_copies():
    layer = varied(bn.BatchNorm2d(4, domains=2, affine_by="domain"))
    assert "affine_by='domain'" in repr(layer)
    assert list(dict(layer.named_parameters())) == ["weight", "bias", "weight_1", "bias_1"]
    like = bn.BatchNorm2d(4, domains=2, affine_by="domain")
    like.load_state_dict(layer.state_dict())
    plain = varied(nn.BatchNorm2d(4))
    bn.use_domain(layer, 1)
    x = torch.randn(3, 4, 2, 2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    for assign in (False, True):
        like.load_state_dict(plain.state_dict(), assign=assign)
        assert torch.equal(like.weight_1, plain.weight)
        assert like.weight_1.data_ptr() != like.weight.data_ptr()
    like.reset_parameters()
    assert all(bool((p == float("weight" in key)).all()) for key, p in like.named_parameters())
    steps = bn.BatchNorm1d(4, pool="frame", max_steps=3, affine_by="step")
    steps.load_state_dict(plain.state_dict())
    assert torch.equal(steps.weight, plain.weight.expand(3, 4))
    assert steps.bias.shape == (3, 4)


def test_conversion_both_ways_and_folding():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), varied(nn.BatchNorm2d(4)))
    gamma, x = net[1].weight, torch.randn(4, 3, 5, 5)
    bn.convert(net, domains=2, affine_by="domain")
    assert net[1].weight is gamma
    assert torch.equal(net[1].weight_1, gamma)
    assert type(bn.revert(net)[1]) is nn.BatchNorm2d
    assert [*dict(net[1].named_parameters())] == ["weight", "bias"]
    bn.convert(net, affine_by="domain", domains=2)
    with bn.use_domain(net, 1), torch.no_grad():
        net[1].weight_1.mul_(2)
        net(x + 1)
    with pytest.raises(SurgeryError, match="domains or time steps"):
        bn.revert(net)
    with pytest.raises(SurgeryError, match="layers lack"):
        bn.convert(net, to="torch")
    bn.use_domain(net.eval(), 1)
    expected, own = net(x), net[1].weight_1
    bn.convert(net, domains=0)
    assert net[1].weight is own
    assert net[1].affine_by == "shared"
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(bn.fold(net, x).model(x), expected, rtol=1e-4, atol=1e-4)


def test_modes_and_freezing_count_all_of_them():
    layer = bn.BatchNorm2d(4, domains=2, affine_by="domain")
    bn.freeze(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    bn.unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())
    groups = bn.param_groups(nn.Sequential(layer), gamma_toward_one=True, norm_weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [2, 2]
    steps = bn.StepBatchNorm(4, 3, domains=2, affine_by="domain")
    bn.use_domain(steps, 1)
    steps(torch.randn(5, 4), [3, 2]).sum().backward()
    assert steps.weight.grad is None
    assert steps.weight_1.grad is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"affine_by": "domain"}, "needs domains="),
        ({"affine": "step"}, "needs pool='frame'"),
        ({"affine_by": "domain", "domains": 2, "affine": False}, "affine=False"),
        ({"affine": "domain", "affine_by": "step", "domains": 2}, "two words"),
        ({"affine": "row"}, "unknown affine_by 'row'"),
    ],
)
def test_options_that_do_not_fit(options, match):
    with pytest.raises(InputError, match=match):
        bn.BatchNorm1d(4, **options)


def test_a_recurrence_shares_its_gamma():
    with pytest.raises(InputError, match="StepBatchNorm"):
        bn.StepBatchNorm(4, 3, affine_by="step")
