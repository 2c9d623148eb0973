"""Files that other frameworks wrote: read, evaluated, and trained on for five more steps, as those did.

`tests/data/foreign` holds the files, the scripts that made them, and what each framework got.
"""

from __future__ import annotations

import gzip
import io
import pickle
import re
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.errors import DataError, InputError, MissingDependencyError

DATA = Path(__file__).parent.parent / "data" / "foreign"
LAYERS = {1: bn.BatchNorm1d, 2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


@dataclass(frozen=True)
class File:
    """What a file is read as."""

    framework: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, str] | None = None
    without: tuple[str, ...] = ()  # of weight and bias
    settings: tuple[tuple[float, float], ...] = ((0.9, 1e-2), (0.8, 1e-3))  # decay and epsilon of both layers


FILES = {
    "keras3.sequential.keras": File("keras3"),
    "keras3.nested.keras": File("keras3"),
    "keras3.no_center.keras": File("keras3", without=("bias",)),
    "keras3.legacy.h5": File("keras3"),
    "keras3.frozen.keras": File("keras3"),
    "keras3.sequential.weights.h5": File("keras3"),
    "keras3.no_scale.weights.h5": File(
        "keras3", without=("weight",), layers={"0": "layers/batch_normalization", "2": "blocks/batch_normalization"}
    ),
    "keras3.weights.sharded": File("keras3"),
    "keras3.attributes.weights.h5": File("keras3", layers={"0": "layers/batch_normalization", "2": "blocks/own_norm"}),
    "keras2.flat.h5": File("keras2"),
    "keras2.fused.h5": File("keras2"),
    "keras2.nested.h5": File("keras2"),
    "keras2.plain.keras": File("keras2", {"running_var": "biased"}),
    "keras2.fused.keras": File("keras2"),
    "keras2.frozen.h5": File("keras2"),
    "keras2.synchronized.h5": File("keras2", {"running_var": "biased"}),
    "keras2.sync_layer.h5": File("keras2"),
    "keras2.time_distributed.h5": File("keras2"),
    "keras2.no_scale.h5": File("keras2", without=("weight",)),
    "keras2.equal_names.h5": File("keras2"),
    "keras2.by_name.h5": File("keras2"),
    "keras2.fused3d.weights.h5": File("keras2", {"framework": "keras2"}),
    "keras2.attributes.weights.h5": File(
        "keras2", {"framework": "keras2"}, layers={"0": "layers/batch_normalization", "2": "second"}
    ),
    "flax.linen.msgpack": File("flax"),
    "flax.train_state.msgpack": File("flax"),
    "flax.nnx.msgpack": File("nnx"),
    "haiku.npz": File("haiku"),
    "haiku.pkl": File("haiku"),
    "haiku.msgpack": File("haiku"),
    "equinox.eqx": File("equinox"),
    "equinox.header.eqx": File("equinox"),
    "equinox.no_affine.eqx": File("equinox", without=("weight", "bias")),
    "paddle.flat.pdparams": File("paddle"),
    "paddle.images.pdparams": File("paddle"),
    "mindspore.images.ckpt": File("mindspore"),
    "mindspore.flat.safetensors": File("mindspore"),
    "mlx.safetensors": File("mlx"),
    "mlx.npz": File("mlx"),
    "tinygrad.safetensors": File("tinygrad", {"framework": "tinygrad"}),
    "tinygrad.float16.safetensors": File("tinygrad", {"framework": "tinygrad"}),
    "pyg.pt": File("torch"),
    "chainer.npz": File("chainer"),
    "jittor.pkl": File("jittor"),
}
WITH_SETTINGS = (".keras", "h5")  # files that hold momentum and epsilon


def unpacked(name: str, folder: Path) -> Path:
    """The file (or folder) as the framework wrote it."""
    packed = DATA / f"{name}.gz"
    if packed.exists():
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
    else:
        with tarfile.open(fileobj=io.BytesIO((DATA / f"{name}.tar.gz").read_bytes())) as archive:
            archive.extractall(folder, filter="data")
    inside = {"keras3.weights.sharded": "model.weights.json", "darknet.folder": "net.weights"}
    return folder / name / inside.get(name, "")


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / f"{name}.expected.npz"))


def first(x: np.ndarray) -> torch.Tensor:
    """Features first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def network(ndim: int, without: tuple[str, ...] = (), kind: Any = None) -> nn.Sequential:
    net = nn.Sequential(LAYERS[ndim](3), nn.ReLU(), LAYERS[ndim](3))
    for key in without:
        net[0].register_parameter(key, None)
        net[2].register_parameter(key, None)
    return net


def network_of(name: str) -> nn.Sequential:
    """A network with the layers of a file."""
    return network(expected(name)["target"].ndim, FILES[name].without if name in FILES else ())


def train(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    """Five steps of SGD on the mean squared error; where there is nothing to train, the statistics of five batches."""
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        for batch in x:
            net(batch)
        return
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for batch in x:
        optimizer.zero_grad()
        (net(batch) - target).square().mean().backward()
        optimizer.step()


def assert_goes_on(net: nn.Module, want: dict[str, np.ndarray]) -> None:
    """Evaluation now, the statistics after five more steps and evaluation then are the framework's, to 1e-6."""
    x, target = torch.stack([first(each) for each in want["x"]]), first(want["target"])
    near = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(net.eval()(x[0]).detach(), first(want["before"]), **near)
    train(net, x[1:], target)
    keys = {"mean": "running_mean", "var": "running_var", "gamma": "weight", "beta": "bias"}
    for key in want.keys() - {"x", "target", "before", "after"}:
        i, _, vector = key.partition(".")
        ours = getattr(net[2 * int(i)], keys[vector])
        np.testing.assert_allclose(ours.detach(), want[key], **near, err_msg=key)
    np.testing.assert_allclose(net.eval()(x[0]).detach(), first(want["after"]), **near)


@pytest.mark.parametrize("name", FILES)
def test_training_goes_on(name: str, tmp_path: Path):
    file, want = FILES[name], expected(name)
    net = network(want["target"].ndim, file.without)
    path = unpacked(name, tmp_path)
    options = dict(file.options)
    if file.layers or not name.endswith(WITH_SETTINGS) or ".weights." in name or "by_name" in name:
        layers = file.layers or weights_of(path)
        for (ours, theirs), (decay, eps) in zip(layers.items(), file.settings, strict=True):
            loaded = bn.load_statistics(net, path, layers={ours: theirs}, decay=decay, eps=eps, **options)
    else:
        loaded = bn.load_statistics(net, path, **options)
    assert loaded.framework == file.framework
    assert_goes_on(net, want)


