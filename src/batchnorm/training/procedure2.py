"""Procedure 2 of Ioffe & Szegedy (2015): from a plain network to a proven network for inference."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm.training.files as files
from batchnorm import Standardize, __version__, calibrate, convert, fold, freeze
from batchnorm.errors import BatchNormError, DataError, InputError, SurgeryError, WriteError, message_of
from batchnorm.memory import is_exhausted
from batchnorm.surgery.insertion import NothingToInsertError, plan_insertion
from batchnorm.training.config import ResolvedConfig, TrainConfig
from batchnorm.training.datasets import Dataset, load_data
from batchnorm.training.export import EXPORTED_FILES, export_network
from batchnorm.training.files import CERTIFICATE, CHECKPOINT, CONFIG, METRICS, REPORT
from batchnorm.training.loop import (
    Contender,
    Interrupted,
    Probe,
    Progress,
    batch_order,
    evaluate,
    load_checkpoint,
    make_optimizer,
    train_steps,
)
from batchnorm.training.networks import (
    ONE_TENSOR,
    Rescale,
    SequenceClassifier,
    build_network,
    modules_called,
    outline,
)
from batchnorm.training.ranks import Ranks, check_parts, joined, restarts
from batchnorm.training.results import (
    Calibration,
    ClassAccuracy,
    Curve,
    InferenceTime,
    Insertion,
    LayerStatistics,
    TrainResult,
)
from batchnorm.training.samples import Parts, Samples
from batchnorm.training.shards import gathered, remove_shards, shard
from batchnorm.undo import evaluating, in_mode
from batchnorm.writing import alone_in

EXAMPLE_BATCH = 256
TIMING_ROUNDS = 31

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Train a network with batch norm, and turn it into a proven network for inference.

    1. Build the network; a copy gets batch norm by `insert`, which drops the biases that it makes
       redundant. The baseline is the network as it was built. One whose layers all have batch norm
       of their own is trained as it is, and has no baseline.
    2. Train both on the same batches.
    3. `calibrate`: exact population statistics in place of the moving averages.
    4. `freeze`, `fold`, verify.
    5. Write every form of it into the run folder, each checked against the unfolded network.

    Returns:
        The findings; the run folder holds config.json, metrics.json, certificate.json,
        checkpoint.pt and the exported files. `batchnorm.report.write_report` adds the page.

    Raises:
        InputError, DataError, SurgeryError, MissingDependencyError: before anything is written.
        Interrupted: on Ctrl-C or SIGTERM in training, with the checkpoint written.
    """
    resolved = config.resolve()
    if restarts() and config.out is not None and (Path(config.out) / CONFIG).exists():
        return resume(config.out, progress=progress)  # torchrun has started the ranks anew
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0") and config.out is None:
        raise InputError("train: got out=None under --max-restarts; give --out, so that a restart finds the run again.")
    with _settings(resolved), _joined(resolved) as ranks:
        if (out := config.out) is not None:  # before data are read and a network is built
            ranks.from_first(lambda: files.check_run_folder(Path(out), overwrite=config.overwrite))
        run = _Run.build(resolved, progress if ranks.is_first else None, ranks)
        with ExitStack() as taken:
            run.folder = Path(ranks.from_first(lambda: str(_take_folder(config, taken))))
            if ranks.is_first:
                files.write_json(run.folder / CONFIG, {"config": run.config.to_dict(), "data": run.data.to_dict()})
            return run.complete(start=0)


