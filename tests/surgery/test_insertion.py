"""Insertion puts layers where the design says, keeps the rest, or leaves everything as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_networks import Plain, mlp, mobilenet, randomize, resnet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.insertion import plan_insertion

IMAGES = torch.randn(4, 3, 9, 9)
ROWS = torch.randn(6, 7)


def snapshot(net):
    return [
        (name, module, type(module), module.training, dict(module._parameters)) for name, module in net.named_modules()
    ], {key: value.clone() for key, value in net.state_dict().items()}


def unchanged(net, before):
    structure, values = before
    now, contents = snapshot(net)
    return (
        len(now) == len(structure)
        and all(
            a[0] == b[0]
            and a[1] is b[1]
            and a[2:4] == b[2:4]
            and list(a[4]) == list(b[4])
            and all(a[4][key] is b[4][key] for key in a[4])
            for a, b in zip(now, structure, strict=True)
        )
        and list(contents) == list(values)
        and all(torch.equal(contents[key], values[key]) for key in values)
    )


def norms(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}


def by_hand():
    """`mlp()` with batch normalization before its activations."""
    return nn.Sequential(
        nn.Linear(7, 9, bias=False),
        nn.BatchNorm1d(9),
        nn.Sigmoid(),
        nn.Linear(9, 9, bias=False),
        nn.BatchNorm1d(9),
        nn.Sigmoid(),
        nn.Linear(9, 3),
    )


def test_the_result_is_the_network_one_would_write():
    net, reference = mlp(), by_hand()
    weights = [p for p in net.parameters() if p.dim() == 2]
    last = net[4].bias
    assert bn.insert(net, ROWS) is net
    with torch.no_grad():
        for target, source in zip((reference[0], reference[3], reference[6]), weights, strict=True):
            target.weight.copy_(source)
        reference[6].bias.copy_(last)
    upstream = torch.randn(6, 3)
    for network in (net.train(), reference.train()):
        (network(ROWS) * upstream).sum().backward()
    torch.testing.assert_close(net(ROWS), reference(ROWS))
    torch.testing.assert_close(net[0].linear.weight.grad, reference[0].weight.grad)
    torch.testing.assert_close(net[2].norm.bias.grad, reference[4].bias.grad)
    torch.testing.assert_close(net[2].norm.running_var, reference[4].running_var)


def test_ours_are_put_in_and_redundant_biases_are_gone():
    net = bn.insert(mlp(), ROWS, eps=1e-3, momentum=None)
    assert {name: type(m) for name, m in norms(net).items()} == {
        "0.norm": bn.BatchNorm1d,
        "2.norm": bn.BatchNorm1d,
    }
    assert all(m.eps == 1e-3 and m.momentum is None for m in norms(net).values())
    keys = set(net.state_dict())
    assert "0.linear.bias" not in keys
    assert {"0.linear.weight", "0.norm.weight", "4.weight", "4.bias"} <= keys


def test_keys_of_other_modules_stay():
    net = Plain()
    keys = {key for key in net.state_dict() if key.startswith("head")}
    net.extra = nn.PReLU()
    bn.insert(net, IMAGES)
    assert keys | {"extra.weight"} <= set(net.state_dict())
    assert set(norms(net)) == {"conv1.norm", "conv2.norm", "hidden.norm"}
    assert isinstance(net.conv1.norm, bn.BatchNorm2d)
    assert isinstance(net.hidden.norm, bn.BatchNorm1d)


def test_identities_and_values_of_everything_else_stay():
    net = Plain()
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    values = {name: p.clone() for name, p in weights.items()}
    bn.insert(net, IMAGES)
    assert net.conv1.conv.weight is weights["conv1.weight"]
    assert net.head.weight is weights["head.weight"]
    assert all(torch.equal(weights[name], values[name]) for name in weights)


@pytest.mark.parametrize("training", [True, False])
def test_modes_follow_the_layer(training):
    net = bn.insert(mlp().train(training), ROWS)
    assert {m.training for m in net.modules()} == {training}


def test_after_activation():
    net = bn.insert(mlp(), ROWS, placement="after_activation")
    assert set(norms(net)) == {"1.norm", "3.norm"}
    assert net[0].bias is not None
    assert isinstance(net[1].activation, nn.Sigmoid)
    hidden = torch.sigmoid(F.linear(ROWS, net[0].weight, net[0].bias))
    expected = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(net[1](net[0](ROWS)), expected, rtol=1e-4, atol=1e-4)


def test_after_activation_without_an_activation_is_direct():
    net = nn.Sequential(nn.Linear(7, 5), nn.Flatten(), nn.Linear(5, 2))
    bn.insert(net, ROWS, placement="after_activation")
    assert set(norms(net)) == {"0.norm"}
    assert net[0].linear.bias is None


def test_a_call_as_activation_is_refused_after_it():
    net = Plain()
    before = snapshot(net)
    with pytest.raises(SurgeryError, match=r"'conv1'.*relu inside forward.*skip="):
        bn.insert(net, IMAGES, placement="after_activation")
    assert unchanged(net, before)


def test_a_shared_activation_is_refused_after_it():
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(7, 9), act, nn.Linear(9, 9), act, nn.Linear(9, 3))
    with pytest.raises(SurgeryError, match="used 2 times"):
        bn.insert(net, ROWS, placement="after_activation")
    assert set(norms(bn.insert(net, ROWS))) == {"0.norm", "2.norm"}


def test_normalized_networks_are_left_alone():
    net = resnet()
    before = snapshot(net)
    with pytest.raises(SurgeryError, match=r"nothing to normalize.*normalized already.*output"):
        bn.insert(net, torch.randn(2, 3, 16, 16))
    assert unchanged(net, before)
    with pytest.raises(SurgeryError, match="attention or a gate"):
        bn.insert(mobilenet(), torch.randn(2, 3, 16, 16))


class Transformer(nn.Module):
    """A pre-norm block with attention written by hand, over (N, L, C)."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.final, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        a = (q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.final(x).mean(1))