def weights_of(path: Path) -> dict[str, str]:
    """Our names to theirs, of files that do not hold settings."""
    return dict(zip("02", (f.name for f in bn.read_statistics(path).layers), strict=True))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("keras3.renorm.keras", "renorm=True"),
        ("keras2.renorm.h5", "renorm=True"),
        ("keras2.virtual.h5", "virtual_batch_size=3"),
        ("keras2.virtual.weights.h5", "virtual_batch_size: Keras takes"),
        ("keras3.time_distributed.keras", "TimeDistributed of Keras 3"),
        ("keras3.time_distributed.h5", "TimeDistributed of Keras 3"),
        ("keras3.time_distributed_model.keras", "TimeDistributed of Keras 3"),
        ("keras3.time_distributed_model.weights.h5", "TimeDistributed of Keras 3"),
        ("darknet.folder", "unbiased standard deviation in training"),
    ],
)
def test_other_rules_of_training_are_refused_by_name_and_load_for_inference(name: str, reason: str, tmp_path: Path):
    path, want = unpacked(name, tmp_path), expected(name)
    net = network(want["target"].ndim)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=f"(?s){reason}.*frozen=True"):
        bn.load_statistics(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    given = {} if ".weights.h5" not in name else {"layers": weights_of(path)}
    for (ours, theirs), (decay, eps) in zip(given.get("layers", {}).items(), ((0.9, 1e-2), (0.8, 1e-3)), strict=False):
        bn.load_statistics(net, path, layers={ours: theirs}, decay=decay, eps=eps, frozen=True)
    if not given:
        bn.load_statistics(net, path, frozen=True)
    for training in (False, True):  # and nothing moves
        y = net.train(training)(first(want["x"][0]))
        np.testing.assert_allclose(y.detach(), first(want["before"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["keras3.bfloat16.weights.h5", "keras3.bfloat16.h5"])
def test_bfloat16_is_read_without_its_package(name: str, tmp_path: Path):
    """A network of bfloat16 that Keras made; after the file its training rounds each step."""
    net, want = network(2), expected(name)
    bn.load_keras(net, unpacked(name, tmp_path))
    assert all(torch.equal(v.bfloat16().float(), v) for v in net.state_dict().values() if v.is_floating_point())
    got = net.eval()(first(want["x"][0])).detach().numpy()
    np.testing.assert_allclose(got, want["before"].astype(np.float32), atol=0.05)
    assert np.abs(got).max() > 0.1


def test_layers_are_told_by_path_or_by_their_own_name(tmp_path: Path):
    path = unpacked("keras3.nested.keras", tmp_path)
    inner, second = bn.read_statistics(path).layers
    assert (inner.name, second.name) == ("stem/inner_norm", "batch_normalization_2")
    for name in (inner.name, "inner_norm", "layers/functional/layers/batch_normalization"):
        net = nn.Sequential(bn.BatchNorm2d(3))
        bn.load_keras(net, path, layers={"0": name})
        np.testing.assert_array_equal(net[0].running_mean, inner.mean)


def test_subclassed_models_do_not_tell_their_order(tmp_path: Path):
    path = unpacked("keras3.attributes.weights.h5", tmp_path)
    with pytest.raises(InputError, match="do not tell their order"):
        bn.load_keras(network(5), path)
    with pytest.raises(InputError, match="holds three vectors"):
        bn.load_keras(
            nn.Sequential(bn.BatchNorm2d(3)),
            unpacked("keras3.no_scale.weights.h5", tmp_path),
            layers={"0": "blocks/batch_normalization"},
        )


def test_the_generation_of_keras_decides_where_a_file_does_not_say_fused(tmp_path: Path):
    path = unpacked("keras2.fused.h5", tmp_path)
    flat = unpacked("keras2.flat.h5", tmp_path)
    kinds = [
        bn.load_keras(network(ndim), path, running_var=kind)[0].running_var_kind
        for ndim, kind in ((4, None), (5, None), (3, None), (4, "biased"))
    ]
    assert kinds == ["unbiased", "unbiased", "biased", "biased"]
    assert bn.load_keras(network(2), flat)[0].running_var_kind == "biased"
    assert bn.load_keras(network(4), unpacked("keras3.legacy.h5", tmp_path))[0].running_var_kind == "biased"
    with pytest.raises(InputError, match="running_var='fused'"):
        bn.load_statistics(network(4), path, running_var="fused")


def test_two_vectors_are_a_batch_norm_where_the_caller_says_so(tmp_path: Path):
    """Without scale and center there are as many as a layer normalization has; a name that Keras gave tells it."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "net.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_group("vars")
        for name in ("block/batch_normalization", "block/own"):
            group = file.create_group(f"{name}/vars")
            group["0"], group["1"] = np.full(3, 2.0), np.full(3, 4.0)
    assert [f.name for f in bn.read_statistics(path).layers] == ["block/batch_normalization"]
    net = nn.Sequential(bn.BatchNorm1d(3, affine=False))
    bn.load_keras(net, path, layers={"0": "block/own"})
    assert net[0].running_var.tolist() == [4.0] * 3


def test_decay_of_zero_is_given(tmp_path: Path):
    net = bn.load_keras(network(4), unpacked("keras3.legacy.h5", tmp_path), decay=0.0, eps=0.0)
    assert (net[0].momentum, net[0].eps) == (1.0, 0.0)


def test_weights_are_written_where_keras_3_looks_for_them(tmp_path: Path):
    """Each array that we write lies where Keras wrote it, in a group that carries a layer's name."""
    h5py = pytest.importorskip("h5py")
    real = unpacked("keras3.sequential.weights.h5", tmp_path)
    net = bn.load_keras(network(4), real)
    bn.save_keras(net, tmp_path / "ours.weights.h5")
    with h5py.File(real) as theirs, h5py.File(tmp_path / "ours.weights.h5") as ours:
        for name in ("batch_normalization", "batch_normalization_1"):
            group = f"layers/{name}/vars"
            assert ours[group].keys() == theirs[group].keys()
            assert ours[group].attrs.keys() == theirs[group].attrs.keys()
            for key in ours[group]:
                np.testing.assert_array_equal(ours[group][key], theirs[group][key])
        assert "vars" in ours
    again = bn.load_keras(network(4), tmp_path / "ours.weights.h5")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


# Pickles


class Marker:
    """Leaves a mark if its pickle is executed."""

    marks: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        return leave_mark, ("executed",)


def leave_mark(text: str) -> dict[str, Any]:
    Marker.marks += (text,)
    return {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_not_executed(protocol: int, tmp_path: Path):
    path = tmp_path / "net.pdparams"
    vectors = {"0._mean": np.zeros(3), "0._variance": np.ones(3), "0.weight": np.ones(3), "0.bias": np.zeros(3)}
    path.write_bytes(pickle.dumps({**vectors, "more": Marker()}, protocol))
    with pytest.raises(InputError, match=r"holds more than arrays.*leave_mark"):
        bn.read_statistics(path)
    assert Marker.marks == ()
    path.write_bytes(pickle.dumps({**vectors, "0._mean": np.array([None, 1, 2])}, protocol))
    with pytest.raises(InputError, match="holds more than arrays"):
        bn.read_statistics(path)
    path.write_bytes(pickle.dumps({**vectors, "0._mean": np.arange(3, dtype=">f8")}, protocol))  # the other byte order
    (found,) = bn.read_statistics(path).layers
    np.testing.assert_array_equal(found.mean, [0, 1, 2])
    assert np.dtype("f8").byteorder == "="


def test_jittor_keeps_the_biased_variance_under_torchs_names(tmp_path: Path):
    path = unpacked("jittor.pkl", tmp_path)
    net = network(4)
    assert bn.load_statistics(net, path, layers={"0": "first", "2": "second"}).framework == "jittor"
    assert (net[0].running_var_kind, net[0].eps) == ("biased", 1e-5)  # our settings stay


# Caffe and Darknet


def test_caffe_divides_its_sums_by_their_factor(tmp_path: Path):
    """Evaluation is OpenCV's, and statistics after five more batches those of Caffe's formulas."""
    path, want = unpacked("caffe.caffemodel", tmp_path), expected("caffe.caffemodel")
    net = network(4)
    assert bn.load_statistics(net, path).layers == {"0": "bn1", "2": "bn2"}
    assert [(m.decay, m.eps, int(m.num_batches_tracked)) for m in (net[0], net[2])] == [(0.9, 0.01, 3), (0.8, 1e-3, 3)]
    x = [first(batch) for batch in want["x"]]
    np.testing.assert_allclose(net.eval()(x[0]).detach(), first(want["before"]), rtol=1e-6, atol=1e-6)
    net.train()
    for batch in x[1:]:
        net(batch)
    for i in (0, 1):
        for key, got in (("mean", net[2 * i].running_mean), ("var", net[2 * i].running_var)):
            np.testing.assert_allclose(got, want[f"{i}.{key}"], rtol=1e-6, atol=1e-6)


def message(number: int, *parts: bytes | int) -> bytes:
    """Fields of one number in a message of protobuf: bytes with their length, or integers."""

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    kinds = [varint(number << 3 | 2 * isinstance(part, bytes)) for part in parts]
    sizes = [varint(len(part)) + part if isinstance(part, bytes) else varint(part) for part in parts]
    return b"".join(kind + content for kind, content in zip(kinds, sizes, strict=True))


def caffe_layer(name: bytes, kind: bytes, bottom: bytes, *blobs: list[float]) -> bytes:
    made = [message(5, np.asarray(blob, "<f4").tobytes()) for blob in blobs]
    texts = (message(i, text) for i, text in ((1, name), (2, kind), (3, bottom), (4, name)))
    return message(100, b"".join(texts) + message(7, *made))


def test_caffe_before_training_and_without_scale(tmp_path: Path):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(
        caffe_layer(b"a", b"BatchNorm", b"x", [1, 2], [3, 4], [0])  # a factor of 0 means 0
        + caffe_layer(b"b", b"BatchNorm", b"a", [1, 2], [3, 4], [2])
        + caffe_layer(b"bias", b"Bias", b"b", [5, 6])
        + caffe_layer(b"c", b"BatchNorm", b"bias", [1e3, 0], [1e3, 1e3], [1e3])  # what a factor tends to at 0.999
    )
    a, b, c = bn.read_statistics(path).layers
    assert [v.tolist() for v in (a.mean, a.var)] == [[0, 0], [0, 0]]
    assert (a.gamma, a.beta, a.batches) == (None, None, 0)
    assert [v.tolist() for v in (b.mean, b.var)] == [[0.5, 1], [1.5, 2]]
    assert b.gamma is None
    assert b.beta is not None
    assert b.beta.tolist() == [5, 6]
    assert c.batches is not None
    assert c.batches > 20_000
    path.write_bytes(caffe_layer(b"a", b"BatchNorm", b"x", [1], [1], [1], [1], [1]))
    with pytest.raises(DataError, match="5 blobs; expected mean, variance and factor"):
        bn.read_statistics(path)


DARKNET = """
[net]
channels = 2 ; comments may follow
height = 4
width = 4
[convolutional]
filters = 4
size = 3
pad = 1
batch_normalize = 1
[maxpool]
size = 2
stride = 2
[upsample]
stride = 2
[route]
layers = -1, 0
[reorg]
stride = 2
[convolutional]
filters = 2
groups = 2
batch_normalize = 1
[shortcut]
from = -1
[connected]
output = 3
batch_normalize = 1
"""
# Numbers of each layer: before its three vectors, its channels, after them.
DARKNET_SIZES = {"convolutional_0": (4, 4, 72), "convolutional_5": (2, 2, 32), "connected_7": (3 + 3 * 8, 3, 0)}

# As yolov3-tiny: heads without normalization, a route to one layer before, pooling of stride 1.
YOLO = """
[net]
channels=3
height=8
width=8
[convolutional]
batch_normalize=1
filters=2
size=3
pad=1
[maxpool]
size=2
stride=2
[convolutional]
batch_normalize=1
filters=4
size=3
pad=1
[maxpool]
size=2
stride=1
[convolutional]
batch_normalize=1
filters=2
[convolutional]
filters=18
activation=linear
[yolo]
mask = 3,4,5
anchors = 10,14,  23,27,  37,58,  81,82,  135,169,  344,319
[route]
layers = -4
[convolutional]
batch_normalize=1
filters=2
[upsample]
stride=2
[route]
layers = -1, 0
[convolutional]
batch_normalize=1
filters=3
size=3
pad=1
[convolutional]
batch_normalize=0
filters=18
[yolo]
mask = 0,1,2
"""
YOLO_SIZES = {
    "convolutional_0": (2, 2, 54),
    "convolutional_2": (4, 4, 72),
    "convolutional_4": (2, 2, 8 + 18 + 36),
    "convolutional_8": (2, 2, 8),  # which reads layer 3, of four channels
    "convolutional_11": (3, 3, 108 + 18 + 54),
}


def darknet(folder: Path, version: int = 2, text: str = DARKNET, layers: Any = None) -> tuple[Path, np.ndarray]:
    sizes = [before + 3 * channels + after for before, channels, after in (layers or DARKNET_SIZES).values()]
    numbers = np.random.default_rng(0).uniform(1, 2, sum(sizes)).astype("<f4")
    header = np.array([0, version, 0], "<i4").tobytes() + bytes(8 if version == 2 else 4)
    (folder / "net.cfg").write_text(text)
    (folder / "net.weights").write_bytes(header + numbers.tobytes())
    return folder / "net.weights", numbers


@pytest.mark.parametrize(("version", "kind"), [(1, "all"), (2, "all"), (2, "yolo")])
def test_darknets_numbers_are_told_apart_by_its_configuration(version: int, kind: str, tmp_path: Path):
    text, layers = {"all": (DARKNET, DARKNET_SIZES), "yolo": (YOLO, YOLO_SIZES)}[kind]
    path, numbers = darknet(tmp_path, version, text, layers)
    found, at = bn.read_statistics(path).layers, 0
    assert [layer.name for layer in found] == list(layers)
    for layer, (before, channels, after) in zip(found, layers.values(), strict=True):
        vectors = np.split(numbers[at + before : at + before + 3 * channels], 3)
        np.testing.assert_array_equal(layer.beta, numbers[at : at + channels])
        np.testing.assert_array_equal((layer.gamma, layer.mean), vectors[:2])
        np.testing.assert_allclose(np.sqrt(layer.var), np.sqrt(vectors[2].astype(float)) + 1e-6, rtol=1e-12)
        at += before + 3 * channels + after
    assert at == len(numbers)


def test_darknets_weights_that_do_not_fit(tmp_path: Path):
    path, _ = darknet(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: 20 + 4 * (4 + 12 + 72)])  # the first layers alone, as weights for a new head are
    assert [layer.name for layer in bn.read_statistics(path).layers] == ["convolutional_0"]
    for content, reason in ((whole[:-4], "ends within a layer"), (whole + bytes(4), "1 numbers more")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            bn.read_statistics(path)
    path.write_bytes(whole)
    path.with_suffix(".cfg").write_text(DARKNET.replace("[maxpool]", "[lstm]"))
    with pytest.raises(DataError, match=r"section 1 \[lstm\].*laid out in another way"):
        bn.read_statistics(path)
    path.with_suffix(".cfg").unlink()
    with pytest.raises(InputError, match=r"have no names.*net\.cfg"):
        bn.read_statistics(path)


# Objects in memory


class Holder:
    """An object with an attribute, as the variables of nnx and the parameters of MindSpore are."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize("leaf", [lambda a: a, lambda a: {"value": a}, lambda a: Holder(get_value=lambda: a)])
def test_states_of_nnx(leaf: Any):
    """`nnx.state(model)`, its pure dictionary, and what orbax restores of it."""
    vectors = {"scale": np.ones(3), "bias": np.zeros(3), "mean": np.full(3, 2.0), "var": np.full(3, 4.0)}
    state = {"norms": {i: {k: leaf(v + i) for k, v in vectors.items()} for i in range(2)}}
    net = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    loaded = bn.load_statistics(net, state)
    assert (loaded.framework, loaded.layers) == ("nnx", {"0": "norms/0", "1": "norms/1"})
    assert net[1].running_var.tolist() == [5.0] * 3
    assert (net[0].momentum, net[0].eps, net[0].running_var_kind) == (pytest.approx(0.01), 1e-5, "biased")


def test_a_train_state_and_the_pair_of_haiku(tmp_path: Path):
    trees = pytest.importorskip("batchnorm.population.formats.trees")
    tree = trees.read_msgpack(unpacked("flax.train_state.msgpack", tmp_path))
    assert {"step", "opt_state"} <= tree.keys()
    state = Holder(params=tree["params"], batch_stats=tree["batch_stats"])
    for each in (state, {"model": state, "epoch": 3}):
        assert [f.name for f in bn.read_statistics(each).layers] == ["BatchNorm_0", "BatchNorm_1"]

    arrays = dict(np.load(unpacked("haiku.npz", tmp_path)))
    params: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        path, _, key = rest.rpartition("/")
        {"params": params, "state": inner}[kind].setdefault(path, {})[key] = value
    found = bn.read_statistics((params, inner))
    assert (found.framework, [f.decay for f in found.layers]) == ("haiku", [0.9, 0.8])
    assert [f.batches for f in found.layers] == [3, 3]


def test_equinox_as_objects():
    """A model is a data class whose layers hold indices into a state."""
    import dataclasses

    @dataclasses.dataclass
    class Model:
        norm: Any

    layer = Holder(weight=np.ones(2), bias=np.zeros(2), momentum=0.9, eps=1e-4, ema_state_index=None)
    layer.batch_state_index, layer.batch_counter = "hidden", "count"
    values = {"hidden": (np.full(2, 0.19), np.full(2, 0.38)), "count": 2}
    state = Holder(get=values.__getitem__)
    net = nn.Sequential(bn.BatchNorm1d(2))
    assert bn.load_statistics(net, (Model(layer), state)).layers == {"0": "norm"}
    torch.testing.assert_close(net[0].running_mean, torch.ones(2))
    torch.testing.assert_close(net[0].running_var, torch.full((2,), 2.0))
    assert (net[0].running, int(net[0].num_batches_tracked)) == ("debiased", 2)
    layer.batch_state_index, layer.ema_state_index = None, "hidden"
    with pytest.raises(InputError, match='mode="ema"'):
        bn.load_statistics(net, (Model(layer), state))


def test_states_of_torch_keep_its_settings_and_graphs_keys_are_known(tmp_path: Path):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    net(torch.randn(8, 3) + 3)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = network(2)
    other[0].momentum = 0.3
    assert bn.load_statistics(other, tmp_path / "net.pt").framework == "torch"
    assert (other[0].momentum, other[0].running_var_kind) == (0.3, "unbiased")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    graph = {f"{i}.module.{key}": value for i in (0, 2) for key, value in net[i].state_dict().items()}  # as PyG names
    again = network(2)
    assert list(bn.load_statistics(again, graph).layers.values()) == ["0.module", "2.module"]
    assert torch.equal(again[2].running_var, net[2].running_var)
    hetero = {"running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)}
    with pytest.raises(InputError, match="HeteroBatchNorm"):
        bn.load_statistics(nn.Sequential(bn.BatchNorm1d(3)), hetero)
    own = nn.Sequential(bn.BatchNorm1d(3, domains=2))
    own(torch.randn(4, 3))
    with pytest.raises(InputError, match=r"row of statistics for each; net\.load_state_dict"):
        bn.load_statistics(nn.Sequential(bn.BatchNorm1d(3, domains=2)), own.state_dict())


# Refusals


def test_files_that_need_their_framework_say_what_to_write(tmp_path: Path):
    (tmp_path / "variables.index").write_bytes(bytes(40) + bytes.fromhex("57fb808b247547db"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    for name in ("variables.index", "saved"):
        with pytest.raises(InputError, match=r"TensorFlow.*model.keras"):
            bn.load_statistics(network(2), tmp_path / name)
    for content in (b"", b"GIF89a", b"\x0a\x01", b"PK\x03\x04", b"\x93NUMPY", b"{}", b"\x80\x04.", b"\x81"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises((DataError, InputError), match="other"):
            bn.load_statistics(network(2), tmp_path / "other")


def test_a_folder_of_orbax_is_read_with_tensorstore(tmp_path: Path):
    pytest.importorskip("tensorstore")
    path, want = unpacked("flax.nnx.orbax", tmp_path), expected("flax.nnx.orbax")
    net = network(want["target"].ndim)
    loaded = bn.load_statistics(net, path)
    assert (loaded.framework, loaded.kind) == ("nnx", "Flax nnx (folder of orbax, state of Flax nnx)")
    for ours, (decay, eps) in zip("02", ((0.9, 1e-2), (0.8, 1e-3)), strict=True):
        bn.load_statistics(net, path, layers={ours: loaded.layers[ours]}, decay=decay, eps=eps)
    y = net.eval()(first(want["x"][0]))
    np.testing.assert_allclose(y.detach(), first(want["before"]), rtol=1e-6, atol=1e-6)
    (path / "_METADATA").write_text('{"tree_metadata": []}')
    with pytest.raises(DataError, match="does not name the leaves"):
        bn.read_statistics(path)


def test_a_folder_of_orbax_without_tensorstore_says_what_to_do(tmp_path: Path, monkeypatch: Any):
    path = unpacked("flax.nnx.orbax", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install tensorstore.*StandardCheckpointer.*to_bytes"):
        bn.load_statistics(network(2), path)


def test_the_last_step_of_orbax_and_its_items(tmp_path: Path):
    from batchnorm.population.formats import orbax

    def folder(name: str) -> None:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "_METADATA").touch()

    for name in ("steps/9/default", "steps/10/params", "steps/10/batch_stats", "flax/checkpoint_2", "one"):
        folder(name)

    def found(name: str) -> list[str]:
        return [str(each.relative_to(tmp_path)) for each in orbax.items(tmp_path / name)]

    assert found("steps") == ["steps/10/batch_stats", "steps/10/params"]
    assert found("steps/10") == ["steps/10/batch_stats", "steps/10/params"]
    assert (found("flax"), found("one"), found("nothing")) == (["flax/checkpoint_2"], ["one"], [])


def test_states_that_were_split_flattened_or_kept_in_other_fields():
    """All are one model: pairs of params and batch_stats, flat dictionaries, a TrainState with the state in a field."""
    params = {"stem": {"norm": {"scale": np.ones(3), "bias": np.zeros(3)}}}
    batch_stats = {"stem": {"norm": {"mean": np.full(3, 2.0), "var": np.full(3, 4.0)}}}
    flat = {f"params/stem/norm/{k}": v for k, v in params["stem"]["norm"].items()}
    flat |= {f"batch_stats/stem/norm/{k}": v for k, v in batch_stats["stem"]["norm"].items()}

    @dataclass
    class State:
        step: int
        params: Any
        model_state: Any

    for source in (
        (params, batch_stats),
        flat,
        {tuple(key.split("/")): value for key, value in flat.items()},
        State(3, params, {"batch_stats": batch_stats}),
        {"best": State(3, params, {"batch_stats": batch_stats})},
    ):
        (layer,) = bn.read_statistics(source).layers
        assert layer.name == "stem/norm"
        assert layer.gamma is not None
        np.testing.assert_array_equal([layer.gamma, layer.mean, layer.var], [[1] * 3, [2] * 3, [4] * 3])


def test_counters_of_bfloat16_files_are_read(tmp_path: Path):
    """tinygrad 0.14.0 writes bfloat16 without a format's name; the counter tells the file from one of MLX."""
    net, path = nn.Sequential(nn.BatchNorm2d(3)), tmp_path / "half.safetensors"
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    state |= {"0.num_batches_tracked": torch.tensor(7), "0.running_var": torch.full((3,), 2.5).bfloat16()}
    save_file(state, path)
    found = bn.load_statistics(net, path)
    assert found.framework == "torch"
    assert (int(net[0].num_batches_tracked), net[0].running_var.tolist()) == (7, [2.5] * 3)


def test_an_onnx_model_is_told_what_to_do(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08:\x04")
    with pytest.raises(DataError, match="batchnorm fold"):
        bn.load_statistics(nn.BatchNorm1d(3), path)


def test_paddles_nested_files_and_its_bfloat16(tmp_path: Path):
    """In a nested file a tensor is the pair of its name and array; bfloat16 lies in integers of 16 bits."""
    path = tmp_path / "net.pdparams"
    values = {"_mean": 1.5, "_variance": 2.0, "weight": 3.0, "bias": -1.0}
    state = {f"bn.{key}": np.full(3, value, np.float32) for key, value in values.items()}
    half = {key: (value.view(np.uint32) >> 16).astype(np.uint16) for key, value in state.items()}

    class Named:
        """A tensor, whose pickle calls the built-in class tuple."""

        def __init__(self, *parts: Any) -> None:
            self.parts = parts

        def __reduce__(self) -> Any:
            return tuple, (self.parts,)

    for content in (half, {"model": {k: Named(k, v) for k, v in state.items()}, "epoch": 3, "lr": 0.1}):
        path.write_bytes(pickle.dumps(content, 4))
        (layer,) = bn.read_statistics(path).layers
        assert (layer.name, layer.mean.tolist(), layer.var.tolist()) == ("bn", [1.5] * 3, [2.0] * 3)
        assert "use_global_stats=True" in bn.read_statistics(path).notes[1]


def test_chainers_layers_that_were_not_run_and_its_hdf5(tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    vectors = {"avg_mean": np.ones(2), "avg_var": np.full(2, 4.0), "gamma": np.ones(2), "beta": np.zeros(2)}
    named = {f"predictor/bn/{key}": value for key, value in vectors.items()}
    np.savez(tmp_path / "net.npz", **named, **{"lazy/W": np.array(None)})
    with h5py.File(tmp_path / "net.h5", "w") as file:
        for key, value in named.items():
            file[key] = value
    for name in ("net.npz", "net.h5"):
        found = bn.read_statistics(tmp_path / name)
        assert (found.framework, [f.name for f in found.layers]) == ("chainer", ["predictor/bn"])
    np.savez(tmp_path / "net.npz", **{"lazy/W": np.array(None)})
    with pytest.raises(DataError, match="Python objects alone"):
        bn.read_statistics(tmp_path / "net.npz")


def test_an_equinox_model_that_saw_no_batch(tmp_path: Path):
    """Its variance of 1 would be divided with the first batches, which no average of ours does."""
    bn.save_statistics(nn.Sequential(bn.BatchNorm1d(3, running="debiased")), tmp_path / "net.eqx")
    with pytest.raises(InputError, match="has seen no batch"):
        bn.load_statistics(nn.Sequential(bn.BatchNorm1d(3)), tmp_path / "net.eqx")


def test_a_framework_that_the_content_is_not(tmp_path: Path):
    path = unpacked("chainer.npz", tmp_path)
    with pytest.raises(InputError, match=r"framework='paddle', but the content is that of Chainer"):
        bn.load_statistics(network(4), path, "paddle")
    with pytest.raises(InputError, match="expected one of"):
        bn.load_statistics(network(4), path, "cntk")
    with pytest.raises(InputError, match="do not tell their order"):
        bn.load_statistics(network(4), path)
    said = str(bn.load_statistics(network(4), path, "Chainer", {"0": "first", "2": "second"}))
    assert said.startswith("Chainer (.npz): 2 batch normalizations, '0' from 'first', '2' from 'second'")


def test_bfloat16_of_flax(tmp_path: Path):
    net = network(2)
    bn.load_flax(net, unpacked("flax.bfloat16.msgpack", tmp_path))
    assert all(torch.equal(v.bfloat16().float(), v) for v in (net[0].weight, net[2].bias))
    assert (net[0].bias != 0).all()


# Writing


WRITTEN = {
    "keras3.sequential.weights.h5": "keras3",
    "keras2.by_name.h5": "keras2",
    "flax.linen.msgpack": "flax",
    "flax.nnx.msgpack": "nnx",
    "paddle.images.pdparams": "paddle",
    "mindspore.images.ckpt": "mindspore",
    "mindspore.flat.safetensors": "mindspore",
    "mlx.safetensors": "mlx",
    "mlx.npz": "mlx",
    "tinygrad.safetensors": "tinygrad",
    "chainer.npz": "chainer",
    "haiku.npz": "haiku",
    "equinox.eqx": "equinox",
    "equinox.no_affine.eqx": "equinox",
    "caffe.caffemodel": "caffe",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_what_the_framework_wrote(name: str, tmp_path: Path):
    """The same layers under the same names, with the same vectors: in each file of ours and of theirs."""
    real, framework = unpacked(name, tmp_path), WRITTEN[name]
    first, second = (f.name for f in bn.read_statistics(real, framework).layers)
    net = network_of(name)
    layers = {"0": first, "2": second}
    bn.load_statistics(net, real, framework, layers)
    ours = tmp_path / f"ours.{name.partition('.')[2]}"
    bn.save_statistics(net, ours, framework, layers)
    theirs, written = bn.read_statistics(real, framework), bn.read_statistics(ours, framework)
    assert [f.name for f in written.layers] == [f.name for f in theirs.layers]
    rounded = 2e-7 if framework in ("equinox", "caffe") else 0  # which keep averages before they are divided
    for a, b in zip(written.layers, theirs.layers, strict=True):
        for key in ("gamma", "beta", "mean", "var"):
            if getattr(b, key) is None:
                assert getattr(a, key) is None
                continue
            np.testing.assert_allclose(getattr(a, key), getattr(b, key), rtol=rounded)
    assert bn.read_statistics(ours).framework in (framework, "keras3" if framework == "keras2" else "torch")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, ours.name])


def test_equinox_layers_without_weights_are_told_by_size_or_refused():
    from batchnorm.population.formats.equinox import of_leaves

    def leaves(affine: list[int], states: list[int]) -> list[np.ndarray]:
        flag = np.asarray(False)
        weights = [a for n in affine for a in (np.full(n, 2.0, "f4"), np.ones(n, "f4"), flag)]
        return weights + [a for n in states for a in (np.asarray(1, "i4"), np.ones(n, "f4"), np.ones(n, "f4"))]

    def gammas(affine: list[int], states: list[int]) -> list[int | None]:
        return [f.gamma if f.gamma is None else f.gamma.size for f in of_leaves(leaves(affine, states), None).layers]

    assert gammas([], [3, 4]) == [None, None]
    assert gammas([4], [3, 4, 5]) == [None, 4, None]
    assert gammas([3, 5], [3, 4, 5]) == [3, None, 5]
    assert gammas([3, 3], [3, 3]) == [3, 3]
    for affine, states in (([3], [3, 3]), ([4, 3], [3, 4, 5]), ([3, 4], [3]), ([6], [3, 4]), ([], [])):
        with pytest.raises(InputError, match="not certain which belong together"):
            of_leaves(leaves(affine, states), None)


NO_NAMES = ("equinox.eqx", "equinox.header.eqx", "equinox.no_affine.eqx")
TEMPLATES = ("haiku.npz", *NO_NAMES, "caffe.caffemodel", "darknet.folder")


def numbers_of(path: Path) -> list[np.ndarray]:
    """All arrays of a file, in order."""
    from batchnorm.population.formats import caffe, containers

    if path.suffix == ".npz":
        return list(containers.npz(path).values())
    if path.suffix == ".eqx":
        return containers.npy_sequence(path)[1]
    if path.suffix == ".weights":
        return [np.frombuffer(path.read_bytes()[20:], "<f4")]
    layers = caffe.layers_of(path.read_bytes())
    assert layers is not None
    return [caffe._vector(blob) for layer in layers for blob in layer.blobs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_layers_are_written_into_a_file_of_the_whole_model(name: str, tmp_path: Path):
    """What was read and is written again changes nothing else; new vectors are read where the old ones were."""
    real = unpacked(name, tmp_path)
    net = network_of(name)
    named = weights_of(real)
    bn.load_statistics(net, real, layers=named, frozen=True)
    ours = tmp_path / f"ours{real.suffix}"
    options: dict[str, Any] = {"framework": "haiku", "layers": named} if real.suffix == ".npz" else {}
    bn.save_statistics(net, ours, like=real, **options)
    for a, b in zip(numbers_of(ours), numbers_of(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-30)
    with torch.no_grad():
        for i in (0, 2):
            if net[i].weight is not None:
                net[i].weight.add_(i + 1)
            net[i].running_mean.mul_(2)
            net[i].running_var.add_(0.5)
    bn.save_statistics(net, ours, like=real, **options)
    if name == "darknet.folder":
        ours.with_suffix(".cfg").write_text(real.with_suffix(".cfg").read_text())
    again = network_of(name)
    bn.load_statistics(again, ours, layers=named, frozen=True)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=3e-7, atol=0)
    options.pop("layers", None)
    with pytest.raises(InputError, match="3 batch normalizations, the checkpoint 2"):
        bn.save_statistics(nn.Sequential(*(bn.BatchNorm2d(3) for _ in range(3))), ours, like=real, **options)
    with pytest.raises(InputError, match="has 5 channels"):
        bn.save_statistics(nn.Sequential(bn.BatchNorm2d(5)), ours, like=real, layers={"0": named["0"]}, **options)


@pytest.mark.parametrize("end", [".npz", ".eqx", ".caffemodel"])
def test_averages_that_are_not_debiased_go_on_alike_where_the_framework_divides(end: str, tmp_path: Path):
    """The file says t from which 1 - decay^t is 1: what is read again takes the next batches in as our layer does."""
    framework = {".npz": "haiku", ".eqx": "equinox", ".caffemodel": "caffe"}[end]
    net = nn.Sequential(bn.BatchNorm1d(3, momentum=0.2, running_var="unbiased" if end == ".caffemodel" else "biased"))
    x = torch.randn(6, 16, 3) * 2 + 1
    for batch in x[:3]:
        net(batch)
    bn.save_statistics(net, tmp_path / f"net{end}", framework)
    again = nn.Sequential(bn.BatchNorm1d(3))
    bn.load_statistics(again, tmp_path / f"net{end}", framework, decay=0.8, eps=1e-5)
    assert again[0].running == "debiased"
    for batch in x[3:]:
        torch.testing.assert_close(again(batch), net(batch))
    torch.testing.assert_close(again[0].running_mean, net[0].running_mean)
    torch.testing.assert_close(again[0].running_var, net[0].running_var)
    net[0].momentum = None
    if end != ".caffemodel":
        with pytest.raises(InputError, match="or cumulatively"):
            bn.save_statistics(net, tmp_path / f"other{end}", framework)
        return
    bn.save_statistics(net, tmp_path / "other.caffemodel")
    bn.load_statistics(again, tmp_path / "other.caffemodel")
    assert again[0].running == "cumulative"
    for batch in x[3:]:
        torch.testing.assert_close(again(batch), net(batch))
    torch.testing.assert_close(again[0].running_var, net[0].running_var)


# Written back into a model's own file

BACK = {
    "keras3.sequential.keras": {},
    "keras3.nested.keras": {},
    "keras3.frozen.keras": {},
    "keras3.legacy.h5": {},
    "keras3.no_center.keras": {},
    "keras3.sequential.weights.h5": {},
    "keras3.renorm.keras": {"frozen": True},
    "keras2.fused.keras": {},
    "keras2.frozen.h5": {},
    "keras2.equal_names.h5": {},
    "keras2.renorm.h5": {"frozen": True},
    "keras2.by_name.h5": {},
}


@pytest.mark.parametrize("name", BACK)
def test_settings_and_vectors_are_written_back_into_a_file_of_keras(name: str, tmp_path: Path):
    """What is read again is our layer: vectors, momentum, epsilon and trainable; all other content stays."""
    h5py = pytest.importorskip("h5py")
    real, options = unpacked(name, tmp_path), BACK[name]
    file = FILES.get(name, File("keras2" if name.startswith("keras2") else "keras3"))
    net = network(expected(name)["target"].ndim, file.without)
    layers = bn.load_statistics(net, real, **options).layers
    ours = tmp_path / f"ours.{name.partition('.')[2]}"
    bn.save_statistics(net, ours, like=real)
    assert_same(bn.read_statistics(ours).layers, bn.read_statistics(real).layers)
    with torch.no_grad():
        for i, m in enumerate((net[0], net[2])):
            m.running_mean.add_(i + 1)
            m.running_var.mul_(2)
            if m.weight is not None:
                m.weight.mul_(3)
    configured = ".weights." not in name and "by_name" not in name
    if not options:
        net[0].momentum, net[0].eps = 0.25, 0.02
        bn.set_mode(net[2], source="running", update="never", affine=False)
        bn.set_mode(net[0], source="auto", update="auto", affine=True)
    said = bn.save_statistics(net, ours, like=real)
    assert said.layers == layers
    found = {f.name: f for f in bn.read_statistics(ours).layers}
    for i, their in ((0, layers["0"]), (2, layers["2"])):
        f = found[their]
        for vector, value in ((f.mean, net[i].running_mean), (f.var, net[i].running_var), (f.gamma, net[i].weight)):
            if value is not None:
                np.testing.assert_array_equal(vector, value.detach())
    if configured:
        assert said.notes == ()
        assert found[layers["0"]].decay == pytest.approx(net[0].decay, rel=1e-12)
        assert found[layers["0"]].eps == net[0].eps
        assert [found[layers[i]].frozen for i in "02"] == ([False, False] if options else [False, True])
    else:
        assert "does not hold momentum=0.75 and epsilon=0.02" in said.notes[0]
        assert any("set trainable=False there" in note for note in said.notes)
    if "renorm" in name:  # which goes on from the same mean and standard deviation
        content = ours
        if name.endswith(".keras"):
            with zipfile.ZipFile(ours) as archive:
                content = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content) as opened:
            vectors = []
            opened.visititems(lambda _, node: vectors.append(np.asarray(node)) if hasattr(node, "shape") else None)
        wanted = np.sqrt(net[0].running_var.numpy() + np.float32(net[0].eps))
        assert sum(v.shape == (3,) and np.allclose(v, wanted, rtol=1e-6) for v in vectors) == 2


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in ("gamma", "beta", "mean", "var"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
        assert (a.name, a.decay, a.eps, a.frozen, a.obstacle) == (b.name, b.decay, b.eps, b.frozen, b.obstacle)


@pytest.mark.parametrize(
    ("name", "other", "end"),
    [
        ("keras3.attributes.weights.h5", "new.keras", ".weights.h5"),
        ("keras2.plain.keras", "new.weights.h5", ".keras"),
        ("keras2.flat.h5", "new.weights.h5", ".h5"),
        ("haiku.npz", "new.pkl", ".npz"),
    ],
)
def test_a_file_like_another_has_its_kind_of_name(name: str, other: str, end: str, tmp_path: Path):
    real = unpacked(name, tmp_path)
    with pytest.raises(InputError, match=rf"{other} would be a file as like=.*ends in {re.escape(end)}$"):
        bn.save_statistics(twin_of(real), tmp_path / other, like=real, layers=names_of(real))
    assert not (tmp_path / other).exists()


@pytest.mark.parametrize("name", ["haiku.msgpack", "haiku.pkl"])
def test_a_pair_of_haiku_that_is_no_npz_is_no_template(name: str, tmp_path: Path):
    real = unpacked(name, tmp_path)
    with pytest.raises(InputError, match=r"is no \.npz; of Haiku like= takes"):
        bn.save_statistics(twin_of(real), tmp_path / f"new{real.suffix}", like=real, layers=names_of(real))


def twin_of(path: Path) -> nn.Sequential:
    """Layers of the sizes that the file has."""
    layers = bn.read_statistics(path).layers
    return nn.Sequential(*(bn.BatchNorm1d(f.mean.size, affine=f.gamma is not None) for f in layers))


def names_of(path: Path) -> dict[str, str]:
    return {str(i): f.name for i, f in enumerate(bn.read_statistics(path).layers)}


def test_bfloat16_is_written_as_the_file_has_it(tmp_path: Path):
    real = unpacked("keras3.bfloat16.weights.h5", tmp_path)
    net = network(2)
    bn.load_keras(net, real)
    bn.save_keras(net, tmp_path / "ours.weights.h5", like=real)
    assert_same(bn.read_statistics(tmp_path / "ours.weights.h5").layers, bn.read_statistics(real).layers)
    with torch.no_grad():
        net[0].running_mean.copy_(torch.tensor([1.00390625 + 1e-4, -3.3e38, 1e-30]))
    bn.save_keras(net, tmp_path / "ours.weights.h5", like=real)
    rounded = net[0].running_mean.bfloat16().float()
    np.testing.assert_array_equal(bn.read_statistics(tmp_path / "ours.weights.h5").layers[0].mean, rounded)


def test_what_a_file_does_not_hold_is_told(tmp_path: Path):
    """Nothing of a layer is dropped in silence: it is in the file, in the notes, or refused by name."""
    net = nn.Sequential(
        bn.BatchNorm1d(3, momentum=0.25, eps=0.5, running_var="biased", activation="relu"),
        bn.BatchNorm1d(3, momentum=0.01, eps=1e-3, running="debiased"),
        bn.BatchNorm1d(3, track_running_stats=False),
    )
    said = bn.save_statistics(net, tmp_path / "net.weights.h5")
    assert (said.framework, list(said.layers)) == ("keras3", ["0", "1"])
    for note in (
        "'0': the file does not hold momentum=0.75 and epsilon=0.5; set them there",
        "'0': activation='relu' is not in the file",
        "'1': its variance is unbiased, and training there goes on with the biased one",
        "'1': its average is debiased, and training there goes on with a plain moving average",
        "not written, since they keep no running statistics: '2'",
    ):
        assert note in said.notes
    assert len(said.notes) == 5
    bn.set_mode(net[0], source="running")
    assert any("source='running' is not in the file" in note for note in bn.save_keras(net, tmp_path / "n.h5").notes)
    plain = nn.Sequential(bn.BatchNorm1d(3, decay=0.9, eps=1e-5, running_var="biased"))
    assert bn.save_statistics(plain, tmp_path / "net.pdparams").notes == ()
    assert str(bn.save_statistics(plain, tmp_path / "net.pdparams")).endswith("1 batch normalizations, '0' as '0'")
    for options in ({"ghost_size": 2}, {"renorm": bn.Renorm()}, {"channel_groups": 3}):
        own = nn.Sequential(bn.BatchNorm1d(3, **options))
        (word,) = options
        path = tmp_path / f"{word}.h5"
        for write in (bn.to_keras, bn.to_flax, lambda n, path=path: bn.save_statistics(n, path)):
            with pytest.raises(InputError, match=rf"layer '0' has {word}=.*frozen=True writes it for inference alone"):
                write(own)
        assert not path.exists()
        assert any(f"{word}=" in note for note in bn.save_keras(own, path, frozen=True).notes)
        assert bn.to_flax(own, frozen=True)["params"]["0"]["scale"].tolist() == [1] * 3
    weighed = nn.Sequential(bn.BatchNorm1d(3, example_weight=0.5))
    with pytest.raises(InputError, match=r"example_weight=0\.5.*takes it away"):
        bn.save_statistics(weighed, tmp_path / "own.h5", frozen=True)
    with pytest.raises(InputError, match="whole model of Keras; give like="):
        bn.save_statistics(plain, tmp_path / "net.keras")
    unpacked("keras3.weights.sharded", tmp_path)
    with pytest.raises(InputError, match="index of shards"):
        bn.save_statistics(
            network(4), tmp_path / "a.weights.h5", like=tmp_path / "keras3.weights.sharded/model.weights.json"
        )


def test_layers_of_equal_names_keep_their_settings(tmp_path: Path):
    """Two models inside a model, each with a layer called norm: each has its own momentum and epsilon."""
    first, second = bn.read_statistics(unpacked("keras2.equal_names.h5", tmp_path)).layers
    assert [(f.decay, f.eps) for f in (first, second)] == [(0.9, 0.01), (0.8, 0.001)]


def test_names_that_pass_the_size_of_an_attribute(tmp_path: Path):
    found = bn.read_statistics(unpacked("keras3.long_names.h5", tmp_path)).layers
    assert [f.decay for f in found] == [*(0.5 + i / 400 for i in range(150)), 0.9]
    assert found[149].name.endswith("_149")


def test_a_model_and_its_average_are_told_apart(tmp_path: Path):
    path, want = unpacked("flax.average.msgpack", tmp_path), expected("flax.average.msgpack")
    names = [f.name for f in bn.read_statistics(path).layers]
    assert names == [f"{model}/BatchNorm_{i}" for model in ("ema", "model") for i in range(2)]
    with pytest.raises(InputError, match="has 2 batch normalizations, the checkpoint 4"):
        bn.load_statistics(network(2), path)
    net = network(2)
    for (ours, theirs), (decay, eps) in zip({"0": names[2], "2": names[3]}.items(), File("").settings, strict=True):
        bn.load_statistics(net, path, layers={ours: theirs}, decay=decay, eps=eps)
    assert_goes_on(net, want)


def test_variables_of_an_exported_saved_model(tmp_path: Path):
    """As `tf.saved_model.load(folder).variables` names them, with the number of an output behind."""
    vectors = {"gamma": np.ones(3), "beta": np.zeros(3), "moving_mean": np.full(3, 2.0), "moving_variance": np.ones(3)}
    np.savez(tmp_path / "net.npz", **{f"inner/bn/{key}:0": value for key, value in vectors.items()})
    (layer,) = bn.read_statistics(tmp_path / "net.npz").layers
    assert (layer.name, layer.mean.tolist()) == ("inner/bn", [2.0] * 3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "ck.index").write_bytes(bytes(8))
    with pytest.raises(InputError, match="holds a checkpoint of TensorFlow"):
        bn.read_statistics(tmp_path / "folder")


def test_files_that_cannot_be_written(tmp_path: Path):
    net = network(2)
    for name, framework, reason in (
        ("a.safetensors", None, "does not tell whose file"),
        ("a.pt", "mlx", "end in .safetensors"),
        ("a.safetensors", "haiku", "Haiku that are written end in .npz"),
        ("a.weights", None, "give like=, a file of the same network"),
        ("a.npz", "cntk", "expected one of"),
    ):
        with pytest.raises(InputError, match=reason):
            bn.save_statistics(net, tmp_path / name, framework)
    with pytest.raises(InputError, match="one name there"):
        bn.save_statistics(net, tmp_path / "a.npz", "chainer", {"0": "bn", "2": "bn"})
    assert not list(tmp_path.iterdir())


def test_the_command_line_converts_and_summarizes(tmp_path: Path, capsys: Any, monkeypatch: Any):
    from batchnorm.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_nets.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))\n"
    )
    unpacked("keras3.legacy.h5", tmp_path)
    assert main(["convert", "--from", "keras3.legacy.h5", "--network", "foreign_nets:net", "--to", "n.pdparams"]) == 0
    assert "Keras 3 (.h5 model of Keras 3.15.1): 2 batch normalizations" in capsys.readouterr().out
    assert main(["summary", "n.pdparams"]) == 0
    shown = capsys.readouterr().out
    assert "n.pdparams: PaddlePaddle, pickle of arrays" in shown
    assert "goes on alike" in shown
    assert main(["convert", "--from", "n.pdparams", "--network", "foreign_nets:net", "--to", "n.safetensors"]) == 0
    assert main(["summary", "n.safetensors", "--json"]) == 0
    assert '"framework": "torch"' in capsys.readouterr().out
    path = unpacked("darknet.folder", tmp_path)
    Path("out.cfg").write_text(path.with_suffix(".cfg").read_text())
    into = ["convert", "--from", str(path), "--network", "foreign_nets:net", "--to", "out.weights", "--like", str(path)]
    assert main(into) == 2
    assert "frozen" in capsys.readouterr().err
    assert main([*into, "--frozen"]) == 0
    assert Path("out.weights").read_bytes() == path.read_bytes()
    given = ["--from-framework", "tinygrad", "--decay", "0.7", "--eps", "0.1", "--framework", "mlx"]
    assert main(["convert", "--from", "n.safetensors", "--network", "foreign_nets:net", "--to", "m.npz", *given]) == 0
    for options in (["--to", "n.safetensors"], ["--network", "foreign_nets:net"]):
        assert main(["convert", "--from", "n.pdparams", *options]) == 2


def test_the_page_is_the_table_that_the_code_uses():
    import importlib.util

    script = DATA.parent.parent.parent / "docs" / "scripts" / "frameworks.py"
    spec = importlib.util.spec_from_file_location("frameworks", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.render()


def test_a_shard_in_another_folder_is_refused(tmp_path: Path):
    index = unpacked("keras3.weights.sharded", tmp_path)
    index.write_text(index.read_text().replace("model_00001", "../model_00001"))
    with pytest.raises(DataError, match="lies in another folder"):
        bn.load_keras(network(4), index)
