"""A diagnosis names the cause that was planted, measures what it does, tries the repair, and changes nothing."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.findings import KINDS
from batchnorm.errors import InputError
from batchnorm.report import write_diagnosis

FEATURES, CLASSES = 12, 4


def samples(n=512, seed=0):
    """Features of different means and spreads, the means those of the sample's class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    centers = 2 * torch.randn(CLASSES, FEATURES, generator=g)
    x = (centers[y] + torch.randn(n, FEATURES, generator=g)) * torch.linspace(0.5, 4, FEATURES) + 3
    return x, y


def batches(size=64, order=None, n=512):
    x, y = samples(n)
    if order == "sorted":
        x, y = x[y.argsort()], y[y.argsort()]
    return list(zip(x.split(size), y.split(size), strict=True))


def network(momentum=0.1, *before, **options):
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(16, momentum=momentum, **options)
    return nn.Sequential(nn.Linear(FEATURES, 16), *before, norm, nn.ReLU(), nn.Linear(16, CLASSES))


def seen(net, data, times=1):
    """The network after forwards in training, its weights as they are."""
    net.train()
    with torch.no_grad():
        for _ in range(times):
            for x, _ in data:
                net(x)
    return net


def kinds(found):
    return [finding.kind for finding in found.findings]


def test_nothing_is_found_in_a_calibrated_network():
    data = batches()
    found = bn.diagnose(bn.calibrate(network(), data), data)
    assert found.findings == ()
    assert found.before.distance == pytest.approx(found.after.distance, rel=1e-3)
    assert "as closely as exact statistics" in found.verdict or "follows training" in found.verdict


def test_statistics_as_initialized():
    found = bn.diagnose(network(), batches())
    assert kinds(found) == ["untrained"]
    assert "training has not changed them" in found.findings[0].text
    assert found.after.distance < found.before.distance / 2
    assert "running statistics are the reason" in found.verdict


def test_momentum_of_zero_is_named():
    data = batches()
    found = bn.diagnose(seen(network(0.0), data), data)
    assert kinds(found) == ["untrained"]
    assert "momentum is 0" in found.findings[0].text


def test_too_few_updates():
    data = batches()
    found = bn.diagnose(seen(network(0.02), data), data)
    assert kinds(found) == ["young"]
    assert f"{100 * 0.98**8:.0f} % of the initial" in found.findings[0].text


def test_weights_changed_since():
    data = batches()
    net = bn.calibrate(network(), data)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    found = bn.diagnose(net, data)
    assert kinds(found) == ["stale"]
    assert found.findings[0].layers == ("1",)
    assert found.layers[0].std_off == pytest.approx(math.log(1.5), rel=1e-3)


def test_other_data():
    net = bn.calibrate(network(), batches())
    found = bn.diagnose(net, [(0.5 * x + 2, y) for x, y in batches()])
    assert kinds(found) == ["stale"]


def test_a_moving_average_over_few_values():
    data = batches(8, n=1024)
    found = bn.diagnose(seen(network(0.9), data), data)
    assert "noisy_average" in kinds(found)
    assert "1.2 batches" in found.findings[0].text


def test_an_average_of_all_batches_is_not_called_a_moving_one():
    data = batches(4)
    net = network()
    net[1] = bn.BatchNorm1d(16, running="cumulative")
    found = bn.diagnose(seen(net, data[:4]), data)
    (finding,) = (finding for finding in found.findings if finding.kind == "noisy_average")
    assert "an average over the batches so far" in finding.text


def at_two_places(shift, momentum=0.1):
    torch.manual_seed(0)
    shared, linear = bn.BatchNorm1d(8, momentum=momentum), nn.Linear
    net = nn.Sequential(linear(8, 8), shared, nn.ReLU(), linear(8, 8), shared, nn.ReLU(), linear(8, 2))
    nn.init.constant_(net[3].bias, shift)
    return net, [torch.randn(64, 8) for _ in range(8)]


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_one_layer_at_places_whose_inputs_differ(momentum):
    net, data = at_two_places(5.0, momentum)
    for _ in range(6):
        for x in data:
            net(x)
    found = bn.diagnose(net, data)
    assert kinds(found)[0] == "several_places"
    assert not {"unlike_batches", "small_batches", "stale"} & set(kinds(found))
    assert "`1` is used at 2 places whose inputs differ" in found.findings[0].text
    assert (found.layers[0].places, found.layers[0].cause) == (2, "several_places")
    again = bn.diagnose(bn.calibrate(net, data), data)
    assert kinds(again) == ["several_places"]  # one set of statistics fits neither place, exact or not
    assert again.layers[0].cause is None