def test_transformers_get_it_in_their_mlp_alone_over_the_last_axis():
    net, x = Transformer(), torch.randn(4, 5, 8)
    plan = plan_insertion(net, x)
    assert "attention" in plan.skipped["query"]
    assert "normalized already" in plan.skipped["out"]
    plan.apply()
    assert set(norms(net)) == {"up.norm"}
    y = net.up(x)
    assert y.shape == (4, 5, 16)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var((0, 1), unbiased=False), torch.ones(16), rtol=1e-2, atol=1e-2)
    randomize(net).eval()
    result = bn.fold(net, x)
    assert [(i.layer, i.into) for i in result.certificate.folded] == [("up.norm", "up.linear")]


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv1d(3, 4, 2), (3, 8), bn.BatchNorm1d),
        (nn.Conv3d(3, 4, 2), (3, 4, 4, 4), bn.BatchNorm3d),
        (nn.ConvTranspose2d(3, 4, 2), (3, 4, 4), bn.BatchNorm2d),
        (nn.Conv2d(3, 6, 2, groups=3), (3, 4, 4), bn.BatchNorm2d),
    ],
)
def test_every_convolution(layer, shape, kind):
    head = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    net = nn.Sequential(layer, nn.ReLU(), head(layer.out_channels, 2, 1))
    bn.insert(net, torch.randn(2, *shape))
    assert type(net[0].norm) is kind
    assert net[0].norm.num_features == layer.out_channels


def test_without_a_batch_axis():
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Conv1d(4, 2, 1))
    with pytest.raises(SurgeryError, match="no batch axis"):
        bn.insert(net, torch.randn(3, 8))
    with pytest.raises(SurgeryError, match="no batch axis"):
        bn.insert(mlp(), torch.randn(7))


