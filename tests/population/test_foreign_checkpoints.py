"""Checkpoints of Keras, Flax and old torch, written here byte by byte as those write them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import DataError, InputError
from batchnorm.population.checkpoints import read_keras

h5py = pytest.importorskip("h5py")

WIDTHS = (3, 5, 3)
SETTINGS = [{"momentum": 0.9, "epsilon": 1e-2}, {"momentum": 0.99, "epsilon": 1e-3}, {"momentum": 0.5, "epsilon": 0.1}]


def vectors(seed: int) -> dict[str, np.ndarray]:
    random, width = np.random.default_rng(seed), WIDTHS[seed]
    made = {key: random.normal(size=width).astype(np.float32) for key in ("gamma", "beta", "moving_mean")}
    return {**made, "moving_variance": random.uniform(0.5, 4, width).astype(np.float32)}


def network(kind: type[nn.Module] = bn.BatchNorm1d, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    return nn.Sequential(*(kind(width) for width in widths))


def keras_archive(path: Path, **changes: Any) -> Path:
    """A .keras file: dense, BN, a nested model with two more BN; weights in snake-cased, numbered groups."""

    def layer(name: str, i: int) -> dict[str, Any]:
        return {"class_name": "BatchNormalization", "config": {"name": name, **SETTINGS[i], **changes.get(name, {})}}

    inner = {"name": "block", "layers": [layer("second", 1), layer("third", 2)]}
    layers = [
        {"class_name": "InputLayer", "config": {"name": "input"}},
        {"class_name": "Dense", "config": {"name": "dense"}},
        layer("first", 0),
        {"class_name": "Sequential", "config": inner},
    ]
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["layers/dense/vars/0"] = np.zeros((2, 3), np.float32)
        places = (
            "batch_normalization",
            "sequential/layers/batch_normalization",
            "sequential/layers/batch_normalization_1",
        )
        for i, (place, name) in enumerate(zip(places, ("first", "second", "third"), strict=True)):
            options = changes.get(name, {})
            kept = [
                v for k, v in vectors(i).items() if options.get({"gamma": "scale", "beta": "center"}.get(k, ""), True)
            ]
            for j, value in enumerate(kept):
                file[f"layers/{place}/vars/{j}"] = value
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": {"layers": layers}}))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


def keras3_weights(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        for i in range(3):
            name = f"batch_normalization_{i}" if i else "batch_normalization"
            for j, value in enumerate(vectors(i).values()):
                file[f"layers/{name}/vars/{j}"] = value
    return path


def keras2(path: Path, whole_model: bool = True) -> Path:
    """A Keras 2 file, whose groups carry names; the order is that of `layer_names`, not of the alphabet."""
    names = ["stem", "body", "head"]
    with h5py.File(path, "w") as file:
        weights = file.create_group("model_weights") if whole_model else file
        weights.attrs["layer_names"] = [b"dense", *(n.encode() for n in names)]
        dense = weights.create_group("dense")
        dense.attrs["weight_names"] = [b"dense/kernel:0"]
        dense["dense/kernel:0"] = np.zeros((2, 3), np.float32)
        for i, name in enumerate(names):
            group = weights.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in vectors(i)]
            for key, value in vectors(i).items():
                group[f"{name}/{key}:0"] = value
        if whole_model:
            layers = [
                {"class_name": "BatchNormalization", "config": {"name": n, **s}}
                for n, s in zip(names, SETTINGS, strict=True)
            ]
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
    return path


def flax_variables(names: tuple[str, ...] = ("BatchNorm_2", "BatchNorm_9", "BatchNorm_10")) -> dict[str, Any]:
    params: dict[str, Any] = {"Dense_0": {"kernel": np.zeros((2, 3))}}
    stats: dict[str, Any] = {}
    for i in (2, 0, 1):
        v = vectors(i)
        params[names[i]] = {"scale": v["gamma"], "bias": v["beta"]}
        stats[names[i]] = {"mean": v["moving_mean"], "var": v["moving_variance"]}
    return {"params": params, "batch_stats": stats}


def assert_loaded(net: nn.Module, settings: list[dict[str, float]]) -> None:
    """Inference is the foreign formula, and the next update the foreign update."""
    for i, layer in enumerate(net):
        v, s = vectors(i), settings[i]
        x = np.random.default_rng(9).normal(size=(7, WIDTHS[i])) * 3
        want = v["gamma"] * (x - v["moving_mean"]) / np.sqrt(v["moving_variance"] + s["epsilon"]) + v["beta"]
        got = layer.eval()(torch.from_numpy(x).float()).detach().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        layer.train()(torch.from_numpy(x).float())
        for ours, theirs, batch in (
            (layer.running_mean, v["moving_mean"], x.mean(0)),
            (layer.running_var, v["moving_variance"], x.var(0)),
        ):
            want = s["momentum"] * theirs + (1 - s["momentum"]) * batch
            np.testing.assert_allclose(ours.numpy(), want, rtol=1e-5, atol=1e-6)


DEFAULTS = [{"momentum": 0.99, "epsilon": 1e-3}] * 3
FILES = {
    "keras": (keras_archive, "net.keras", SETTINGS),
    "keras 3 weights": (keras3_weights, "net.weights.h5", DEFAULTS),
    "keras 2 model": (keras2, "net.h5", SETTINGS),
    "keras 2 weights": (lambda path: keras2(path, False), "weights.h5", DEFAULTS),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_keras_loads(file: str, kind: type[nn.Module], tmp_path: Path):
    write, name, settings = FILES[file]
    net = network(kind)
    assert bn.load_keras(net, write(tmp_path / name)) is net
    assert_loaded(net, settings)


@pytest.mark.parametrize("as_file", [False, True])
def test_flax_loads_by_number_not_by_alphabet(as_file: bool, tmp_path: Path):
    variables: Any = flax_variables()
    if as_file:
        msgpack = pytest.importorskip("msgpack")

        def pack(array: np.ndarray) -> Any:
            content = (array.shape, array.dtype.name, array.tobytes())
            return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))

        (tmp_path / "flax").write_bytes(msgpack.packb(variables, default=pack, strict_types=True))
        variables = tmp_path / "flax"
    assert_loaded(bn.load_flax(network(), variables), [{"momentum": 0.99, "epsilon": 1e-5}] * 3)
    net = bn.load_flax(network(), variables, decay=0.9, eps=0.01)
    assert_loaded(net, [{"momentum": 0.9, "epsilon": 0.01}] * 3)


def test_weights_of_nested_models_do_not_tell_their_order(tmp_path: Path):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        for i, place in enumerate(("stem", "z_block/layers", "a_block/layers")):
            for j, value in enumerate(vectors(i).values()):
                file[f"layers/{place}/batch_normalization/vars/{j}"] = value
    with pytest.raises(InputError, match="do not tell their order"):
        bn.load_keras(network(), tmp_path / "net.weights.h5")
    theirs = "layers/z_block/layers/batch_normalization"
    net = bn.load_keras(nn.Sequential(bn.BatchNorm1d(5)), tmp_path / "net.weights.h5", layers={"0": theirs})
    np.testing.assert_array_equal(net[0].running_mean, vectors(1)["moving_mean"])


def test_names_match_layers_in_any_order(tmp_path: Path):
    path = keras_archive(tmp_path / "net.keras")
    assert [f.name for f in read_keras(path)] == ["first", "block/second", "block/third"]
    net = network(widths=(5, 3))
    bn.load_keras(net, path, layers={"0": "block/second", "1": "block/third"})
    np.testing.assert_array_equal(net[0].running_mean, vectors(1)["moving_mean"])
    np.testing.assert_array_equal(net[1].running_mean, vectors(2)["moving_mean"])
    named = flax_variables(("stem", "body", "head"))
    net = bn.load_flax(network(), named, layers={"0": "stem", "1": "body", "2": "head"})
    np.testing.assert_array_equal(net[2].weight.detach(), vectors(2)["gamma"])


def test_without_scale_or_center(tmp_path: Path):
    path = keras_archive(tmp_path / "net.keras", first={"scale": False, "center": False}, third={"center": False})
    net = nn.Sequential(bn.BatchNorm1d(3, affine=False), bn.BatchNorm1d(5), bn.BatchNorm1d(3, bias=False))
    bn.load_keras(net, path)
    np.testing.assert_array_equal(net[0].running_var, vectors(0)["moving_variance"])
    np.testing.assert_array_equal(net[2].weight.detach(), vectors(2)["gamma"])
    with pytest.raises(InputError, match="weight is there in ours alone"):
        bn.load_keras(network(), path)


def test_wrong_matches_are_refused(tmp_path: Path):
    path = keras_archive(tmp_path / "net.keras")
    negative = flax_variables()
    negative["batch_stats"]["BatchNorm_9"]["var"] = -np.ones(5)
    cases: list[tuple[Any, nn.Module, dict[str, Any], str]] = [
        (path, network(widths=(3, 5)), {}, "has 2 batch normalizations, the checkpoint 3"),
        (path, network(widths=(3, 3, 5)), {}, r"'1' and 'block/second' do not match: running_mean has shape \(3,\)"),
        (path, network(), {"layers": {"7": "first"}}, r"no batch normalization \['7'\]"),
        (path, network(), {"layers": {"0": "last"}}, r"checkpoint has no batch normalization \['last'\]"),
        (path, nn.Sequential(*(nn.BatchNorm1d(w, track_running_stats=False) for w in WIDTHS)), {}, "keeps no running"),
        (path, nn.Linear(2, 2), {}, "has no batch normalization"),
        (flax_variables(("stem", "body", "head")), network(), {}, "do not tell their order"),
        (negative, network(), {}, "negative or not finite"),
    ]
    for source, net, options, reason in cases:
        before = {k: v.clone() for k, v in net.state_dict().items()}
        shown = repr(net)
        load = bn.load_flax if isinstance(source, dict) else bn.load_keras
        with pytest.raises(InputError, match=reason):
            load(net, source, **options)
        assert repr(net) == shown
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "text.h5").write_text("no file of this kind")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["layer_names"] = []
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    for name in ("text.h5", "other.h5", "other.zip", "missing.h5"):
        with pytest.raises(DataError, match=name):
            bn.load_keras(network(), tmp_path / name)
    with pytest.raises(DataError, match="batch_stats"):
        bn.load_flax(network(), {"params": {}})
    (tmp_path / "flax").write_bytes(b"\xc1")
    with pytest.raises(DataError, match="flax"):
        bn.load_flax(network(), tmp_path / "flax")


def test_and_back(tmp_path: Path):
    net = bn.load_keras(network(), keras_archive(tmp_path / "net.keras"))
    assert [len(v) for v in bn.to_keras(net).values()] == [4, 4, 4]
    for key, value in zip(vectors(1), bn.to_keras(net)["1"], strict=True):
        np.testing.assert_array_equal(value, vectors(1)[key])
    bn.save_keras(net, tmp_path / "back.h5", layers={"0": "stem"})
    assert [f.name for f in read_keras(tmp_path / "back.h5")] == ["stem", "1", "2"]
    again = bn.load_keras(network(), tmp_path / "back.h5")
    flax = bn.to_flax(net, layers={str(i): f"block/BatchNorm_{i}" for i in range(3)})
    assert flax["params"]["block"].keys() == {"BatchNorm_0", "BatchNorm_1", "BatchNorm_2"}
    for other in (again, bn.load_flax(network(), flax)):
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.h5", "net.keras"]
    with pytest.raises(InputError, match="'9'"):
        bn.save_keras(net, tmp_path / "back.h5", layers={"9": "stem"})


@pytest.mark.parametrize("metadata", [True, False])
def test_torch_before_the_counter(metadata: bool):
    """torch < 0.4.1 kept no num_batches_tracked, and its metadata, where kept, says version 1."""
    state = network(nn.BatchNorm1d).state_dict()
    state = type(state)((k, v + 1) for k, v in state.items() if "num_batches" not in k)
    if metadata:
        state._metadata = {str(i): {"version": 1} for i in range(3)}
    net = network()
    net.load_state_dict(state, strict=True)
    assert torch.equal(net[0].running_var, torch.full((3,), 2.0))
    assert net[0].num_batches_tracked == 0