def resume(folder: str | Path, *, steps: int | None = None, progress: Progress | None = None) -> TrainResult:
    """Go on with an interrupted run, to the same final bits as if it had never stopped.

    Args:
        folder: its run folder.
        steps: a new number of steps in all, to train a finished run for longer.
        progress: what watches the run.

    Raises:
        DataError: config.json or the checkpoint is missing, damaged, or does not fit the data or
            the network.
        InputError: `steps` is below what was done already, or another process writes into the folder.
    """
    folder = Path(folder)
    resolved = _read_config(folder / CONFIG)
    if steps is not None:
        resolved = dataclasses.replace(resolved, steps=steps)
        resolved.check()
    with _settings(resolved), _joined(resolved) as ranks, ExitStack() as taken:
        ranks.from_first(lambda: taken.enter_context(alone_in(folder)))
        run = _Run.build(resolved, progress if ranks.is_first else None, ranks)
        run.folder = folder
        if not ranks.from_first((folder / CHECKPOINT).exists):  # stopped before the first checkpoint
            return run.complete(start=0)
        start = load_checkpoint(folder / CHECKPOINT, run.contenders, run.data, ranks)
        if start > resolved.steps:
            raise InputError(
                f"resume {folder}: {start} steps are done, steps={resolved.steps} asks for fewer. "
                f"Give steps={start} or more."
            )
        if steps is not None and ranks.is_first:
            files.write_json(folder / CONFIG, {"config": resolved.to_dict(), "data": run.data.to_dict()})
        return run.complete(start=start)


@dataclasses.dataclass
class _Run:
    """What a run is made of, and its way through Procedure 2."""

    config: ResolvedConfig
    data: Dataset
    contenders: dict[str, Contender]
    insertions: list[Insertion]
    skipped: dict[str, str]
    parameters: dict[str, int]
    probe: str
    progress: Progress | None
    ranks: Ranks
    warnings: list[str] = dataclasses.field(default_factory=list)
    folder: Path = Path()

    @classmethod
    def build(cls, config: ResolvedConfig, progress: Progress | None, ranks: Ranks | None = None) -> _Run:
        """Load the data, build the networks, and check that they fit; writes nothing."""
        ranks = ranks or Ranks()
        _stage(progress, f"loading {config.data}")
        data = load_data(config.data, seed=config.seed, labels=config.labels, task=config.task, samples=config.samples)
        if len(data.x_train) < config.batch_size:
            raise DataError(
                f"data {config.data}: {len(data.x_train)} training samples do not make one batch "
                f"of {config.batch_size}. Give a smaller --batch-size."
            )
        check_parts(ranks, config.batch_size, len(data.x_train))
        torch.manual_seed(config.seed)
        plain = build_network(config.network, data.input_shape, data.num_classes, config.arguments)
        first = None
        if data.standardize:
            first = Standardize(data.input_shape[0])
            first.fit(data.x_train.split(config.batch_size))
        example = data.x_train[: max(2, min(config.batch_size, EXAMPLE_BATCH))]
        last = _rescale(data.y_train) if data.task == "regression" else None
        check_output(config.network, plain if first is None else nn.Sequential(first, plain), example, data)
        _stage(progress, "inserting batch norm")
        made = normalize_network(plain, first, last, example, config)
        warnings = _warnings(made, data, example)
        for text in warnings:
            _stage(progress, f"note: {text}")
        networks = {"batch norm": made.normalized}
        if config.baseline:
            networks["baseline"] = made.plain
        config = _measured_seldom(config, len(data.x_test))
        rates = {"batch norm": config.lr, "baseline": config.baseline_lr}
        contenders = {}
        for name, network in networks.items():
            network = in_mode(ranks.prepare(network).to(config.device), True)
            whole = copy.deepcopy(network) if ranks.sharded else None
            if ranks.sharded:
                network = shard(network, example.to(config.device), torch.device(config.device))
            optimizer = make_optimizer(network, config, rates[name])
            curve = Curve(task=data.task)
            parallel = ranks.parallel(network)
            contenders[name] = Contender(network, optimizer, made.probes[name], parallel, whole, curve)
        if ranks.rank:  # dropout of the ranks' own; that of rank 0 is that of one process
            torch.manual_seed((config.seed + ranks.rank * 1_000_003) % 2**63)
        parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        made_of = (made.insertions, made.skipped, parameters, made.words, progress)
        return cls(config, data, contenders, *made_of, ranks, warnings=warnings)

    def complete(self, start: int) -> TrainResult:
        """Train from step `start` on, then calibrate, freeze, fold, verify and export."""
        checkpoint = self.folder / CHECKPOINT
        _stage(self.progress, "training")
        with files.going_on_from(self.folder, checkpoint):
            train_steps(
                self.contenders,
                self.data,
                self.config,
                checkpoint,
                start=start,
                progress=self.progress,
                ranks=self.ranks,
            )
        try:
            with files.going_on_from(self.folder, checkpoint):
                return self._conclude()
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped after the training, which {checkpoint} holds. Go on with: "
                f"batchnorm train --resume {self.folder}"
            ) from None

    def _conclude(self) -> TrainResult:
        """All that comes after the training, and metrics.json."""
        contender = self.contenders["batch norm"]
        if contender.whole is not None:
            with self.ranks.watched("parameters"):
                contender.network = gathered(contender.network, contender.whole)
        normalized = contender.network
        result = TrainResult(
            folder=self.folder,
            config=self.config,
            environment=environment(self.config, self.ranks),
            data=self.data.to_dict(),
            insertions=self.insertions,
            skipped=self.skipped,
            parameters=self.parameters,
            probe=self.probe,
            curves={name: contender.curve for name, contender in self.contenders.items()},
            network=normalized,
            example=self.data.x_test[:EXAMPLE_BATCH],
            warnings=self.warnings,
        )
        if not self.ranks.is_alone:
            speeds = self.ranks.gather(result.curves["batch norm"].seconds)
            result.environment["seconds of training by rank"] = ", ".join(f"{seconds:.1f}" for seconds in speeds)
        if not result.diverged:
            try:
                self._finish(result, normalized)
            except WriteError:
                raise
            except BatchNormError as error:  # the measurements of the training shall not be lost
                result.failure = str(error)
        if self.ranks.is_first:
            files.write_json(self.folder / METRICS, result.to_dict())
        return result

    def _finish(self, result: TrainResult, network: nn.Module) -> None:
        """Procedure 2 from line 8 on: population statistics, then the network for inference."""
        _stage(self.progress, "calibrating: exact population statistics")
        result.calibration = _calibrate(network, self.data, self.config, self.ranks)
        self.ranks.check_equal(network, "the calibrated network")
        if not self.ranks.is_first:  # one rank folds, exports and writes
            return
        if not self.ranks.is_alone:
            network = convert(network, process_group=None)
            result.network = network
        freeze(network)
        network.cpu().eval()
        result.classes, result.predictions = _judged(network, self.data)
        _stage(self.progress, "folding and verifying")
        try:
            folded = fold(network, result.example)
        except SurgeryError as error:  # the trained network shall not be lost with its fold
            result.fold_refusal = str(error)
        else:
            result.folded, result.certificate = folded.model, folded.certificate
            files.write_json(self.folder / CERTIFICATE, folded.certificate.to_dict())
        _stage(self.progress, "exporting and checking every form")
        final = network if result.folded is None else result.folded
        result.exports = export_network(final, network, result.example, self.folder)
        if result.folded is not None:
            _stage(self.progress, "timing inference")
            result.inference_time = _time_inference(network, result.folded, result.example)


