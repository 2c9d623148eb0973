"""Source, update and affine are independent, hold whatever is done to a network, and show."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import InputError
from batchnorm.surgery.freezing import is_frozen


class Mode(NamedTuple):
    source: str
    update: str
    affine: bool
    training: bool

    def __str__(self) -> str:
        flags = f"{'affine' if self.affine else 'fixed'}-{'train' if self.training else 'eval'}"
        return f"{self.source}-{self.update}-{flags}"

    @property
    def by_batch(self) -> bool:
        return self.training if self.source == "auto" else self.source == "batch"

    @property
    def updates(self) -> bool:
        return self.training if self.update == "auto" else self.update == "always"


MODES = [
    Mode(*each)
    for each in product(("auto", "batch", "running"), ("auto", "never", "always"), (True, False), (True, False))
]


def randomized(layer: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values.exp() if name.endswith("running_var") else values)
    return layer


def in_mode(mode: Mode, layer: nn.Module | None = None) -> nn.Module:
    layer = randomized(bn.BatchNorm1d(3) if layer is None else layer)
    bn.set_mode(layer, source=mode.source, update=mode.update, affine=mode.affine)
    return layer.train(mode.training)


def expected(layer: nn.Module, mode: Mode, x: Tensor) -> dict[str, Tensor]:
    """Output and buffers after one forward, in float64, from the formulas."""
    x, state = x.double(), {k: v.double() for k, v in layer.state_dict().items()}
    mean, var = state["running_mean"], state["running_var"]
    batch_mean, batch_var = x.mean((0, 2)), x.var((0, 2), correction=0)
    by = (batch_mean, batch_var) if mode.by_batch else (mean, var)
    y = (x - by[0][:, None]) / (by[1][:, None] + layer.eps).sqrt()
    y = y * state["weight"][:, None] + state["bias"][:, None]
    share = 0.1 if mode.updates else 0.0
    return {
        "output": y,
        "running_mean": (1 - share) * mean + share * batch_mean,
        "running_var": (1 - share) * var + share * x.var((0, 2), correction=1),
        "num_batches_tracked": state["num_batches_tracked"] + mode.updates,
    }


def check(layer: nn.Module, mode: Mode, call: Any = None) -> None:
    """One step of the layer is what its mode says."""
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2)) * 2 + 1
    want = expected(layer, mode, x)
    leaf = x.requires_grad_()
    y = (layer if call is None else call)(leaf)
    got = {"output": y, **dict(layer.named_buffers())}
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert (layer.weight.grad is not None, layer.bias.grad is not None) == (mode.affine, mode.affine)
    for name, value in (("source", mode.source), ("update", mode.update)):
        assert (f"{name}={value!r}" in repr(layer)) == (value != "auto")
    assert ("trains_affine=False" in repr(layer)) != mode.affine


def through_state(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = type(layer)(3).train(layer.training)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return fresh


SURVIVES = {
    "nothing": lambda layer: layer,
    "train and eval": lambda layer: layer.train(not layer.training).train(not layer.training),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.to(torch.float64).to(torch.float32),
    "state_dict": through_state,
    "its own state": lambda layer: (layer.load_state_dict(layer.state_dict()), layer)[1],
    "a state without modes": lambda layer: (layer.load_state_dict(dict(layer.state_dict())), layer)[1],
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("survives", SURVIVES)
def test_every_mode_does_what_it_says(mode: Mode, survives: str):
    check(SURVIVES[survives](in_mode(mode)), mode)


@pytest.mark.parametrize("mode", [m for m in MODES if m.training], ids=str)
def test_torchs_layers_get_modes_too(mode: Mode):
    layer = nn.BatchNorm1d(3)
    weight, buffer, keys = layer.weight, layer.running_mean, list(layer.state_dict())
    check(in_mode(mode, layer), mode)
    assert layer.weight is weight
    assert layer.running_mean is buffer
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled(mode: Mode):
    torch._dynamo.reset()
    layer = in_mode(mode)
    check(layer, mode, torch.compile(layer, fullgraph=True, backend="eager"))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_exported(mode: Mode):
    layer, x = in_mode(mode), torch.randn(4, 3, 5)
    eager = copy.deepcopy(layer)
    module = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(module(x), eager(x))
    torch.testing.assert_close(dict(module.state_dict()), dict(eager.state_dict()))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_mode_for_a_while_leaves_no_trace(mode: Mode, kind: type):
    layer = randomized(kind(3)).train(mode.training)
    layer.bias.requires_grad_(False)
    before = dict(layer.__dict__)

    def interrupted() -> None:
        with bn.mode(layer, source=mode.source, update=mode.update, affine=mode.affine):
            assert layer.bias.requires_grad is False
            assert layer.weight.requires_grad == mode.affine
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(layer) is kind
    assert layer.__dict__ == before
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)


def test_modes_do_not_disturb_each_other():
    layer = in_mode(Mode("running", "never", False, True))
    bn.set_mode(layer, update="always")
    check(layer, Mode("running", "always", False, True))
    layer.zero_grad()
    bn.set_mode(layer, affine=True)
    check(layer, Mode("running", "always", True, True))


def test_affine_gives_back_what_it_took():
    net = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    bn.set_mode(net, affine=False)
    bn.set_mode(net, affine=False)
    assert not any(p.requires_grad for p in net.parameters())
    bn.set_mode(net, affine=True)
    assert [p.requires_grad for p in net[0].parameters()] == [True, False]
    assert [p.requires_grad for p in net[1].parameters()] == [True, True]


def test_gamma_stays_fixed_whoever_asks_for_gradients():
    layer = bn.set_mode(randomized(bn.BatchNorm1d(3)), affine=False).requires_grad_(True)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).backward(torch.randn(4, 3))
    assert layer.weight.grad is None
    assert x.grad is not None


def test_frozen_where_torch_thaws():
    """eval() is torch's way to freeze, and train() undoes it; requires_grad is lost with a copy of the state."""
    x = torch.randn(5, 3) * 3 + 2
    theirs, ours = randomized(nn.BatchNorm1d(3)).eval(), bn.freeze(randomized(nn.BatchNorm1d(3)))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    theirs.train()(x)
    ours.train()(x)
    assert not torch.equal(theirs.running_mean, before["running_mean"])
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_frozen_travels_with_the_state_and_thaws():
    saved = bn.BatchNorm1d(3, source="batch")
    saved.bias.requires_grad_(False)
    bn.freeze(saved)
    layer = through_state(saved)
    assert is_frozen(layer)
    assert (layer.source, layer.update, layer.trains_affine) == ("running", "never", False)
    assert not layer.weight.requires_grad
    bn.unfreeze(layer)
    assert (layer.source, layer.update, layer.trains_affine) == ("batch", "auto", True)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    nn.BatchNorm1d(3).load_state_dict(saved.state_dict(), strict=True)


