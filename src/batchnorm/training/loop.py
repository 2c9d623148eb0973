"""The training loop: networks side by side on the same batches, measured and checkpointed."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, DataError
from batchnorm.training import shards
from batchnorm.training.config import ResolvedConfig
from batchnorm.training.datasets import Dataset
from batchnorm.training.objectives import Classification, Regression, objective_of
from batchnorm.training.ranks import Ranks
from batchnorm.training.results import PERCENTILES, Curve
from batchnorm.undo import evaluating
from batchnorm.writing import writing

CHECKPOINT_SECONDS = 30.0
EVALUATION_BATCH = 500
MAX_PROBED = 1_000_000  # values that one percentile is taken of


HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # a terminal that was closed


class Interrupted(BatchNormError):  # noqa: N818, a signal is no error
    """Training was stopped by a signal; the checkpoint holds all that was done."""


class Progress(Protocol):
    """What watches a run; the command line draws a bar with it."""

    def stage(self, text: str) -> None:
        """A new part of the run has begun."""

    def step(self, step: int, steps: int, curves: dict[str, Curve]) -> None:
        """`step` of `steps` updates are done."""


@dataclass
class Contender:
    """One network in training, with what was measured of it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    probe: Probe
    parallel: nn.Module | None = None  # what is called in training, where it is not the network itself
    whole: nn.Module | None = None  # the network before its parameters were cut over ranks
    curve: Curve = field(default_factory=Curve)
    losses: list[float] = field(default_factory=list)  # since the last measurement


@dataclass(frozen=True)
class Probe:
    """One unit's input to an activation: the output of `module` at `unit` of `axis`."""

    module: str
    axis: int
    unit: int = 0


def make_optimizer(network: nn.Module, config: ResolvedConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of `config`; weight decay acts on tensors with two or more axes only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)


