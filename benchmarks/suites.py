"""The suites: jobs that run in a process of their own, and the environment that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from . import (
    calibration,
    compiled,
    depthwise,
    growth,
    kernels,
    layers,
    peers,
    pools,
    ranks,
    recurrent,
    steps,
    streams,
    wall,
    whole,
)
from .cases import Case
from .networks import NETWORKS
from .rows import Row

Job = Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Suite:
    """`jobs(quick)` are run one after the other; each yields its rows."""

    jobs: Callable[[bool], list[Job]]
    environment: Mapping[str, str] = field(default_factory=dict)


def _kernel(quick: bool) -> list[Job]:
    if reason := kernels.available():
        return [lambda: [{"suite": "kernel", "contestant": "ours", "absent": reason}]]
    seconds = 0.5 if quick else 1.5
    return [partial(kernels.measure, case, directions, seconds) for case, directions in kernels.cases(quick)]


def _wall(quick: bool) -> list[Job]:
    seconds = 0.6 if quick else 2.0
    return [partial(wall.measure, c, names, seconds, mode=mode) for c, names, mode in wall.cases(quick)]


def _activations(quick: bool) -> list[Job]:
    contestants, seconds = ("torch", "ours fused"), 0.3 if quick else 0.6
    return [partial(wall.measure, case, contestants, seconds, "activations") for case in wall.activation_cases(quick)]


def _orders(quick: bool) -> list[Job]:
    contestants, seconds = ("torch", "ours fused"), 0.3 if quick else 1.0
    return [partial(wall.measure, case, contestants, seconds, "orders") for case in wall.order_cases(quick)]


def _depthwise(quick: bool) -> list[Job]:
    return [partial(depthwise.measure, *case, 0.3 if quick else 1.0) for case in depthwise.cases(quick)]


def _layers(quick: bool) -> list[Job]:
    drawn = layers.cases(0, 5) if quick else layers.cases(0, 300)
    return [partial(wall.measure, case, ("torch", "ours fused"), 0.2, "layers", mode) for case, mode in drawn]


def _growth(quick: bool) -> list[Job]:
    return [partial(growth.measure, axis, case, 0.2 if quick else 0.7) for axis, case in growth.cases(quick)]


def _step(quick: bool) -> list[Job]:
    grid = [("mlp", "float32")] if quick else product(NETWORKS, ("float32", "bfloat16"))
    return [partial(steps.measure, network, dtype, 2.0 if quick else 15.0) for network, dtype in grid]


def _ranks(quick: bool) -> list[Job]:
    cases = product(ranks.SHAPES, (2,) if quick else ranks.RANKS)
    return [partial(ranks.measure, n, shape, 10 if quick else 60) for shape, n in cases]


def _memory(quick: bool) -> list[Job]:
    grid = [("mobilenet", "float32")] if quick else product(NETWORKS, ("float32", "bfloat16"))
    return [partial(steps.memory, network, dtype) for network, dtype in grid]


def _networks(quick: bool) -> list[Job]:
    networks = ("mobilenet_v2",) if quick else tuple(whole.NETWORKS)
    return [partial(whole.measure, network, 4.0 if quick else 20.0) for network in networks] + _residents(
        "glibc", quick
    )


def _compiled(quick: bool) -> list[Job]:
    cases = list(compiled.NETWORKS.items())[: 1 if quick else None]
    return [partial(compiled.measure, shape, layers, 1.0 if quick else 6.0) for shape, layers in cases]


def _alone(quick: bool) -> list[Job]:
    return [partial(whole.alone, name, 2.0 if quick else 8.0) for name in whole.APART]


def _residents(allocator: str, quick: bool) -> list[Job]:
    networks = whole.RESIDENT[:1] if quick else whole.RESIDENT
    return [partial(whole.resident, network, allocator) for network in networks]


def _recurrent(quick: bool) -> list[Job]:
    return [partial(recurrent.measure, *case, 1.0 if quick else 2.5) for case in recurrent.cases(quick)]


def _pools(quick: bool) -> list[Job]:
    return [partial(pools.measure, case, 0.5 if quick else 1.0) for case in pools.cases(quick)]


def _calibrate(quick: bool) -> list[Job]:
    grid = [("mlp", "torch")] if quick else product(calibration.SAMPLES, ("torch", "ours fused"))
    return [partial(calibration.measure, network, norm, 3.0 if quick else 10.0) for network, norm in grid]


def _streams(quick: bool) -> list[Job]:
    return [partial(streams.measure, 1 if quick else 8), partial(streams.train, 0.3 if quick else 3.0)]


def _peers(quick: bool) -> list[Job]:
    return [partial(peers.measure_jax, case, 0.5 if quick else 2.0) for case in peers.jax_cases(quick)]


def _allocator(allocator: str, quick: bool) -> list[Job]:
    def job(case: Case) -> Job:
        return partial(peers.measure_allocator, case, 0.5 if quick else 2.0, allocator)

    return [job(case) for case in peers.allocator_cases(quick)]


SUITES: dict[str, Suite] = {
    "kernel": Suite(_kernel, kernels.REUSING),
    "wall": Suite(_wall),
    "activations": Suite(_activations),
    "layers": Suite(_layers, kernels.REUSING),
    "orders": Suite(_orders, kernels.REUSING),
    "depthwise": Suite(_depthwise, kernels.REUSING),
    "step": Suite(_step),
    "memory": Suite(_memory),
    "networks": Suite(_networks),
    "alone": Suite(_alone),
    "compiled": Suite(_compiled),
    "networks-thp": Suite(partial(_residents, "glibc, huge pages"), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "networks-trimmed": Suite(
        partial(_residents, "glibc, trimmed"), {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    ),
    "networks-tcmalloc": Suite(partial(_residents, "tcmalloc"), {"LD_PRELOAD": peers.tcmalloc() or ""}),
    "growth": Suite(_growth),
    "recurrent": Suite(_recurrent),
    "ranks": Suite(_ranks),
    "pools": Suite(_pools),
    "calibrate": Suite(_calibrate),
    "allocator": Suite(partial(_allocator, "default")),
    "allocator-thp": Suite(partial(_allocator, "thp"), {"THP_MEM_ALLOC_ENABLE": "1"}),
    "allocator-tcmalloc": Suite(partial(_allocator, "tcmalloc"), {"LD_PRELOAD": peers.tcmalloc() or ""}),
    "streams": Suite(_streams),
    "peers": Suite(_peers),
}
