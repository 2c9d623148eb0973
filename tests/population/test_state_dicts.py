"""Checkpoints as users have them: a right result, or an error that says what to do."""

from __future__ import annotations

import copy
import io
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.errors import DataError, InputError
from batchnorm.population.state_dicts import load_state, read_state


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    net(torch.randn(8, 3))
    return net.eval()


def written(tmp_path, state, **options):
    path = tmp_path / "net.pt"
    torch.save(state, path, **options)
    return path


def equal(one, two):
    return all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "plain": lambda net: net.state_dict(),
    "state_dict": lambda net: {"state_dict": net.state_dict(), "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}},
    "model": lambda net: {"model": net.state_dict(), "args": {"lr": 0.1}},
    "model.state_dict": lambda net: {"model": {"state_dict": net.state_dict()}, "best": 0.5},
    "twice": lambda net: {"model": net.state_dict(), "state_dict": net.state_dict()},
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled, DataParallel": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "compiled part": lambda net: nn.Sequential(net[0], net[1], torch.compile(net[2])).state_dict(),
    "lightning": lambda net: {"state_dict": prefixed(net.state_dict(), "model."), "global_step": 1},
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "arrays": lambda net: {key: value.numpy() for key, value in net.state_dict().items()},
    "double": lambda net: copy.deepcopy(net).double().state_dict(),
    "before num_batches_tracked": lambda net: {k: v for k, v in net.state_dict().items() if "num_" not in k},
}


def test_an_archive_of_numpy_is_a_state_dict(tmp_path):
    net, other = network(), network(1)
    np.savez(tmp_path / "net.npz", **{key: value.numpy() for key, value in net.state_dict().items()})
    load_state(other, tmp_path / "net.npz")
    assert equal(net, other)
    np.savez(tmp_path / "bad.npz", x=np.asarray([{}], dtype=object))
    with pytest.raises(DataError, match=r"bad.npz holds Python objects alone \(x\), which are pickles, not read"):
        load_state(other, tmp_path / "bad.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "net.npz").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cut.npz"):
        load_state(other, tmp_path / "cut.npz")
    assert equal(net, other)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_checkpoints(form, tmp_path):
    source, target = network(), network(1)
    state = FORMS[form](source)
    if form == "arrays":
        from batchnorm.population.state_dicts import matching_state

        target.load_state_dict(matching_state(target, state, "state"))
    else:
        load_state(target, written(tmp_path, state))
    if form == "before num_batches_tracked":
        target[1].num_batches_tracked.copy_(source[1].num_batches_tracked)
    assert equal(source, target)


def test_a_wrapped_network_takes_a_plain_state(tmp_path):
    source, target = network(), nn.DataParallel(network(1))
    load_state(target, written(tmp_path, source.state_dict()))
    assert equal(source, target.module)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, torch.compile])
def test_modes_come_back_from_under_a_wrapper(wrap, tmp_path):
    source, target = network(), network(1)
    bn.freeze(source)
    load_state(target, written(tmp_path, wrap(source).state_dict()))
    assert repr(target) == repr(source)
    assert "update='never'" in repr(target) or "update=never" in repr(target), repr(target)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_files_of_torch_and_safetensors(options, tmp_path):
    source, target = network(), network(1)
    load_state(target, written(tmp_path, source.state_dict(), **options))
    assert equal(source, target)
    save_file(prefixed(source.state_dict(), "module."), tmp_path / "net.safetensors")
    load_state(target := network(2), tmp_path / "net.safetensors")
    assert equal(source, target)


def with_first(net, change):
    state = net.state_dict()
    state["0.weight"] = change(state["0.weight"])
    return state


def quantized(x):
    warnings.simplefilter("ignore")  # torch's, on quantized tensors; pytest puts the filters back
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


