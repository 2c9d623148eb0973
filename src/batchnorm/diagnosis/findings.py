"""Why a network's evaluation differs from its training: what each layer keeps, beside what the data say.

Each cause predicts what the running statistics should be: 0 and 1 if they were never updated, the initial values mixed
with the data's if seldom, those within batches if batches are not alike (or the inputs of a layer's places in the
network), those of training if dropout widens them. The cause whose prediction is nearest to what is kept explains it,
unless the noise of a moving average would.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnosis.readings import Received
from batchnorm.diagnosis.summary import DEAD
from batchnorm.nn.batch_norm import BatchNorm as Ours
from batchnorm.population.measuring import Estimate
from batchnorm.surgery.folding import uses_batch_statistics

NOTICEABLE = 0.1  # of a standard deviation, in means and (as a logarithm) in standard deviations
EXPLAINS = 0.25  # a cause's prediction is at most so far from what is kept as the data's statistics are
LEAST_LEFT = 0.01  # of the initial values, to be a cause
SIGMAS = 3.0  # of a moving average's noise
NOISY = 0.25  # of a standard deviation, in the means of batches: 16 independent values a channel
FEWEST_BATCHES = 3  # that tell whether batches are alike


@dataclass(frozen=True)
class Statistics:
    """Mean and variance by channel, float64, and which of them are known."""

    mean: Tensor
    var: Tensor
    known: Tensor | None = None

    @classmethod
    def of(cls, estimate: Estimate, *, within: bool = False) -> Statistics:
        """Those of all values, or with the variance within batches alone; unbiased."""
        pooled = estimate.pooled
        degrees, m2 = (estimate.degrees_within, estimate.m2_within) if within else (pooled.count - 1, pooled.m2)
        known = (degrees > 0).expand_as(pooled.mean)
        return cls(pooled.mean, m2 / degrees.clamp(min=1), known)

    @property
    def are_broken(self) -> bool:
        """Whether they are not finite, or a variance is negative."""
        return not bool(self.mean.isfinite().all() & self.var.isfinite().all() & (self.var >= 0).all())

    def error(self, other: Statistics, eps: float) -> tuple[float, float]:
        """How far this is from `other`, the root mean square of all channels: of the means in `other`'s standard
        deviations, of the standard deviations as the logarithm of their ratio; eps counts in both."""
        known = torch.ones_like(self.mean, dtype=torch.bool)
        for each in (self.known, other.known):
            known = known if each is None else known & each
        if not bool(known.any()):
            return 0.0, 0.0
        scale = (other.var + eps).sqrt()
        means = ((self.mean - other.mean) / scale)[known]
        logs = ((self.var + eps).sqrt() / scale).log()[known]
        sizes = (float(each.square().mean().sqrt()) for each in (means, logs))
        mean, std = (math.inf if math.isnan(size) else size for size in sizes)
        return mean, std


@dataclass(frozen=True)
class LayerGap:
    """One batch normalization layer, between training and evaluation.

    "Off" is the root mean square over the channels: of means in standard deviations of the data, of standard
    deviations as the absolute logarithm of their ratio (0.1: about 10 %). None: unknown, or nothing is kept.

    Attributes:
        name: qualified name; type: its class.
        values_per_channel: that share statistics in training, the median over the batches.
        mean_off, std_off: running statistics from those of the data, which `calibrate` measures.
        arrives_mean_off, arrives_std_off: running statistics from those of what arrives in evaluation, where the
            layers before use theirs: errors that add up on the way show here.
        noise: standard deviation of the means of batches, in standard deviations of the data.
        unlike: how many times the means of samples vary *between* batches as they would in random batches (the F of an
            analysis of variance, mean over the channels); 1 where batches are alike.
        wider_in_training: standard deviation of what it receives in training, over that without dropout.
        dead: channels with a variance below eps / 100.
        effect: how far this layer's running statistics alone move the outputs, in standard deviations of the outputs.
        frozen: whether its running statistics normalize in training, too (`freeze`): then there is no gap.
        cause: the kind of the finding that explains its running statistics, or None where they are right.
        places: how many times the network uses it on one batch.
        places_off: how far what arrives at one of these places is from what arrives at all of them, at most: in means
            or standard deviations, as above; None for one place.
    """

    name: str
    type: str
    values_per_channel: int
    mean_off: float | None
    std_off: float | None
    arrives_mean_off: float | None
    arrives_std_off: float | None
    noise: float
    unlike: float | None
    wider_in_training: float | None
    dead: int
    effect: float | None
    frozen: bool
    cause: str | None
    places: int = 1
    places_off: float | None = None


@dataclass(frozen=True)
class Finding:
    """What was found, in one sentence or two, and what to do.

    Attributes:
        kind: one of `KINDS`.
        layers: names of the layers it is about, those that move the outputs most first.
        text: what is the matter; repair: what mends it, code where there is some.
    """

    kind: str
    layers: tuple[str, ...]
    text: str
    repair: str


CALIBRATE = "bn.calibrate(net, batches)"
_RENORM = "bn.convert(net, renorm=bn.Renorm()), "  # which needs running statistics
KINDS: dict[str, str] = {
    "broken": "running statistics that are not finite, or a negative variance",
    "by_batch": "evaluation normalizes by the batch",
    "untrained": "running statistics as initialized",
    "young": "too few updates",
    "stale": "statistics of other data, or of earlier weights",
    "rounding": "the moving average's own rounding",
    "noisy_average": "the moving average remembers too few values",
    "several_places": "one layer at several places whose inputs differ",
    "unlike_batches": "batches that are not alike",
    "dropout": "dropout before batch norm",
    "small_batches": "few values share statistics",
    "dead": "channels that do not vary",
}
"""What can be found, the gravest first."""


def compare(
    name: str,
    layer: _BatchNorm,
    kept: Statistics | None,
    exact: Statistics | None,
    received: Received,
    effect: float | None,
    frozen: bool,
) -> LayerGap:
    """A layer's figures, and the cause that explains what it keeps.

    Args:
        kept: its running statistics; exact: those that `calibrate` measured; None where there are none.
        received: what it received; effect: see `LayerGap`; frozen: whether what it keeps normalizes in training, too.
    """
    training = received.training
    assert training is not None
    seen, eps = Statistics.of(training), layer.eps
    places_off = _places_off(received, eps)
    off: tuple[float | None, float | None] = (None, None)
    arrives = off
    by_sample = getattr(layer, "ghost_size", 0) == 1  # as group normalization: no other sample beside it counts
    cause = "by_batch" if (kept is None or uses_batch_statistics(layer)) and not by_sample else None
    if received.evaluation is None:  # a layer of training alone
        kept = exact = effect = cause = None
    if kept is not None and exact is not None:
        assert received.evaluation is not None
        off = kept.error(exact, eps)
        arrives = kept.error(Statistics.of(received.evaluation), eps)
        if frozen:
            cause = "broken" if kept.are_broken else None
        elif cause is None:
            cause = _cause(layer, kept, exact, received, (places_off or 0.0) > NOTICEABLE)
    data = exact or seen
    return LayerGap(
        name=name,
        type=type(layer).__name__,
        values_per_channel=sorted(received.values)[len(received.values) // 2],
        mean_off=off[0],
        std_off=off[1],
        arrives_mean_off=arrives[0],
        arrives_std_off=arrives[1],
        noise=_noise(received, eps)[0],
        frozen=frozen,
        unlike=_unlike(received),
        wider_in_training=None if exact is None else _wider(seen, exact, eps),
        dead=int((data.var < DEAD * eps).reshape(-1, layer.num_features).all(0).sum()),
        effect=effect,
        cause=cause,
        places=len(received.places),
        places_off=places_off,
    )


def _cause(layer: _BatchNorm, kept: Statistics, exact: Statistics, received: Received, differ: bool) -> str | None:
    """Which of `KINDS` explains what is kept; ``differ``: whether what arrives at the layer's places does."""
    assert received.training is not None
    if kept.are_broken:
        return "broken"
    error = max(kept.error(exact, layer.eps))
    if error <= NOTICEABLE:
        return None
    chance = [max(NOTICEABLE, SIGMAS * _remembered(layer) * noise) for noise in _noise(received, layer.eps)]
    if _is_rounding(layer, kept, exact, chance):
        return "rounding"
    within, seen = Statistics.of(received.training, within=True), Statistics.of(received.training)
    predictions = {
        "untrained": Statistics(torch.zeros_like(within.mean), torch.ones_like(within.var)),
        "several_places" if differ else "unlike_batches": _averaged(layer, received) if differ else within,
        "dropout": seen,
    }
    left = _left(layer)
    if left is not None and LEAST_LEFT < left < 1:
        predictions["young"] = Statistics((1 - left) * within.mean, left + (1 - left) * within.var, within.known)
    errors = {cause: kept.error(expected, layer.eps) for cause, expected in predictions.items()}
    nearest = min(errors, key=lambda cause: max(errors[cause]))
    if max(errors[nearest]) <= EXPLAINS * error:
        return nearest
    chances = {cause: errors[cause] for cause in ("several_places", "unlike_batches", "dropout") if cause in errors}
    by_chance = (all(map(operator.le, error, chance)) for error in chances.values())
    return "noisy_average" if any(by_chance) else "stale"