def test_only_and_skip():
    assert set(norms(bn.insert(Plain(), IMAGES, only="conv*"))) == {"conv1.norm", "conv2.norm"}
    assert set(norms(bn.insert(Plain(), IMAGES, only=["head"]))) == {"head.norm"}
    assert set(norms(bn.insert(Plain(), IMAGES, skip=("conv1", "hidden")))) == {"conv2.norm"}
    for argument in ("only", "skip"):
        with pytest.raises(InputError, match=rf"{argument} names 'conv9'.*conv1"):
            bn.insert(Plain(), IMAGES, **{argument: "conv9"})


def test_optimizer_is_kept_in_step():
    net = Plain()
    body = [*net.conv1.parameters(), *net.conv2.parameters(), *net.hidden.parameters()]
    optimizer = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": net.head.parameters()}], lr=0.5, momentum=0.9)
    (net(IMAGES) * torch.randn(4, 4)).sum().backward()
    optimizer.step()
    bias = net.conv1.bias
    assert bias in optimizer.state
    bn.insert(net, IMAGES, optimizer=optimizer)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held[0] | held[1] == {id(p) for p in net.parameters()}
    assert not held[0] & held[1]
    assert {id(p) for m in norms(net).values() for p in m.parameters()} <= held[0]
    assert bias not in optimizer.state
    before = net.conv1.norm.weight.clone()
    optimizer.zero_grad()
    (net(IMAGES) * torch.randn(4, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.conv1.norm.weight)


def test_failure_leaves_network_and_optimizer_as_they_were(monkeypatch):
    from batchnorm.surgery import insertion

    def fail(*args):
        raise SurgeryError("no")

    net = Plain().train()
    net.head.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(IMAGES).square().sum().backward()
    optimizer.step()
    before = snapshot(net)
    params = [id(p) for p in optimizer.param_groups[0]["params"]]
    state = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    grads = {name: p.grad for name, p in net.named_parameters()}
    monkeypatch.setattr(insertion, "_check_places", fail)
    with pytest.raises(SurgeryError, match="nothing was changed: no"):
        bn.insert(net, IMAGES, optimizer=optimizer)
    assert unchanged(net, before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == params
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], b) for p, b in state.items())
    assert all(p.grad is grads[name] for name, p in net.named_parameters())


def test_a_forward_that_reads_the_layer_is_checked_like_any_other():
    class Reads(Plain):
        def forward(self, x):
            return super().forward(x) + float(self.conv1.kernel_size[0])

    net = bn.insert(Reads(), IMAGES)
    assert type(net.conv1) is nn.Conv2d
    assert isinstance(net.conv1.norm, bn.BatchNorm2d)
    assert isinstance(net.conv2, nn.Sequential)


def test_a_name_that_is_taken_is_refused():
    class Reads(Plain):
        def forward(self, x):
            return super().forward(x) + float(self.conv1.kernel_size[0])

    net = Reads()
    net.conv1.norm = 3
    before = snapshot(net)
    with pytest.raises(SurgeryError, match="'conv1' has an attribute 'norm' already"):
        bn.insert(net, IMAGES)
    assert unchanged(net, before)


def test_a_reference_beside_the_registered_one_is_noticed():
    class Listed(Plain):
        def __init__(self):
            super().__init__()
            self.stages = [self.conv1, self.conv2]

        def forward(self, x):
            for stage in self.stages:
                x = F.relu(stage(x))
            return self.head(torch.sigmoid(self.hidden(x.mean((2, 3)))))

    net = Listed()
    before = snapshot(net)
    with pytest.raises(SurgeryError, match="nothing was changed"):
        bn.insert(net, IMAGES)
    assert unchanged(net, before)


def test_shared_and_hooked_layers_are_refused_by_name():
    shared = nn.Linear(9, 9)
    net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(SurgeryError, match=r"'2': it is used 2 times.*skip=\['2'\]"):
        bn.insert(net, ROWS)
    net[0].register_forward_hook(lambda *args: None)
    with pytest.raises(SurgeryError, match="'0': it has hooks"):
        bn.insert(net, ROWS, skip="2")