def _calibrate(network: nn.Module, data: Dataset, config: ResolvedConfig, ranks: Ranks | None = None) -> Calibration:
    """Replace the moving averages by population statistics over the training part."""
    ranks = ranks or Ranks()
    loss_moving, accuracy_moving, _ = evaluate(network, data)
    moving = {name: _statistics(layer) for name, layer in _norms(network)}
    batches = _calibration_batches(data.x_train, config)
    if ranks.is_alone:
        calibrate(network, batches, method=config.method)
    else:
        mine = batches.every(ranks.size, ranks.rank)
        with ranks.watched("the statistics of the population"):
            calibrate(network, mine, method=config.method, process_group="world")
    loss_exact, accuracy_exact, _ = evaluate(network, data)
    layers = [_compare(name, moving[name], _statistics(layer), layer.eps) for name, layer in _norms(network)]
    return Calibration(
        method=config.method,
        batches=len(batches),
        samples=batches.samples,
        layers=layers,
        accuracy_moving=accuracy_moving,
        accuracy_exact=accuracy_exact,
        loss_moving=loss_moving,
        loss_exact=loss_exact,
    )


def _calibration_batches(x: Tensor | Samples, config: ResolvedConfig) -> Parts:
    """The training part in batches, in a random order: "ioffe" needs them of one size, "pooled"
    takes the incomplete last one too."""
    order = batch_order(len(x), config.seed, 0)
    smallest = config.batch_size if config.method == "ioffe" else 2
    return Parts(x, [part for part in order.split(config.batch_size) if len(part) >= smallest], config.device)