def _is_rounding(layer: _BatchNorm, kept: Statistics, exact: Statistics, chance: list[float]) -> bool:
    """Whether what is kept is as far from the data as a moving average stops short of them.

    A step of ``momentum * (batch - kept)`` that is below half a spacing of the buffer's dtype rounds to nothing: so the
    average stands still within ``spacing / (2 momentum)``, or twice that where the product is rounded, too.
    ``chance`` is how far noise may take it besides, in means and in standard deviations.
    """
    left, momentum, counter = _left(layer), _momentum(layer), layer.num_batches_tracked
    if (left is not None and left > LEAST_LEFT) or (counter is not None and not counter.any()):
        return False
    if momentum is None:
        momentum = 0.0 if counter is None else 1 / max(1.0, float(counter.max()))
    if not momentum:
        return False
    nearer = []
    for name, now, right in (("running_mean", kept.mean, exact.mean), ("running_var", kept.var, exact.var)):
        short = _spacing(now, getattr(layer, name).dtype) / momentum
        nearer.append(right + (now - right).sign() * ((now - right).abs() - short).clamp(min=0))
    mean, var = nearer
    before, after = (each.error(exact, layer.eps) for each in (kept, Statistics(mean, var, kept.known)))
    return all(map(operator.le, after, chance)) and not all(map(operator.le, before, chance))