REFUSED = {
    "int8": (lambda n: with_first(n, lambda x: (10 * x).to(torch.int8)), r"0\.weight is torch\.int8.*scales"),
    "bool": (lambda n: with_first(n, lambda x: x > 0), r"0\.weight is torch\.bool.*mask"),
    "float8": (
        lambda n: with_first(n, lambda x: x.to(torch.float8_e4m3fn)),
        r"0\.weight is torch\.float8.*times its scale",
    ),
    "complex": (lambda n: with_first(n, lambda x: x.to(torch.complex64)), r"0\.weight is torch\.complex64.*imaginary"),
    "quantized": (lambda n: with_first(n, quantized), r"0\.weight is quantized.*dequantize"),
    "emptied": (lambda n: with_first(n, lambda x: x[:0, 0]), r"0\.weight is empty.*whole state dict"),
    "meta": (lambda n: with_first(n, lambda x: x.to("meta")), r"0\.weight is empty.*whole state dict"),
    "two": (lambda n: {"model": n.state_dict(), "ema": network(5).state_dict()}, "'model', 'ema' all fit"),
    "other names": (lambda n: {"a.weight": torch.ones(2)}, r"lacks 0\.bias, 0\.weight.* and others and has a\.weight"),
    "nested other names": (lambda n: {"model": {"a": torch.ones(2)}}, r"its state dict 'model' lacks 0\.bias"),
    "other sizes": (lambda n: with_first(n, lambda x: x.t()), r"size mismatch for 0\.weight"),
    "no tensors": (lambda n: {"epoch": 3}, "no state dict"),
    "list": (lambda n: [torch.ones(2)], "holds a list"),
    "object": (lambda n: {"model": n}, "pickled code is never run"),
    "fraction": (lambda n: {**n.state_dict(), "1.num_batches_tracked": torch.tensor(0.5)}, "no integers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_explained(case, tmp_path):
    make, message = REFUSED[case]
    net = network()
    path, before = written(tmp_path, make(net)), copy.deepcopy(network(1).state_dict())
    target = network(1)
    with pytest.raises(DataError, match=re.compile(message, re.DOTALL)):
        load_state(target, path)
    if case != "other sizes":
        assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_networks_of_those_dtypes_load(tmp_path):
    warnings.simplefilter("ignore")  # torch's, on complex modules
    for dtype in (torch.complex64, torch.bfloat16, torch.float8_e5m2):
        source, target = nn.Linear(3, 2).to(dtype), nn.Linear(3, 2).to(dtype)
        load_state(target, written(tmp_path, source.state_dict()))
        assert torch.equal(source.weight.view(torch.uint8), target.weight.view(torch.uint8))


@pytest.mark.parametrize("data", [b"", b"\0" * 8])
def test_emptied_records_are_named(data, tmp_path):
    path = written(tmp_path, network().state_dict())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, data if name.endswith("data/0") else value)
    with pytest.raises(DataError, match=r"data/0' has \d bytes where 12 elements.*whole state dict"):
        load_state(network(), path)


def test_metadata_of_other_objects_is_no_state(tmp_path):
    path = written(tmp_path, {"a": torch.ones(2), "path": tmp_path})
    with pytest.raises(DataError, match="pickled code is never run"):
        read_state(path)
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    path.write_bytes(buffer.getvalue())
    assert "1" in read_state(path)._metadata


def test_statistics_of_states_as_they_are():
    net, one, two = network(), network(1), network(2)
    expected = bn.average_statistics(copy.deepcopy(net), [one, two], weights=[1, 2]).state_dict()
    for form in ("plain", "DataParallel", "compiled", "arrays"):
        made = bn.average_statistics(copy.deepcopy(net), [FORMS[form](one), FORMS[form](two)], weights=[1, 2])
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in expected.items()), form
    buffers = {key: value.numpy() for key, value in one.named_buffers()}
    bn.average_statistics(net, [buffers, buffers], weights=[1, 2])
    for wrong, message in ((np.ones(4) * 1j, "complex128"), (["a"] * 4, "list")):
        with pytest.raises(InputError, match=rf"1\.running_var as .*{message}"):
            bn.average_statistics(net, [{**buffers, "1.running_var": wrong}], weights=[1])
