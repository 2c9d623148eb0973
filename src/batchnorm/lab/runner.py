"""Runs experiments seed by seed; finished seeds are kept on disk, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from batchnorm import __version__
from batchnorm.errors import InputError
from batchnorm.lab.results import Result, Table, Trial, settled
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.training.config import TrainConfig
from batchnorm.training.datasets import Dataset
from batchnorm.training.files import write_json
from batchnorm.training.loop import Interrupted
from batchnorm.training.procedure2 import environment
from batchnorm.writing import obstacle, remove_unfinished

if TYPE_CHECKING:
    from batchnorm.lab.experiment import Experiment

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One seed of one experiment."""

    experiment: Experiment
    config: Config
    seed: int
    folder: Path | None  # of the experiment's trials in these settings

    @property
    def path(self) -> Path | None:
        """Where its trial is kept."""
        return None if self.folder is None else self.folder / f"seed-{self.seed}.json"


def _folder(experiment: Experiment, config: Config, folder: Path | None) -> Path | None:
    """Where the trials of an experiment are kept; other settings and versions are other places, and so are edited
    files."""
    if folder is None:
        return None
    own = [digest for given in (config.network, config.data) if (digest := _digest(given))]
    settings = json.dumps([__version__, config.plain(), *own], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:10]
    return folder / "trials" / f"{experiment.name}-{key}"


def _digest(given: Any) -> str | None:
    """Of what a network or data of the user's are made of: a data set's values, a file's bytes, the file that defines
    a factory or loader (not what that imports); None for what is built in or has no file."""
    if isinstance(given, Dataset):
        parts = [t.numpy().tobytes() for t in (given.x_train, given.y_train, given.x_test, given.y_test)]
        return hashlib.sha256(b"".join(parts)).hexdigest()
    try:
        if (given if isinstance(given, str) else getattr(given, "__module__", None) or "").startswith("batchnorm."):
            return None  # of the version that the key has
        if isinstance(given, str) and ":" in given:
            spec = importlib.util.find_spec(given.partition(":")[0])
            file = spec.origin if spec else None
        elif isinstance(given, str):
            file = given if Path(given).suffix else None
        else:
            file = inspect.getsourcefile(given)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError, ImportError, ValueError):
        return None  # whatever is wrong with it is said when it is used


def run(
    experiment: Experiment,
    *,
    seeds: int | Sequence[int] = 5,
    quick: bool = False,
    folder: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    **changes: Any,
) -> Result:
    """Run one experiment over seeds.

    Args:
        experiment: one of `batchnorm.lab.experiments`, or your own.
        seeds: how many, from 0 up, or which ones.
        quick: with the shorter settings.
        folder: where finished seeds are kept and looked for; None keeps nothing.
        workers: processes; each trial computes on one thread.
        progress: called with (trials done, trials in all, what was done).
        changes: settings that differ; see the experiment's `config`. `network` and `data` may be a factory and a
            loader of your own.

    Raises:
        InputError: an unknown setting, a network without batch norm where it is needed, or a folder that cannot be
            written.
    """
    config = experiment.configure(quick=quick, **changes)
    return run_all([(experiment, config)], seeds=seeds, folder=folder, workers=workers, progress=progress)[0]


def run_all(
    experiments: Iterable[tuple[Experiment, Config]],
    *,
    seeds: int | Sequence[int] = 5,
    folder: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Result]:
    """Run several experiments over the same seeds; see `run`."""
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise InputError(f"lab: seeds={seeds!r}, expected a number from 1 up, or different seeds from 0 up")
    if workers < 1:
        raise InputError(f"lab: workers={workers}, expected 1 or more")
    chosen = list(experiments)
    place = None if folder is None else Path(folder)
    if place is not None and (reason := obstacle(place)) is not None:  # before anything is computed
        raise InputError(f"lab: output folder {place}: {reason}. Give another folder (--out).")
    folders = [_folder(experiment, config, place) for experiment, config in chosen]
    jobs = [Job(*which, seed, where) for seed in numbers for which, where in zip(chosen, folders, strict=True)]
    kept = {(job.experiment.name, job.seed): trial for job in jobs if (trial := _read(job)) is not None}
    missing = [job for job in jobs if (job.experiment.name, job.seed) not in kept]
    _tell(progress, len(kept), len(jobs), f"{len(kept)} kept from before" if kept else "")
    try:
        for job, trial in _trials(missing, workers):
            kept[job.experiment.name, job.seed] = trial
            _tell(progress, len(kept), len(jobs), f"{job.experiment.name}, seed {job.seed}")
    except (KeyboardInterrupt, BrokenProcessPool) as stop:
        if isinstance(stop, BrokenProcessPool) and place is None:
            raise
        where = f"{place} keeps them; the same command goes on from there" if place else "nothing was kept"
        raise Interrupted(f"lab: stopped with {len(kept)} of {len(jobs)} seeds done; {where}.") from None
    return [_result(e, config, [kept[e.name, seed] for seed in numbers]) for e, config in chosen]


def _tell(progress: Progress | None, done: int, total: int, text: str) -> None:
    if progress is not None:
        progress(done, total, text)


def _trials(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Trial]]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _work(job)
        return
    try:
        pickle.dumps(jobs)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"lab: the network or the data cannot be sent to worker processes ({error}); give workers=1, or a factory "
            "as 'package.module:name'"
        ) from error
    others = set(active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _let_die) as pool:
        running = {pool.submit(_work, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _let_die() -> None:
    """A worker ends at once and without a word on Ctrl-C and SIGTERM, but leaves no half file."""

    def end(number: int, frame: FrameType | None) -> None:
        remove_unfinished()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _work(job: Job) -> Trial:
    """One trial, on one thread; written down when it is done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()  # not the clock, which runs on while others have the core
    try:
        trial = job.experiment.trial(job.config, Task(job.experiment.name, job.config, job.seed))
    finally:
        torch.set_num_threads(threads)
    trial.seconds = time.process_time() - began
    if job.path is not None:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(job.path, {"config": job.config.plain(), "trial": asdict(trial)})
    return trial


def _read(job: Job) -> Trial | None:
    """A finished trial; one that cannot be read is done again."""
    if job.path is None:
        return None
    try:
        kept = json.loads(job.path.read_text(encoding="utf-8"))
        return Trial(**_numbers(kept["trial"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _numbers(value: Any) -> Any:
    """Undo how `write_json` names numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _result(experiment: Experiment, config: Config, trials: list[Trial]) -> Result:
    data = Task(experiment.name, config, trials[0].seed).data.to_dict()
    surroundings = {**environment(TrainConfig().resolve()), "CPU threads": "1 for each trial"}
    findings = settled(experiment.verdict(config, Table(trials)), len(trials))
    return Result(experiment.name, config.plain(), data, tuple(trials), findings, surroundings)