def test_frozen_stays_frozen_under_the_state_of_another():
    frozen = bn.freeze(bn.BatchNorm1d(3))
    frozen.load_state_dict(bn.BatchNorm1d(3, source="batch").state_dict())
    assert is_frozen(frozen)
    assert frozen.source == "running"


def test_frozen_under_ddp(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    bn.freeze(net)
    before = {k: v.clone() for k, v in net[1].state_dict().items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            parallel.train()(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
        del parallel  # its reducer holds the group, whose threads can wait for the interpreter
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(v, before[k]) for k, v in net[1].state_dict().items())
    assert net[0].weight.grad is not None


class OfTheBatch(nn.BatchNorm1d):
    def forward(self, x):
        return torch.nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch.nn.Module": ("net", {}),
    "no batch normalization": (nn.Linear(2, 2), {}),
    "unknown source": (bn.BatchNorm1d(3), {"source": "train"}),
    "unknown update": (bn.BatchNorm1d(3), {"update": "sometimes"}),
    "unknown trains_affine": (bn.BatchNorm1d(3), {"affine": "yes"}),
    "a OfTheBatch, which has no modes": (OfTheBatch(3), {"update": "never"}),
    "source='running'": (bn.BatchNorm1d(3, track_running_stats=False), {"source": "running"}),
    "update='always'": (nn.BatchNorm1d(3, track_running_stats=False), {"update": "always"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_before_anything_changes(reason: str):
    bad, modes = REFUSED[reason]
    net = nn.Sequential(bn.BatchNorm1d(3), nn.BatchNorm1d(3), bad) if isinstance(bad, nn.Module) else bad
    if reason == "no batch normalization":
        net = bad
    before = repr(net)
    with pytest.raises(InputError, match=reason):
        bn.set_mode(net, **modes)
    assert repr(net) == before


def test_a_wrong_mode_is_refused_wherever_it_is_set():
    layer = bn.BatchNorm1d(3)
    with pytest.raises(InputError, match="unknown source"):
        layer.source = "train"
    assert layer.source == "auto"
    with pytest.raises(InputError, match="unknown update"):
        bn.BatchNorm1d(3, update="train")


def test_no_update_for_probes():
    """A probe moves torch's statistics, and ours outside `no_update`; inside they stay, on any kind of layer."""
    x = torch.randn(5, 3) + 9
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        net = nn.Sequential(kind(3))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with bn.no_update(net):
            probe = net(x)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        torch.testing.assert_close(net(x), probe)
        assert type(net[0]) is kind
        assert not torch.equal(net[0].running_mean, before["0.running_mean"])


class ByType(nn.Module):
    """Keeps running statistics itself, as normalization by node type does in libraries for graphs."""

    momentum = 0.1

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, 3))
        self.register_buffer("running_var", torch.ones(2, 3))

    def forward(self, x):
        return x


def entered(verb, net):
    left = getattr(bn, verb)(net)
    if verb in ("no_update", "accumulate"):
        left.__enter__()
        left.__exit__(None, None, None)


@pytest.mark.parametrize("verb", ["no_update", "set_mode", "accumulate", "freeze"])
def test_running_statistics_of_unknown_classes_are_named(verb):
    net = nn.Sequential(nn.BatchNorm1d(3), ByType())
    with pytest.warns(UserWarning, match=rf"^(mode|{verb}): '1' \(ByType\) keep running statistics, .* left alone"):
        entered(verb, net)


@pytest.mark.parametrize("verb", ["no_update", "set_mode", "accumulate", "freeze"])
def test_no_word_of_frozen_classes_and_instance_normalization(verb, monkeypatch):
    monkeypatch.delattr(ByType, "momentum")  # as frozen classes have none
    entered(verb, nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True), ByType()))