def test_one_layer_at_places_whose_inputs_are_alike():
    net, data = nn.Sequential(*[bn.BatchNorm1d(8)] * 2), [torch.randn(64, 8) for _ in range(8)]
    for x in data * 6:
        net(x)
    found = bn.diagnose(net, data)
    assert "several_places" not in kinds(found)
    assert found.layers[0].places == 2


def test_sorted_batches_at_several_places_are_both_found():
    net, data = at_two_places(5.0)
    data = [x + i for i, x in enumerate(data)]
    for x in data * 6:
        net(x)
    assert {"several_places", "unlike_batches"} <= set(kinds(bn.diagnose(net, data)))


@pytest.mark.parametrize("shape", [(), (5, 5)])
def test_sorted_batches(shape):
    def spread(data):
        g = torch.Generator().manual_seed(5)
        return [
            (x.reshape(*x.shape, *(1,) * len(shape)) + torch.randn(*x.shape, *shape, generator=g), y) for x, y in data
        ]

    kind = nn.BatchNorm2d if shape else nn.BatchNorm1d
    data = spread(batches(order="sorted"))
    net = seen(nn.Sequential(kind(FEATURES, momentum=None)), data)
    found = bn.diagnose(net, data)
    assert kinds(found) == ["unlike_batches"]
    assert found.layers[0].cause == "unlike_batches"
    assert found.layers[0].unlike > 20
    mixed = bn.diagnose(bn.calibrate(net, data), spread(batches()))
    assert mixed.findings == ()
    assert 0.5 < mixed.layers[0].unlike < 2


def test_the_comparison_of_batches_is_the_analysis_of_variance():
    x = samples(96)[0][:, :1]
    parts = x.split(32)
    found = bn.diagnose(nn.Sequential(nn.BatchNorm1d(1)), list(parts))
    means = torch.stack([part.mean() for part in parts])
    between = 32 * (means - x.mean()).square().sum() / 2
    within = sum((part - part.mean()).square().sum() for part in parts) / (96 - 3)
    assert found.layers[0].unlike == pytest.approx(float(between / within), rel=1e-4)


def test_dropout_before_the_layer():
    data = batches()
    net = seen(network(None, nn.Dropout(0.5)), data, times=20)
    found = bn.diagnose(net, data)
    assert kinds(found) == ["dropout"]
    assert found.layers[0].cause == "dropout"
    assert found.layers[0].wider_in_training > 1.1
    assert "`1`" in found.findings[0].text
    assert found.outcomes["training"].distance > 0.1  # dropout itself
    assert found.after.distance < found.before.distance
    still = bn.diagnose(bn.calibrate(net, data), data)
    assert kinds(still) == ["dropout"]  # training is as wide as it was
    assert still.layers[0].cause is None


def test_few_values_a_channel():
    data = batches(4)
    found = bn.diagnose(bn.calibrate(network(), data), data)
    assert kinds(found) == ["small_batches"]
    assert found.layers[0].noise > 0.25
    assert "(4 values a channel)" in found.findings[0].text


def test_dead_channels():
    data = [(x * (torch.arange(FEATURES) > 1), y) for x, y in batches()]
    found = bn.diagnose(bn.calibrate(nn.Sequential(nn.BatchNorm1d(FEATURES)), data), data)
    assert kinds(found) == ["dead"]
    assert found.layers[0].dead == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_broken_statistics(value):
    data = batches()
    net = bn.calibrate(network(), data)
    net[1].running_var[3] = value
    found = bn.diagnose(net, data)
    assert kinds(found) == ["broken"]
    assert math.isfinite(found.after.distance)
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found)


def test_a_layer_that_keeps_nothing():
    found = bn.diagnose(network(track_running_stats=False), batches())
    assert kinds(found) == ["by_batch"]
    assert found.after is None
    assert "depends on the batch" in found.verdict
    mixed = nn.Sequential(network(), nn.BatchNorm1d(CLASSES, track_running_stats=False))
    assert set(kinds(bn.diagnose(mixed, batches()))) == {"by_batch", "untrained"}