def batch_indices(samples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The places of batch number `step` (from 0): a pure function, so a resumed run needs no state.

    Each pass over the data has its own random order; an incomplete last batch is left out.
    """
    in_pass = samples // batch_size
    epoch, place = divmod(step, in_pass)
    return batch_order(samples, seed, epoch)[place * batch_size : (place + 1) * batch_size]


_last_order: tuple[tuple[int, int, int], Tensor] | None = None


def batch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The random order of the samples in pass number `epoch` (from 0)."""
    global _last_order
    key = (samples, seed, epoch)
    if _last_order is None or _last_order[0] != key:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        _last_order = (key, torch.randperm(samples, generator=generator))
    return _last_order[1]


def train_steps(
    contenders: dict[str, Contender],
    data: Dataset,
    config: ResolvedConfig,
    checkpoint: Path,
    *,
    start: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Do the updates `start` .. `config.steps` of every contender on the same batches.

    A contender whose loss is not finite is stopped there (`Curve.diverged_at`) with its parameters
    as they were before that update; the others go on. A checkpoint is written every half minute or
    `config.checkpoint_every` steps, at the end and on SIGINT, SIGTERM or SIGHUP. Of several ranks each takes
    its share of every batch, and what one of them is told to do all of them do after the same step.

    Raises:
        Interrupted: after a signal, between two steps, with the checkpoint written.
        SynchronizationError: another rank is dead or stuck.
    """
    ranks = ranks or Ranks()
    device = torch.device(config.device)
    x = data.x_train.to(device) if isinstance(data.x_train, Tensor) else data.x_train
    y, objective = data.y_train.to(device), objective_of(data)
    if start == 0:
        for contender in contenders.values():
            with ranks.watched("parameters"):
                measure(contender, data, 0)
    saved_at = time.monotonic()
    with _signals() as stopped_by:
        for step in range(start, config.steps):
            ranks.begin(step + 1)
            batch = ranks.share(batch_indices(len(x), config.batch_size, config.seed, step)).to(device)
            batch_x, batch_y = x[batch].to(device), y[batch]
            running = [c for c in contenders.values() if c.curve.diverged_at is None]
            if not running:
                break
            for contender in running:
                _update(contender, batch_x, batch_y, step + 1, config.batch_size, ranks, objective)
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                for contender in running:
                    ranks.merge_statistics(contender.network)
                    with ranks.watched("parameters"):
                        measure(contender, data, step + 1)
            if progress is not None:
                progress.step(step + 1, config.steps, {n: c.curve for n, c in contenders.items()})
            due = ranks.is_first and _is_due(config, step + 1, saved_at)
            stop, save = ranks.total(bool(stopped_by), due)
            if stop or save:
                save_checkpoint(checkpoint, step + 1, contenders, data, ranks)
                saved_at = time.monotonic()
            if stop:
                cause = stopped_by[0] if stopped_by else "a signal to another rank"
                raise Interrupted(
                    f"stopped by {cause} after step {step + 1} of {config.steps}; "
                    f"{checkpoint} holds all of it. Go on with: "
                    f"batchnorm train --resume {checkpoint.parent}"
                )
    if start < config.steps:
        save_checkpoint(checkpoint, config.steps, contenders, data, ranks)


def _is_due(config: ResolvedConfig, step: int, saved_at: float) -> bool:
    if config.checkpoint_every is not None:
        return step % config.checkpoint_every == 0
    return time.monotonic() - saved_at > CHECKPOINT_SECONDS


def _update(
    contender: Contender,
    x: Tensor,
    y: Tensor,
    step: int,
    batch_size: int,
    ranks: Ranks,
    objective: Classification | Regression,
) -> None:
    """One step on a batch of which x is this rank's part."""
    began = time.perf_counter()
    contender.optimizer.zero_grad()
    with ranks.watched("statistics"):
        output = (contender.parallel or contender.network)(x)
    if ranks.is_alone:
        loss = objective.loss(output, y)
        value = float(loss.detach())
    else:  # the gradients are averaged over ranks, whose parts may be of unequal sizes
        loss = objective.loss(output, y, reduction="sum") * (ranks.size / batch_size)
        value = ranks.total(float(loss.detach()))[0] / ranks.size
    if math.isfinite(value):
        with ranks.watched("gradients"):
            loss.backward()
        contender.optimizer.step()
        contender.losses.append(value)
    else:
        contender.curve.diverged_at = step
    contender.curve.seconds += time.perf_counter() - began


def measure(contender: Contender, data: Dataset, step: int) -> None:
    """Append test loss and accuracy, percentiles and the mean training loss to the curve."""
    curve, losses = contender.curve, contender.losses
    if curve.diverged_at is not None:
        return
    test_loss, score, percentiles = evaluate(contender.network, data, contender.probe)
    curve.steps.append(step)
    curve.train_loss.append(math.fsum(losses) / len(losses) if losses else None)
    curve.test_loss.append(test_loss)
    curve.scores.append(score)
    curve.percentiles.append(percentiles)
    losses.clear()


def evaluate(network: nn.Module, data: Dataset, probe: Probe | None = None) -> tuple[float, float, list[float]]:
    """Mean loss and score over the test part, in eval mode, and the percentiles of the probed unit.

    Cross-entropy (nats) and accuracy (a fraction), or squared error (variances) and R2. The modes of the modules are
    left as they were.
    """
    device = next(network.parameters()).device
    samples = len(data.y_test)
    probed = Probed(network, probe, samples)
    objective, tally = objective_of(data), torch.zeros((), dtype=torch.float64)
    with probed, evaluating(network), torch.no_grad():
        for start in range(0, samples, EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            y = data.y_test[part].to(device)
            tally = tally + objective.tally(network(data.x_test[part].to(device)), y)
            probed.keep(len(y))
    return *objective.judge(tally, samples), probed.percentiles()


class Probed:
    """What one unit gives over the test part, of which MAX_PROBED values are kept at most, evenly spaced.

    They are copied into one tensor that is made once: small tensors that stay, between large ones that go, would leave
    memory in pieces that nothing fits into.

    Args:
        network: whose module is watched inside a `with`.
        probe: which unit; None for none.
        samples: of the test part.
    """

    def __init__(self, network: nn.Module, probe: Probe | None, samples: int) -> None:
        self._network, self._probe, self._samples = network, probe, samples
        self._seen: list[Tensor] = []  # of the batch at work
        self._kept: Tensor | None = None
        self._step = 1
        self._count = 0
        self._hook: Any = None

    def __enter__(self) -> None:
        if self._probe is not None:
            module = self._network.get_submodule(self._probe.module)
            self._hook = module.register_forward_hook(self._see)

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        assert self._probe is not None
        self._seen.append(output.detach().select(self._probe.axis, self._probe.unit).flatten())

    def keep(self, samples: int) -> None:
        """Take what the batch of so many samples has given."""
        if not self._seen:
            return
        values = torch.cat(self._seen)
        self._seen.clear()
        if self._kept is None:
            total = values.numel() * self._samples // samples
            self._step = max(1, math.ceil(total / MAX_PROBED))
            self._kept = values.new_empty(math.ceil(total / self._step))
        first = -self._count % self._step  # the first place in `values` that is a multiple of the step in all values
        chosen = values[first :: self._step]
        at = (self._count + first) // self._step
        room = self._kept[at : at + len(chosen)]
        room.copy_(chosen[: len(room)])
        self._count += values.numel()

    def percentiles(self) -> list[float]:
        """Of what was kept; [] where nothing was."""
        if self._kept is None:
            return []
        kept = self._kept[: math.ceil(self._count / self._step)].double()
        at = torch.tensor(PERCENTILES, dtype=torch.float64, device=kept.device) / 100
        return torch.quantile(kept, at).tolist()


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them; a second one raises KeyboardInterrupt.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    caught = [signal.SIGINT, signal.SIGTERM, *HANGUP]
    caught = [number for number in caught if number not in HANGUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in caught}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_checkpoint(
    path: Path, step: int, contenders: dict[str, Contender], data: Dataset, ranks: Ranks | None = None
) -> None:
    """Write everything that the next step depends on; `torch.load(weights_only=True)` reads it.

    Of several ranks the first one writes, with the states of all generators.
    """
    ranks = ranks or Ranks()
    for contender in contenders.values():
        ranks.merge_statistics(contender.network)
    generators = ranks.gather(random_state())
    cut = {name: (c.network, c.optimizer) for name, c in contenders.items()} if ranks.sharded else {}
    if cut:
        named = ranks.from_first(lambda: shards.fresh_name(path.parent, step))
        with ranks.watched("shards"):
            shards.save_shards(path.parent / named, cut)
    if not ranks.is_first:
        return
    state = {
        "step": step,
        "shards": named if cut else None,
        "data": data.fingerprint(),
        "random": generators[0],
        "random_of_ranks": generators,
        "contenders": {
            name: {
                **(
                    {
                        "network": shards.rest_of_network(contender.network),
                        "optimizer": shards.rest_of_optimizer(contender.network, contender.optimizer),
                    }
                    if cut
                    else {"network": contender.network.state_dict(), "optimizer": contender.optimizer.state_dict()}
                ),
                "curve": dataclasses.asdict(contender.curve),
                "losses": contender.losses,
            }
            for name, contender in contenders.items()
        },
    }
    with writing(path) as stream:
        torch.save(state, stream)  # type: ignore[arg-type]  # which is a binary stream
    if cut:
        shards.remove_shards(path.parent, but=named)


def load_checkpoint(path: Path, contenders: dict[str, Contender], data: Dataset, ranks: Ranks | None = None) -> int:
    """Put the state of a checkpoint into the contenders; returns the number of steps done.

    Raises:
        DataError: the file cannot be read, is of other data, or does not fit the networks.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        step, saved, random = int(state["step"]), state["contenders"], state["random"]
    except Exception as error:  # torch.load raises whatever a damaged archive makes it raise
        raise DataError(
            f"checkpoint {path}: it cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'})."
        ) from error
    if state["data"] != data.fingerprint():
        raise DataError(
            f"checkpoint {path}: it was written for other data than {data.name} holds now. "
            "Resume with the same data, or start a new run."
        )
    if set(saved) != set(contenders):
        raise DataError(f"checkpoint {path}: it holds {sorted(saved)}, expected {sorted(contenders)}.")
    cut = state.get("shards")
    if bool(cut) != any(shards.is_sharded(contender.network) for contender in contenders.values()):
        raise DataError(
            f"checkpoint {path}: one of the checkpoint and the run is sharded (--fsdp), and the other is not."
        )
    for name, contender in contenders.items():
        try:
            contender.network.load_state_dict(saved[name]["network"], strict=not cut)
            if cut:
                shards.optimizer_state(contender.network, contender.optimizer, saved[name]["optimizer"])
            else:
                contender.optimizer.load_state_dict(saved[name]["optimizer"])
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"checkpoint {path}: it does not fit the network {name} ({error}). Was its factory changed?"
            ) from error
        contender.curve = Curve(**saved[name]["curve"])
        contender.losses = list(saved[name]["losses"])
    if cut:
        networks = {name: (c.network, c.optimizer) for name, c in contenders.items()}
        shards.load_shards(path.parent / Path(str(cut)).name, networks)
    generators = state.get("random_of_ranks", [random])
    if ranks is not None and len(generators) == ranks.size:  # on another number of ranks all begin as the first
        random = generators[ranks.rank]
    set_random_state(random)
    return step


def random_state() -> dict[str, Any]:
    """The states of torch's generators, which layers such as dropout draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
