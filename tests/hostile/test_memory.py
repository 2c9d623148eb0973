"""Data larger than memory is read in parts, to the same bits; what cannot be is told with sizes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from batchnorm.errors import DataError
from batchnorm.training import load_data, make_data, sources
from batchnorm.training.samples import Samples


@pytest.fixture
def no_memory(monkeypatch):
    """No array fits."""
    monkeypatch.setattr(sources, "fits_in_memory", lambda shape: False)
    monkeypatch.setattr("batchnorm.training.datasets.fits_in_memory", lambda shape: False)


def all_of(x):
    return x[torch.arange(len(x))]


def same(streamed, whole):
    assert isinstance(streamed.x_train, Samples)
    assert not isinstance(whole.x_train, Samples)
    for part in ("x_train", "x_test"):
        assert torch.equal(all_of(getattr(streamed, part)), getattr(whole, part))
    assert torch.equal(streamed.y_train, whole.y_train)
    assert streamed.fingerprint() == whole.fingerprint()
    assert (streamed.preparation, streamed.standardize) == (whole.preparation, whole.standardize)


SHAPES = [(60, 5), (60, 7, 3), (60, 6, 6), (60, 2, 5, 5), (60, 9, 8, 3)]


@pytest.mark.parametrize("dtype", ["uint8", ">f8", "<f4", "int16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["npy", "npz", "fortran"])
def test_files_are_read_in_parts_to_the_same_bits(tmp_path, monkeypatch, dtype, shape, kind):
    x = np.random.default_rng(0).normal(30, 10, size=shape).astype(dtype)
    y = np.arange(60) % 3
    np.save(tmp_path / "y.npy", y)
    if kind == "npz":
        np.savez_compressed(tmp_path / "d.npz", x=x, y=y)
        name, labels = str(tmp_path / "d.npz"), None
    else:
        np.save(tmp_path / "x.npy", np.asfortranarray(x) if kind == "fortran" else x)
        name, labels = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
    whole = load_data(name, labels=labels)
    monkeypatch.setattr(sources, "fits_in_memory", lambda shape: len(shape) == 1)
    monkeypatch.setattr("batchnorm.training.datasets.fits_in_memory", lambda shape: len(shape) == 1)
    monkeypatch.setattr(sources, "BLOCK", 500)
    same(load_data(name, labels=labels), whole)


class Items(TorchDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], self.y[k]


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y, strict=True)


def forms(x, y):
    """A data set in each form that torch has."""
    tensors = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    mappings = [{"x": x[k : k + 7], "y": y[k : k + 7]} for k in range(0, len(x), 7)]
    return {
        "Dataset": Items(x, y),
        "TensorDataset": tensors,
        "DataLoader": DataLoader(tensors, batch_size=7),
        "IterableDataset": Stream(x, y.tolist()),
        "DataLoader of dicts": DataLoader(mappings, batch_size=None),
    }


@pytest.mark.parametrize("form", ["Dataset", "TensorDataset", "DataLoader", "IterableDataset", "DataLoader of dicts"])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_torch_reads_with(form, streamed, monkeypatch):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    y = np.arange(50) % 2
    whole = make_data((x, y), seed=3)
    if streamed:
        monkeypatch.setattr(sources, "fits_in_memory", lambda shape: False)
        monkeypatch.setattr("batchnorm.training.datasets.fits_in_memory", lambda shape: False)
        same(make_data(forms(x, y)[form], seed=3), whole)
    else:
        assert make_data(forms(x, y)[form], seed=3).fingerprint() == whole.fingerprint()


def test_a_pair_of_loaders_is_a_split():
    x, y = torch.randn(30, 4), torch.arange(30) % 2
    train, test = (DataLoader(TensorDataset(x[part], y[part]), 4) for part in (slice(20), slice(20, 30)))
    data = make_data((train, test))
    assert torch.equal(data.x_train, x[:20])
    assert torch.equal(data.y_test, y[20:])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Items([], []), "the data set is empty"),
        (Items([torch.zeros(2), torch.zeros(3)] * 9, [0, 1] * 9), "sample 1 has shape .3,., sample 0 .2,."),
        (Stream([torch.zeros(2), torch.zeros(3)], [0, 1]), "a sample of shape .3,. follows those of shape .2,."),
        (DataLoader([1.0, 2.0]), "it gives a Tensor, expected .x, y."),
        (Stream([torch.zeros(2).to_sparse()] * 4, [0, 1] * 2), "to_dense"),
        (Items([[1, "a"]] * 4, [0, 1] * 2), "dtype <U"),
    ],
)
def test_what_cannot_be_read_is_named(found, message):
    with pytest.raises(DataError, match=message):
        make_data(found)


def test_a_lying_header_is_told_with_sizes(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(10))
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1000)}
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    with pytest.raises(DataError, match=r"claims \(1000000000, 1000\) of float32, 4\.0 TB, and the file holds 100"):
        load_data(str(tmp_path / "x.npy"), labels=str(tmp_path / "y.npy"))


LIMITED = """
import resource, sys
import numpy as np
import torch
from batchnorm.cli import main
torch.set_num_threads(1)
import batchnorm.training.procedure2 as procedure2
from batchnorm.training import sources
sources.LARGEST_IN_MEMORY = 40 << 20
from batchnorm.training import TrainConfig, train
procedure2.export_network = lambda *arguments: []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = train(TrainConfig(network="nets:plain", data="x.npy", labels="y.npy", steps=4, batch_size=64, out="run"))
assert main(["calibrate", "--run", "run", "--out", "w.safetensors"]) == 0
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before)
"""


@pytest.mark.slow
def test_training_takes_memory_of_the_batch_and_not_of_the_data(users, monkeypatch):
    """400 MB of samples, of which a run keeps 40 MB at most, beside the code that it loads."""
    x = np.lib.format.open_memmap("x.npy", mode="w+", dtype=np.float32, shape=(20_000, 5_000))
    rng = np.random.default_rng(0)
    for start in range(0, len(x), 4_000):
        x[start : start + 4_000, :50] = rng.normal(size=(4_000, 50))
    del x
    np.save("y.npy", np.arange(20_000) % 4)
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split()[-1])  # in kB; whole, the samples alone take 400,000, and each copy as much
    assert growth < 400_000