@pytest.mark.parametrize(
    ("mean", "momentum", "dtype"),
    [(1e6, 0.1, torch.float32), (1e4, 0.01, torch.float32), (100.0, 0.1, torch.bfloat16), (1.0, 0.002, torch.bfloat16)],
)
def test_a_moving_average_that_rounds_to_a_halt(mean, momentum, dtype):
    """The same data are not of other data, and weights that do not change are not of earlier weights."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(512, 1), torch.randn(512, 1) * 1e-2 + mean], 1)
    x = x if dtype is torch.float32 else (x.round() if mean > 10 else x).to(dtype)
    norm = nn.BatchNorm1d(2, momentum=momentum, dtype=dtype)
    net = nn.Sequential(norm, nn.Linear(2, 2, dtype=dtype))
    for _ in range(int(20 / momentum)):
        norm(x[torch.randint(512, (64,))])
    found = bn.diagnose(net, list(x.split(64)))
    assert found.layers[0].cause == "rounding"
    assert str(dtype).removeprefix("torch.") in found.findings[0].text


def test_other_causes_are_not_taken_for_rounding():
    data = batches()
    for net in (network(), seen(network(0.01), data, 2), seen(network(), [(x + 3, y) for x, y in data], 20)):
        assert bn.diagnose(net, data).layers[0].cause in ("untrained", "young", "stale")


@pytest.mark.parametrize("source", [None, "batch"])
@pytest.mark.parametrize("keeps", [True, False])
def test_the_repair_of_evaluation_by_batches_can_be_carried_out(source, keeps):
    net, data = network(track_running_stats=keeps), batches()
    if source:
        bn.set_mode(net, source=source)
    elif keeps:
        return
    (finding,) = [f for f in bn.diagnose(net, data).findings if f.kind == "by_batch"]
    exec(finding.repair, {"bn": bn, "net": net, "batches": data})
    assert bn.diagnose(net, data).layers[0].cause is None


def test_a_diagnosis_gives_no_layer_statistics():
    net = network(track_running_stats=False)
    net[1].track_running_stats = True
    bn.diagnose(nn.Sequential(net, nn.BatchNorm1d(CLASSES)), batches())
    assert net[1].running_mean is None
    assert net[1].track_running_stats


def test_normalization_of_samples_is_no_fault():
    group = bn.BatchNorm1d(8, ghost_size=1, channel_groups=2, source="batch", track_running_stats=False)
    net = nn.Sequential(nn.Conv1d(3, 8, 1), group)
    assert not bn.diagnose(net, [torch.randn(8, 3, 5) for _ in range(3)]).findings


def test_distances_and_effects_of_known_size():
    """Running means off by delta standard deviations move a normalized output by delta."""
    x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(2))
    net = bn.calibrate(nn.Sequential(nn.BatchNorm1d(6)), [x])
    net[0].running_mean += 0.5 * net[0].running_var.sqrt()
    found = bn.diagnose(net, [x])
    (layer,) = found.layers
    assert layer.mean_off == pytest.approx(0.5, rel=1e-4)
    assert layer.std_off == pytest.approx(0, abs=1e-4)
    assert found.before.distance == pytest.approx(0.5, rel=1e-3)
    assert layer.effect == pytest.approx(0.5, rel=1e-3)
    assert found.after.distance < 1e-3


def test_errors_add_up_on_the_way():
    data = batches()
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    bn.calibrate(net, data)
    net[1].running_var.mul_(4)
    first, second = bn.diagnose(net, data).layers
    assert (first.cause, second.cause) == ("stale", None)
    assert second.std_off < 0.01 < 0.3 < second.arrives_std_off


def test_loss_and_accuracy_are_those_of_the_modes():
    data = batches()
    net = seen(network(), data)
    found = bn.diagnose(net, data)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(x)
        calibrated = bn.calibrate(copy.deepcopy(net), data).eval()(x)
    assert found.before.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)
    assert found.before.accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert found.after.loss == pytest.approx(float(F.cross_entropy(calibrated, y)), rel=1e-4)
    assert found.outcomes["training"].agreement == 1.0
    own = bn.diagnose(net, data, loss=lambda output, batch: output.square().mean())
    assert own.before.loss == pytest.approx(float(logits.square().mean()), rel=1e-4)


def test_outputs_without_classes_have_neither():
    net = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 1), nn.Flatten(0))
    found = bn.diagnose(net, [x for x, _ in batches()])
    assert found.before.loss is found.before.accuracy is found.before.agreement is None
    assert list(found.outcome_rows()[0]) == ["", "distance of outputs"]


def test_frozen_layers_have_no_gap():
    data = batches(8)
    net = bn.freeze(bn.calibrate(network(), data))
    shifted = [(2 * x + 1, y) for x, y in data]
    found = bn.diagnose(net, shifted)
    assert found.findings == ()
    assert found.before.distance == found.after.distance == 0
    assert found.layers[0].mean_off > 0.1  # of other data, but in training as well
    assert found.layers[0].frozen
    assert "follows training" in found.verdict


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(5)
        self.rnn = bn.LSTM(5, 6, batch_norm="sequence")

    def forward(self, x, lengths):
        return {"states": self.rnn(self.norm(x.mT, lengths=lengths).mT)[0]}


def test_sequences_dicts_and_lengths():
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    data = [{"x": torch.randn(8, 9, 5, generator=g) + 2, "lengths": torch.arange(2, 10), "y": 0} for _ in range(4)]
    net = Sequences()
    net.rnn.batch_first = True
    found = bn.diagnose(net, data)
    assert found.layers[0].name == "norm"
    assert len(found.layers) == 2
    assert kinds(found)[0] == "untrained"
    assert found.layers[0].values_per_channel == sum(range(2, 10))
    assert bn.diagnose(bn.calibrate(net, data), data).layers[0].mean_off == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ghost_size": 16},
        {"channel_groups": 4},
        {"renorm": bn.Renorm()},
        {"running": "debiased"},
        {"running": "cumulative", "running_var": "biased"},
        {"example_weight": 0.05},
        {"domains": 2},
        {"source": "running"},
    ],
)
def test_options_of_the_layers(options):
    data = batches()
    net = seen(network(), data)
    net[1] = bn.BatchNorm1d(16, **options)
    bn.calibrate(seen(net, data), data)
    before = copy.deepcopy(net.state_dict())
    found = bn.diagnose(net, data)
    assert found.layers[0].cause is None
    assert found.layers[0].mean_off < 1e-3
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_order_is_that_of_the_data_and_heads_of_training_have_no_evaluation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first, self.aside = (nn.BatchNorm1d(FEATURES) for _ in range(3))

        def forward(self, x):
            y = self.second(self.first(x))
            return (y, self.aside(x)) if self.training else y

    found = bn.diagnose(Net(), [x for x, _ in batches()])
    assert [layer.name for layer in found.layers] == ["first", "second", "aside"]
    assert found.layers[2].mean_off is found.layers[2].cause is None


@pytest.mark.parametrize("failing", [None, KeyboardInterrupt, ValueError])
def test_nothing_of_the_network_changes(failing):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("moves", torch.zeros(()))
            self.calls = 0

        def forward(self, x):
            self.moves += 1
            self.calls += self.training
            if failing is not None and self.calls > 2:
                raise failing("now")
            return x

    data = batches()
    net = nn.Sequential(network(0.1, nn.Dropout(0.3)), Counts())
    net[0].eval()
    before, modes, state = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    if failing is None:
        bn.diagnose(net, data)
    else:
        with pytest.raises(InputError if failing is ValueError else failing, match="now"):
            bn.diagnose(net, data)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert type(net[0][2]) is nn.BatchNorm1d
    assert "forward" not in net[0][2].__dict__


def test_bad_input():
    data = batches()
    for given, message in (
        (iter(data), "one-shot"),
        ({"x": data[0][0]}, "one dict"),
        (3, "expected an iterable"),
        ([], "no batches"),
        ([*data, (data[0][0][:1], data[0][1][:1])], "fails on a batch in training mode: .*more than 1 value"),
        ([(data[0][0] * float("nan"), data[0][1])], "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            bn.diagnose(network(), given)
    with pytest.raises(InputError, match="no batch normalization"):
        bn.diagnose(nn.Linear(2, 2), data)
    aside = nn.Sequential(nn.Linear(FEATURES, 2))
    aside.unused = nn.BatchNorm1d(2)
    aside.forward = aside[0].forward
    with pytest.raises(InputError, match="reached no batch-norm layer"):
        bn.diagnose(aside, data)


def test_every_kind_is_said_and_the_page_shows_it(tmp_path):
    data = batches()
    found = bn.diagnose(seen(network(0.02), data), data)
    page = write_diagnosis(tmp_path / "page.html", found, source="A <test>.").read_text(encoding="utf-8")
    assert found.findings[0].text.split("`")[0] in page
    assert "<code>1</code>" in page
    assert "A &lt;test&gt;." in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert next(iter(KINDS)) == "broken"
    text = str(found)
    for expected in (found.verdict, "evaluation, calibrated", "young", "-> bn.calibrate(net, batches)"):
        assert expected in text
