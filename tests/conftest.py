"""What every test runs under: fixed seeds, one thread, NaN in uninitialized memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from batchnorm.kernels import cpu

pytest.register_assert_rewrite("operator_contract")

# The same examples on every run, and no deadline: other work shares the machine.
hypothesis.settings.register_profile("batchnorm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("batchnorm")


@pytest.fixture(autouse=True)
def _fixed_seeds_and_threads() -> Iterator[None]:
    """Each test draws the same numbers, alone or in the suite, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    """Fill new memory with NaN (integers: the largest), so that reading before writing shows.

    torch does so while deterministic algorithms are on, so they are on, too.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(params=["C++", "Python"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: plain eager calls made at once in C++, and through Python, as beside another torch."""
    if request.param == "Python":
        monkeypatch.setattr(cpu, "call", None)
        monkeypatch.setattr(cpu, "calls", None)
    elif cpu.call is None:
        pytest.skip(f"eager calls go through Python: {cpu.call_error}")
    return str(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the tests that are marked `thorough`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA device, and `thorough`, unless the run asks for them."""
    has_device = torch.cuda.is_available() or os.environ.get("BATCHNORM_REQUIRE_CUDA")
    for item in items:
        if item.get_closest_marker("gpu") and not has_device:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("thorough") and not config.getoption("thorough"):
            item.add_marker(pytest.mark.skip(reason="takes half a minute and more: --thorough"))