def _spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of a dtype."""
    _, exponent = torch.frexp(value.abs().clamp(min=torch.finfo(dtype).tiny))
    return torch.finfo(dtype).eps * torch.exp2((exponent - 1).to(value.dtype))


def _averaged(layer: _BatchNorm, received: Received) -> Statistics:
    """What a moving average over calls at several places keeps: those after a call count for more by momentum."""
    momentum = _momentum(layer) or 0.0
    weights = [(1 - momentum) ** i for i in range(len(received.places))][::-1]
    each = [Statistics.of(p.training, within=True) for p in received.places if p.training is not None]
    mean, var = torch.zeros_like(each[0].mean), torch.zeros_like(each[0].var)
    for weight, statistics in zip(weights, each, strict=True):
        mean += weight / sum(weights) * statistics.mean
        var += weight / sum(weights) * statistics.var
    return Statistics(mean, var, each[0].known)


def _remembered(layer: _BatchNorm) -> float:
    """The standard deviation of a moving average, in those of a batch's statistics."""
    momentum = _momentum(layer)
    if momentum is None:
        return 0.0 if layer.num_batches_tracked is None else max(1.0, float(layer.num_batches_tracked.max())) ** -0.5
    return math.sqrt(momentum / (2 - momentum))


def _momentum(layer: _BatchNorm) -> float | None:
    """The share of a new batch in a moving average, or None where all batches count alike."""
    return None if isinstance(layer, Ours) and layer.running == "cumulative" else layer.momentum


def _left(layer: _BatchNorm) -> float | None:
    """The share of the initial values in a moving average, or None where that is not what is kept."""
    counter, momentum = layer.num_batches_tracked, _momentum(layer)
    is_debiased = isinstance(layer, Ours) and layer.running == "debiased"
    if is_debiased or counter is None or momentum is None:
        return None
    return float((1 - momentum) ** float(counter.max()))


def _noise(received: Received, eps: float) -> tuple[float, float]:
    """Standard deviation over the batches of their means, in those of the values, and of the logarithm of their
    standard deviations: within each place, the root mean square of all."""
    of_means, of_logs = [], []
    for place in received.places:
        means, variances = place.means, place.variances
        assert means is not None
        assert variances is not None
        size = variances.mean + eps
        of_means.append(float((means.variance(unbiased=True).nan_to_num() / size).mean()))
        of_logs.append(float((variances.variance(unbiased=True).nan_to_num() / (2 * size).square()).mean()))
    return math.sqrt(sum(of_means) / len(of_means)), math.sqrt(sum(of_logs) / len(of_logs))