def _norms(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The batch norm layers that keep running statistics."""
    for name, module in network.named_modules():
        if _is_norm(module) and module.running_mean is not None:
            yield name, module


def _statistics(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.running_mean.detach().double().cpu(), layer.running_var.detach().double().cpu()


def _compare(name: str, moving: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], eps: float) -> LayerStatistics:
    (mean_moving, var_moving), (mean, var) = moving, exact
    ratio = (var_moving + eps) / (var + eps)
    return LayerStatistics(
        layer=name,
        num_features=len(mean),
        mean_shift=float(((mean_moving - mean).abs() / (var + eps).sqrt()).max()),
        variance_ratio_min=float(ratio.min()),
        variance_ratio_max=float(ratio.max()),
    )


def _rescale(y: Tensor) -> Rescale:
    """The last layer of a regression: outputs in the units of the targets."""
    y = y.double()
    return Rescale(y.mean(0).float(), y.std(0, unbiased=False).float())


def _measured_seldom(config: ResolvedConfig, test_samples: int) -> ResolvedConfig:
    """Unless it was given, an interval in which measuring the test part costs no more than training."""
    if config.eval_every_given:
        return config
    at_least = -(-test_samples // (3 * config.batch_size))
    return dataclasses.replace(config, eval_every=min(config.steps, max(config.eval_every, at_least)))


def _warnings(made: Normalized, data: Dataset, example: Tensor) -> list[str]:
    """What in network and data is likely not meant."""
    found = []
    with evaluating(made.plain), torch.no_grad():
        output = made.plain(example)
    within = data.task == "classification" and bool(((output >= 0) & (output <= 1)).all())
    if within and ((output.sum(1) - 1).abs() < 1e-4).all():
        found.append(
            "The network ends in a softmax, and cross-entropy takes logits and applies one itself: gradients become "
            "small. Leave the softmax out of the network."
        )
    elif within:
        found.append(
            "The outputs of the network lie between 0 and 1, as after a sigmoid, and cross-entropy takes logits: with "
            "these it cannot become sure of a class. Leave the sigmoid out of the network."
        )
    recurrent = _recurrent_without_norm(made.normalized)
    if recurrent:
        found.append(recurrent)
    if data.task == "classification":
        found += _imbalance(data)
    return found


def _recurrent_without_norm(network: nn.Module) -> str | None:
    """A sentence about the first recurrent layer of a network that normalizes nothing inside."""
    for name, module in network.named_modules():
        kind = next((kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, kind)), None)
        if kind is not None and not any(_is_norm(inside) for inside in module.modules()):
            return (
                f"The recurrent layer {name or 'network'} has no batch norm inside: bn.{kind.__name__}(..., "
                "batch_norm='sequence') in its place has, and is trained, calibrated and folded with the rest."
            )
    return None


def _imbalance(data: Dataset) -> list[str]:
    counts = torch.bincount(data.y_test, minlength=data.num_classes)
    found = []
    largest = int(counts.argmax())
    share = float(counts[largest]) / max(1, int(counts.sum()))
    if share > max(0.5, 1.5 / data.num_classes):
        found.append(
            f"{100 * share:.1f} % of the test samples are of class {data.classes[largest]}: a network that always "
            "answers it has that accuracy."
        )
    few = [data.classes[k] for k in torch.nonzero(counts < 2).flatten().tolist()] if data.classes else []
    if few:
        shown = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
        found.append(f"{len(few)} of {len(counts)} classes have one test sample or none: {shown}.")
    return found


def _judged(network: nn.Module, data: Dataset) -> tuple[list[ClassAccuracy], Tensor | None]:
    """How each class fares, or targets and predictions of a regression, over the test part."""
    said = torch.empty_like(data.y_test)  # made once, so that memory stays in one piece
    with evaluating(network), torch.no_grad():
        for part in torch.arange(len(data.y_test)).split(EXAMPLE_BATCH):
            outputs = network(data.x_test[part])
            said[part] = outputs.reshape(said[part].shape) if data.task == "regression" else outputs.argmax(1)
    if data.task == "regression":
        return [], torch.stack([data.y_test, said], 1)[:2000]
    right = said == data.y_test
    sizes, hits, trained = (
        torch.bincount(y, minlength=data.num_classes).tolist() for y in (data.y_test, data.y_test[right], data.y_train)
    )
    labels = data.classes or tuple(map(str, range(data.num_classes)))
    return [
        ClassAccuracy(label, n, size, hit / size if size else None)
        for label, n, size, hit in zip(labels, trained, sizes, hits, strict=True)
    ], None


def check_output(spec: str, network: nn.Module, example: Tensor, data: Dataset) -> None:
    """One forward pass in evaluation mode: (N, *input_shape) must give logits (N, classes), or targets (N, K).

    Raises:
        InputError: it does not, or the network `spec` does not take the example.
    """
    num_classes = data.num_classes
    try:
        with evaluating(network), torch.no_grad():
            output = network(example)
    except Exception as error:
        if is_exhausted(error):
            raise
        hint = " If they are images, give --samples images." if example.ndim == 3 else ""
        looks = " Their shape looks like (N, H, W, C); torch expects (N, C, H, W)."
        raise InputError(
            f"network {spec}: it does not take the data's batches of shape "
            f"{tuple(example.shape)} ({type(error).__name__}: {message_of(error)}). {ONE_TENSOR}"
            + (looks if example.ndim == 4 and example.shape[-1] in (1, 3, 4) and example.shape[1] > 4 else hint)
        ) from error
    returns = f"for a batch of shape {tuple(example.shape)} it returns {outline(output)}"
    alone = "" if isinstance(output, Tensor) else " Let the factory return a module that gives them alone."
    if data.task == "regression":
        expected = (len(example), num_classes)
        if not isinstance(output, Tensor) or tuple(output.shape) not in (expected, expected[: 2 - (num_classes == 1)]):
            raise InputError(
                f"network {spec}: {returns}, expected {expected}, the targets of each sample.{alone} If the labels are "
                "classes, give --task classification."
            )
        return
    fits = isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(example)
    if not fits or output.shape[1] < num_classes:
        raise InputError(
            f"network {spec}: {returns}, expected logits of shape ({len(example)}, {num_classes}), one for each class."
            f"{alone}"
        )


def _calls(network: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """Linear, convolution and batch norm layers in the order in which a forward pass calls them."""
    names = {module: name for name, module in network.named_modules()}
    called = modules_called(network, example)
    return [(names[module], module) for module in called if isinstance(module, _LAYERS) or _is_norm(module)]


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A batch norm layer's call, and the layer called last before it, in both networks."""

    norm: tuple[str, Any]
    layer: tuple[str, nn.Module]
    plain_layer: tuple[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Normalized:
    """A network without and with batch norm.

    Args:
        plain: the network as it was built, with its first and last layer for the data.
        normalized: the same with batch norm, from the same weights.
        insertions: what was put in.
        skipped: layers that were left out, each with the reason.
        probes: of each of the two, with what they are in `words`.
    """

    plain: nn.Module
    normalized: nn.Module
    insertions: list[Insertion]
    skipped: dict[str, str]
    probes: dict[str, Probe]
    words: str


def normalize_network(
    plain: nn.Module, first: nn.Module | None, last: nn.Module | None, example: Tensor, config: ResolvedConfig
) -> Normalized:
    """Put batch norm into a copy of a network, and the data's first and last layer around both."""
    around: OrderedDict[str, nn.Module] = OrderedDict()
    if first is not None:
        around["standardize"] = first
    around["network"] = plain
    if isinstance(plain, SequenceClassifier):  # whose recurrence normalizes inside
        classifier = plain.with_batch_norm(batch_norm="sequence")
        skipped, insertions, (probes, words) = dict[str, str](), _inside(classifier), _class_probes()
        normalized: nn.Module = classifier
        if len(around) > 1 or last is not None:
            raise InputError("network lstm: it takes classes of sequences; give a factory of your own.")
        return Normalized(plain, normalized, insertions, skipped, probes, words)
    whole = nn.Sequential(around) if first is not None or last is not None else plain
    normalized = copy.deepcopy(whole)
    skipped = _insert(normalized, example, config)
    placed = _placed(whole, normalized, example)
    insertions = _insertions(whole, placed)
    probes, words = _probes(placed, config.placement, "network" if whole is not plain else "")
    if last is not None:
        whole.add_module("rescale", last)
        normalized.add_module("rescale", copy.deepcopy(last))
    return Normalized(whole, normalized, insertions, skipped, probes, words)


def _insert(network: nn.Module, example: Tensor, config: ResolvedConfig) -> dict[str, str]:
    """Puts batch norm in; which layers were left out, and why: all, where the network has come with its own."""
    try:
        plan = plan_insertion(network, example, placement=config.placement)
    except NothingToInsertError as nothing:
        if not any(_is_norm(module) for module in network.modules()):
            hint = _recurrent_without_norm(network)
            if hint is None:
                raise
            raise NothingToInsertError(f"{nothing}. {hint}", nothing.skipped) from nothing
        if config.baseline or config.placement != "before_activation":
            raise InputError(
                f"network {config.network}: it comes with its own batch norm, which is trained as it is, so it has no "
                "--baseline and no other --placement; leave these out, or give a network without batch norm."
            ) from nothing
        return nothing.skipped
    except SurgeryError as error:  # whose remedy is an argument that a training has not
        reason = str(error).partition(" Mend this")[0].removesuffix(".")
        raise SurgeryError(
            f"network {config.network}: {reason}. Mend this in the network, or put batch norm in yourself: "
            "bn.insert(net, example, skip=[...]) in the factory."
        ) from error
    plan.apply()
    return plan.skipped


def _placed(plain: nn.Module, normalized: nn.Module, example: Tensor) -> list[_Placed]:
    """Batch norm layers in calling order; the n-th layer call is the n-th in both networks."""
    plain_layers = [call for call in _calls(plain, example) if isinstance(call[1], _LAYERS)]
    layers: list[tuple[str, nn.Module]] = []
    placed = []
    for call in _calls(normalized, example):
        if isinstance(call[1], _LAYERS):
            layers.append(call)
        elif layers:
            placed.append(_Placed(call, layers[-1], plain_layers[len(layers) - 1]))
    return placed


def _insertions(plain: nn.Module, placed: list[_Placed]) -> list[Insertion]:
    """What `insert` did, read off the two networks."""
    old = {name for name, module in plain.named_modules() if _is_norm(module)}
    return [
        Insertion(
            layer=place.norm[0],
            kind=type(place.norm[1]).__name__,
            num_features=place.norm[1].num_features,
            after=place.plain_layer[0],
            bias_removed=place.plain_layer[1].bias is not None and place.layer[1].bias is None,
        )
        for place in {place.norm[0]: place for place in placed}.values()
        if place.norm[0] not in old
    ]


def _probes(placed: list[_Placed], placement: str, prefix: str) -> tuple[dict[str, Probe], str]:
    """Where one unit's input to the last hidden activation is found in each network, in words."""
    if not placed:  # batch norm that no layer stands before, as on the input
        return dict.fromkeys(("batch norm", "baseline"), Probe(prefix, axis=-1)), "output 0 of the network"
    last = placed[-1]
    source = last.norm if placement == "before_activation" else last.layer
    probes = {"batch norm": _probe(*source), "baseline": _probe(*last.plain_layer)}
    unit = "unit" if isinstance(last.layer[1], nn.Linear) else "channel"
    words = (
        f"{unit} 0 of layer {last.plain_layer[0]} (with batch norm: the output of {source[0]}), chosen before training"
    )
    return probes, words


def _inside(network: SequenceClassifier) -> list[Insertion]:
    """The normalizations of a recurrent layer, each of which normalizes a product with one of its weights."""
    return [
        Insertion(
            layer=f"recurrent.{name}",
            kind=type(norm).__name__,
            num_features=norm.num_features,
            after=f"recurrent.{name.replace('norm', 'weight')}",
            bias_removed=True,
        )
        for name, norm in network.recurrent.named_children()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
    ]


def _class_probes() -> tuple[dict[str, Probe], str]:
    return dict.fromkeys(("batch norm", "baseline"), Probe("classes", axis=-1)), "the logit of class 0"


def _probe(name: str, module: nn.Module) -> Probe:
    last = isinstance(module, nn.Linear) or getattr(module, "channels_last", False)
    return Probe(name, axis=-1 if last else 1)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, Standardize)


def _time_inference(unfolded: nn.Module, folded: nn.Module, example: Tensor) -> InferenceTime:
    """Forward passes of both by turns, so that a change of the machine's pace meets both."""
    times: dict[str, list[float]] = {"unfolded": [], "folded": []}
    with evaluating(unfolded), evaluating(folded), torch.no_grad():
        for round_number in range(TIMING_ROUNDS + 3):
            for name, network in (("unfolded", unfolded), ("folded", folded)):
                began = time.perf_counter()
                network(example)
                if round_number >= 3:  # the first rounds warm up
                    times[name].append((time.perf_counter() - began) * 1e3)
    ratios = [a / b for a, b in zip(times["unfolded"], times["folded"], strict=True)]
    return InferenceTime(
        batch=len(example),
        rounds=TIMING_ROUNDS,
        unfolded_ms=statistics.median(times["unfolded"]),
        folded_ms=statistics.median(times["folded"]),
        speedup=statistics.median(ratios),
    )


def environment(config: ResolvedConfig, ranks: Ranks | None = None) -> dict[str, str]:
    """Versions and machine, for the report."""
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "batchnorm": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({name})",
        "CPU threads": str(torch.get_num_threads()),
        **(
            {"ranks": f"{ranks.size}, statistics {config.statistics}" + ", sharded in bfloat16" * config.fsdp}
            if ranks is not None and not ranks.is_alone
            else {}
        ),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _joined(config: ResolvedConfig) -> AbstractContextManager[Ranks]:
    """This process among the ranks of the run."""
    return joined(config.device, config.statistics == "synchronized", config.timeout, config.fsdp)


@contextmanager
def _settings(config: ResolvedConfig) -> Iterator[None]:
    """The threads and the determinism of `config`; afterwards as before."""
    _check_device(config.device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cudnn = torch.backends.cudnn
    try:
        # A context of its own: a plain assignment is refused where torch's flags have been made read-only.
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=True, allow_tf32=cudnn.allow_tf32):
            yield
    finally:
        torch.set_num_threads(threads)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise InputError(f"train: device={device!r} cannot be used ({reason}).") from error


def _take_folder(config: TrainConfig, taken: ExitStack) -> Path:
    """The folder of a new run, from which other processes are kept until `taken` is closed."""
    if config.out is not None:
        folder = Path(config.out)
    else:
        stem = f"{_short(config.network)}-{_short(config.data)}"
        folder = files.next_run_folder(Path("runs"), stem)
    taken.enter_context(files.run_folder(folder, overwrite=config.overwrite))
    if config.overwrite:  # what is left of an older run must not pass for this one's
        for name in (REPORT, CHECKPOINT, METRICS, CERTIFICATE, *EXPORTED_FILES):
            (folder / name).unlink(missing_ok=True)
        remove_shards(folder)
    return folder


def _short(spec: str) -> str:
    """A folder-name's worth of a network or data spec."""
    return Path(spec).stem if "/" in spec else Path(spec.rpartition(":")[2]).stem


def _read_config(path: Path) -> ResolvedConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = ResolvedConfig.from_dict(values)
    except OSError as error:
        raise DataError(
            f"resume {path.parent}: {path.name} cannot be read ({error.strerror or error}); "
            "expected the folder of a run."
        ) from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"resume {path.parent}: {path.name} is damaged or of another version ({error}).") from error
    return config


def _stage(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress.stage(text)