def test_bad_arguments_name_themselves():
    net = mlp()
    before = snapshot(net)
    with pytest.raises(InputError, match="placement is 'middle'"):
        bn.insert(net, ROWS, placement="middle")
    with pytest.raises(InputError, match="moment"):
        bn.insert(net, ROWS, moment=0.1)
    with pytest.raises(InputError, match=r"fails on the example \(\(6, 8\)"):
        bn.insert(net, torch.randn(6, 8))
    with pytest.raises(SurgeryError, match="no linear or convolution layer"):
        bn.insert(nn.Sequential(nn.ReLU()), ROWS)
    assert unchanged(net, before)


def test_inserting_twice_is_refused_the_second_time():
    net = bn.insert(mlp(), ROWS)
    with pytest.raises(SurgeryError, match="normalized already"):
        bn.insert(net, ROWS)


def test_the_whole_life_of_a_network():
    torch.manual_seed(0)
    net = bn.insert(Plain(), IMAGES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(8, 3, 9, 9)), torch.randint(4, (8,))).backward()
        optimizer.step()
    bn.freeze(net)
    result = bn.fold(net, IMAGES)
    assert not norms(result.model)
    assert len(result.certificate.folded) == 3
    torch.testing.assert_close(result.model(IMAGES), net(IMAGES), rtol=1e-5, atol=1e-5)
    assert "conv1.conv.bias" in result.model.state_dict()
    copy.deepcopy(bn.unfreeze(net))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_compiled_network_takes_the_new_layers():
    torch._dynamo.reset()
    net = mlp().train()
    compiled = torch.compile(net, backend="eager")
    compiled(ROWS)
    assert bn.insert(compiled, ROWS) is compiled
    before = net[0].norm.num_batches_tracked.item()
    torch.testing.assert_close(compiled(ROWS), net(ROWS))
    assert net[0].norm.num_batches_tracked.item() == before + 2
    nested = nn.Sequential(torch.compile(nn.Linear(7, 9), backend="eager"), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(SurgeryError, match="compiled by itself"):
        bn.insert(nested, ROWS)


def test_networks_that_only_export_captures():
    class Shaped(Plain):
        def forward(self, x):
            return super().forward(x if x.shape[-1] > 4 else F.pad(x, (2, 2, 2, 2)))

    net = bn.insert(Shaped(), IMAGES)
    assert set(norms(net)) == {"conv1.norm", "conv2.norm", "hidden.norm"}


class Tied(nn.Module):
    """Two layers with one weight and one bias, in a network that `torch.export` alone follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if not torch.compiler.is_exporting() and bool(x.sum() > 1e9):
            raise ValueError("too large")
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


def test_layers_with_one_weight_are_two_layers_where_only_export_captures():
    """The exported program has one name for the weight; the other layer seemed to read it from outside."""
    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randn(8, 4)
    nn.init.normal_(net.norm.running_mean)
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    folded = bn.fold(net, x)
    assert [(each.layer, each.into) for each in folded.certificate.folded] == [("norm", "first")]
    torch.testing.assert_close(folded.model(x), net(x))
    assert torch.equal(folded.model.second.weight, net.second.weight)  # which has no normalization behind it
    bn.insert(net, x)
    assert net.second.linear.bias is None
    assert net.first.bias is not None  # the norm behind it was there before
    assert net.second.linear.weight is net.first.weight


def test_projections_after_attention_are_left_alone():
    net, x = Transformer(), torch.randn(4, 5, 8)
    net.norm1 = net.norm2 = net.final = nn.Identity()
    skipped = plan_insertion(net, x).skipped
    attention = {name for name, reason in skipped.items() if "attention" in reason}
    assert attention == {"query", "key", "value", "out"}


def test_one_sample_is_example_enough():
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    bn.insert(net.train(), torch.randn(1, 7))
    assert set(norms(net)) == {"1", "2.norm"}


def test_a_norm_on_one_way_only_is_not_enough():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
            self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 2)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(self.norm(x + self.second(x)))

    assert set(norms(bn.insert(Stream(), ROWS))) == {"first.norm"}


@pytest.mark.parametrize("placement", ["before_activation", "after_activation"])
@pytest.mark.parametrize("make", [mlp, Transformer])
def test_the_function_can_be_preserved(make, placement):
    if make is Transformer and placement == "after_activation":
        pytest.skip("its activation is a call")
    net, x = make(), torch.randn(32, 7) * 3 + 1 if make is mlp else torch.randn(4, 5, 8)
    expected = net.eval()(x)
    bn.insert(net, x, placement=placement, initialize="preserve")
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(3 * x + 1), make_equal(make, net, 3 * x + 1), rtol=1e-4, atol=1e-4)
    layer = next(iter(norms(net).values()))
    assert not torch.allclose(layer.weight, torch.ones_like(layer.weight), rtol=0.01)


def make_equal(make, net, x):
    """What the network computes on other data with its normalization folded away."""
    return bn.fold(net, x).model(x)


class Bottleneck(nn.Module):
    """A residual block without normalization, its shortcut projected or not."""

    def __init__(self, project):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.project = nn.Conv2d(3, 3, 1) if project else nn.Identity()
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        y += self.project(x)
        return self.head(F.relu(y))


@pytest.mark.parametrize("project", [True, False])
def test_residual_branches_can_begin_as_their_shortcut(project):
    net = bn.insert(Bottleneck(project), IMAGES, zero_gamma=True)
    zero = {name for name, m in norms(net).items() if not m.weight.any()}
    assert zero == {"b.norm"}
    assert set(norms(net)) == {"a.norm", "b.norm"} | ({"project.norm"} if project else set())
    shortcut = net.project(IMAGES)
    torch.testing.assert_close(net(IMAGES), net.head(F.relu(shortcut)))


def test_initializations_that_contradict_or_cannot_be():
    with pytest.raises(InputError, match="zero_gamma"):
        bn.insert(Bottleneck(False), IMAGES, zero_gamma=True, initialize="preserve")
    with pytest.raises(InputError, match="identity"):
        bn.insert(Bottleneck(False), IMAGES, initialize="identity")
    net = Bottleneck(False)
    before = snapshot(net)
    with pytest.raises(SurgeryError, match="needs gamma"):
        bn.insert(net, IMAGES, initialize="preserve", affine=False)
    assert unchanged(net, before)


class Reading(nn.Module):
    """Its forward reads attributes of one layer, and the class of another."""

    def __init__(self, by_class=False):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3)
        self.head, self.by_class = nn.Linear(4, 2), by_class

    def forward(self, x):
        if self.by_class:
            assert isinstance(self.other, nn.Conv2d)
        else:
            x = F.pad(x, (self.conv.stride[0],) * 4)
        return self.head(self.other(torch.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("by_class", [False, True])
def test_a_layer_that_the_network_looks_into_stays_in_its_place(by_class):
    torch.manual_seed(0)
    net = Reading(by_class)
    plain = copy.deepcopy(net)
    x = torch.randn(4, 3, 9, 9)
    bn.insert(net, x)
    assert type(net.conv) is nn.Conv2d
    assert (type(net.other) is nn.Sequential) == (not by_class)
    assert net.conv.bias is None
    assert "conv.norm.running_mean" in net.state_dict()
    with torch.no_grad():
        given = F.pad(x, (2,) * 4) if not by_class else x
        expected = F.batch_norm(F.conv2d(given, net.conv.weight, stride=2), None, None, training=True)
    seen = []
    net.conv.norm.register_forward_hook(lambda m, args, y: seen.append(y))
    net.train()(x)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    net.conv.norm._forward_hooks.clear()
    assert bn.summary(net, x).layers[0].fed_by == ("conv",)
    net.eval()
    folded = bn.fold(pickle.loads(pickle.dumps(net)), x)
    assert {item.into for item in folded.certificate.folded} >= {"conv"}
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(net)(x).equal(net(x))
    assert plain.conv.bias is not None


def test_a_layer_whose_dtype_and_device_are_read_is_normalized():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = x.to(self.conv.weight.device, self.conv.weight.dtype)
            return self.head(torch.relu(self.conv(x)))

    net = bn.insert(Asking(), torch.randn(4, 3, 6, 6))
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