def _places_off(received: Received, eps: float) -> float | None:
    """The largest difference between what arrives at one place and at all; None where there is one place."""
    if len(received.places) < 2 or received.training is None:
        return None
    whole = Statistics.of(received.training)
    each = [Statistics.of(place.training).error(whole, eps) for place in received.places if place.training is not None]
    return max(max(error) for error in each)


def _unlike(received: Received) -> float | None:
    """F = (variance between batches) / (variance within) of the means of samples, mean over channels and places."""
    found = [_unlike_at(place.samples) for place in received.places if place.samples is not None]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _unlike_at(samples: Estimate) -> float | None:
    batches = int(samples.uses)
    if batches < FEWEST_BATCHES or not bool((samples.degrees_within > 0).any()):
        return None
    within = samples.m2_within / samples.degrees_within.clamp(min=1)
    between = (samples.pooled.m2 - samples.m2_within).clamp(min=0) / (batches - 1)
    varying = within > 1e-12 * (samples.pooled.mean.square() + within)
    return float((between / within)[varying].mean()) if bool(varying.any()) else None


def _wider(seen: Statistics, exact: Statistics, eps: float) -> float:
    """Standard deviation in training over that without dropout, the geometric mean of all channels."""
    known = seen.known if seen.known is not None else torch.ones_like(seen.mean, dtype=torch.bool)
    logs = ((seen.var + eps) / (exact.var + eps)).log()[known] / 2
    return float(logs.mean().exp()) if logs.numel() else 1.0


def findings(layers: list[LayerGap], batches: int, net: nn.Module) -> tuple[Finding, ...]:
    """What the layers' figures say, the gravest first."""
    about: dict[str, list[LayerGap]] = {kind: [] for kind in KINDS}
    for layer in layers:
        if layer.cause is not None:
            about[layer.cause].append(layer)
        if layer.frozen:
            continue
        if (layer.places_off or 0.0) > NOTICEABLE and layer.cause != "several_places":
            about["several_places"].append(layer)
        if _is_unlike(layer, batches) and layer.cause != "unlike_batches":
            about["unlike_batches"].append(layer)
        elif not _is_unlike(layer, batches) and layer.noise > NOISY:
            about["small_batches"].append(layer)
        wider = layer.wider_in_training
        if wider is not None and abs(math.log(wider)) > NOTICEABLE and layer.cause != "dropout" and _dropouts(net):
            about["dropout"].append(layer)
        if layer.dead:
            about["dead"].append(layer)
    found = []
    for kind, members in about.items():
        if members:
            members = sorted(members, key=lambda layer: -(layer.effect or 0.0))
            text, repair = _described(kind, members, len(layers), net)
            found.append(Finding(kind, tuple(layer.name for layer in members), text, repair))
    return tuple(found)


def _is_unlike(layer: LayerGap, batches: int) -> bool:
    """Whether F is beyond four standard deviations of what random batches give; less would do for many channels."""
    return layer.unlike is not None and layer.unlike > 1 + 4 * math.sqrt(2 / (batches - 1))


def _dropouts(net: nn.Module) -> list[str]:
    """Modules that are random in training, as far as their names tell."""
    return [name for name, module in net.named_modules() if "drop" in type(module).__name__.lower()]


def _running_again(layers: list[nn.Module]) -> str:
    """What makes running statistics normalize in evaluation, in the order in which it is done."""
    steps = []
    if any(getattr(layer, "source", "auto") == "batch" for layer in layers):
        steps.append("bn.set_mode(net, source='auto')")
    lack = any(layer.running_mean is None for layer in layers)
    steps.append("bn.calibrate(net, batches, track_running_stats=True)" if lack else CALIBRATE)
    return "; ".join(steps)


