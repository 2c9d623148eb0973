"""The experiment that each script here makes with its framework: three steps, the file, five more steps.

The network is batch normalization, ReLU, batch normalization over five channels. A script trains it three steps (SGD
of rate 0.5, mean squared error), writes the framework's file, takes the output of evaluation, trains five more steps
(rate 0.1) and hands everything to `expect`, then the file to `pack`. NumPy is all that this module needs.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CHANNELS, BEFORE, STEPS = 3, 3, 5
SPACE = {1: (), 2: (2, 2), 3: (2, 1, 2)}


def batches(rank: int = 1, seed: int = 0, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (3 + 1 + 5, N, *space, C), the fourth for evaluation, and a target (N, *space, C), all float32."""
    random = np.random.default_rng(seed)
    shape = (n, *SPACE[rank], CHANNELS)
    spread, offset = random.uniform(0.5, 3, CHANNELS), random.uniform(-2, 2, CHANNELS)
    x = random.normal(size=(BEFORE + 1 + STEPS, *shape)) * spread + offset
    return x.astype(np.float32), random.normal(size=shape).astype(np.float32)


def first(x: np.ndarray) -> np.ndarray:
    """Features first, as torch has them, of an array (N, *space, C)."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def expect(name: str, x: np.ndarray, target: np.ndarray, before: Any, after: Any, layers: list[dict[str, Any]]) -> None:
    """Writes NAME.expected.npz: the data that the steps need, and what the framework made of them.

    Args:
        name: the file that the framework wrote.
        x: as `batches` returns it, features last; target also.
        before: the output of evaluation for x[3] when the file was written, features last.
        after: the same after five more steps.
        layers: the vectors of both layers after five more steps: mean, var and, where there are any, gamma and beta.
    """
    arrays = {
        "x": x[BEFORE:],
        "target": target,
        "before": np.asarray(before, np.float32),
        "after": np.asarray(after, np.float32),
    }
    for i, vectors in enumerate(layers):
        arrays |= {f"{i}.{key}": np.asarray(value, np.float32).ravel() for key, value in vectors.items()}
    np.savez_compressed(HERE / f"{name}.expected.npz", **arrays)


def pack(name: str) -> None:
    """Replaces a file (or a folder) by NAME.gz (NAME.tar.gz), the same bytes for the same content."""
    path = HERE / name
    if path.is_dir():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for each in sorted(path.rglob("*")):
                if each.is_file():
                    entry = tarfile.TarInfo(f"{name}/{each.relative_to(path)}")
                    entry.size = each.stat().st_size
                    with each.open("rb") as content:
                        archive.addfile(entry, content)
        content = buffer.getvalue()
        shutil.rmtree(path)
        target = HERE / f"{name}.tar.gz"
    else:
        content = path.read_bytes()
        path.unlink()
        target = HERE / f"{name}.gz"
    target.write_bytes(gzip.compress(content, 9, mtime=0))
    if target.stat().st_size > 20_000:
        raise SystemExit(f"{target.name} has {target.stat().st_size} bytes")