def _described(kind: str, members: list[LayerGap], total: int, net: nn.Module) -> tuple[str, str]:
    """Text and repair of a finding about these layers, the one with the largest effect first."""
    first = members[0]
    layer = net.get_submodule(first.name)
    assert isinstance(layer, _BatchNorm)
    momentum, of = _momentum(layer), f"{len(members)} of {total} layer{'s' * (total > 1)}"
    moves = ""
    if first.effect is not None:
        moves = f", and alone moves the outputs by {first.effect:.2f} of their standard deviation"
    off = (
        f"`{first.name}` is off by {first.mean_off or 0:.2f} standard deviations in the mean and by a factor of "
        f"{math.exp(first.std_off or 0):.2f} in the standard deviation{moves}."
    )
    if kind == "broken":
        return f"The running statistics of {of} are not finite, or have a negative variance.", CALIBRATE
    if kind == "by_batch":
        return (
            f"In evaluation, statistics of the batch normalize {of}: the output for a sample depends on the others "
            "beside it.",
            _running_again([net.get_submodule(member.name) for member in members]),
        )
    if kind == "untrained":
        why = "momentum is 0, so no batch changes them" if momentum == 0 else "training has not changed them"
        return f"The running statistics of {of} are the initial mean 0 and variance 1: {why}. {off}", CALIBRATE
    if kind == "young":
        left = _left(layer) or 0.0
        return (
            f"The running statistics of {of} have seen too few batches: at momentum {momentum:g}, "
            f"{100 * left:.0f} % of the initial mean 0 and variance 1 is left. {off}",
            CALIBRATE + "; in training, running='debiased'",
        )
    if kind == "stale":
        return (
            f"The running statistics of {of} are not those of these data under the present weights, but of other data "
            f"or of earlier weights. {off}",
            CALIBRATE + " on the data to serve; bn.adapt(net, batches, prior=...) keeps part of the old",
        )
    if kind == "rounding":
        dtype = str(layer.running_mean.dtype if layer.running_mean is not None else "").removeprefix("torch.")
        step = "1/t" if momentum is None else f"{momentum:g}"
        return (
            f"The running statistics of {of} stand still short of the data: a step of {step} of what is missing is "
            f"less than half of the distance between two {dtype} numbers of that size, and rounds to nothing. {off}",
            CALIBRATE + "; in training, bn.convert(net), whose averages carry what rounding leaves; centred inputs, or "
            "the layer in " + ("float64" if dtype in ("float32", "float64") else "float32"),
        )
    if kind == "noisy_average":
        remembered = "the batches so far" if momentum is None else f"about {(2 - momentum) / momentum:.2g} batches"
        return (
            f"The running statistics of {of} are as far off as chance makes an average over {remembered}. {off}",
            CALIBRATE + "; in training, a smaller momentum or larger batches",
        )
    if kind == "several_places":
        widest = max(members, key=lambda member: member.places_off or 0.0)
        return (
            f"`{widest.name}` is used at {widest.places} places whose inputs differ, by up to {widest.places_off:.2f} "
            "standard deviations from what arrives at all of them. In training each place is normalized by its own "
            "statistics, in evaluation all places by one set, which fits none of them.",
            "give each place a layer of its own; then train on, or " + CALIBRATE,
        )
    if kind == "unlike_batches":
        times = math.sqrt(max(member.unlike or 1.0 for member in members))
        return (
            f"The batches are not alike: in {of} their means vary {times:.1f} times as much as those of random batches "
            "would. They are sorted, or each is from a source of its own. The differences between batches are in no "
            "batch's variance, and so not in a moving average of them.",
            "shuffle the training data; " + CALIBRATE + " counts the variance between batches",
        )
    if kind == "dropout":
        names = [f"`{name}`" for name in _dropouts(net)]
        wider = max((member.wider_in_training or 1.0 for member in members), key=lambda ratio: abs(math.log(ratio)))
        return (
            f"The inputs of {of} have up to {wider:.2f} times the standard deviation in training that they have in "
            f"evaluation: dropout comes before batch norm ({', '.join(names[:3])}{', ...' * (len(names) > 3)}).",
            "move dropout behind the last batch norm; " + CALIBRATE + " measures without it",
        )
    if kind == "small_batches":
        noisiest = max(members, key=lambda member: member.noise)
        return (
            f"Few values share statistics: the means of `{noisiest.name}` vary by {noisiest.noise:.2f} standard "
            f"deviations from batch to batch ({noisiest.values_per_channel:,} values a channel). Running statistics "
            "cannot reproduce that noise.",
            "larger batches; "
            + ("" if any(net.get_submodule(m.name).running_mean is None for m in members) else _RENORM)
            + "bn.convert(net, channel_groups=...), or process_group='world' across ranks",
        )
    assert kind == "dead", kind
    count = sum(member.dead for member in members)
    return (
        f"In {of}, {count:,} channel{'s do' if count > 1 else ' does'} not vary: the output is beta, and what comes "
        "before gets no gradient through it.",
        "look at what feeds it: a dead ReLU, weights that decayed to zero, a constant input feature",
    )
