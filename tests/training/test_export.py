"""Every exported file is proven before it gets its name."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from batchnorm.errors import InputError
from batchnorm.training import export
from batchnorm.training.export import export_network, save_weights


def pair(batch_fixed=False):
    torch.manual_seed(1)
    unfolded = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    unfolded[1].running_mean.normal_()
    unfolded[1].running_var.uniform_(0.5, 2)
    unfolded.eval()
    fused = nn.utils.fuse_linear_bn_eval(unfolded[0], unfolded[1])
    parts = [fused, nn.ReLU(), copy.deepcopy(unfolded[3])]
    if batch_fixed:
        parts.append(FixedBatch())
    return nn.Sequential(*parts), unfolded, torch.randn(9, 4)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(9, 3)


def test_every_form_is_written_loaded_and_compared(tmp_path):
    folded, unfolded, example = pair()
    found = {item.file: item for item in export_network(folded, unfolded, example, tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == set(found) == set(export.EXPORTED_FILES)
    for name, item in found.items():
        assert item.status == "verified", item
        assert item.relative_difference <= 1e-5
        assert item.size == (tmp_path / name).stat().st_size
    with torch.no_grad():
        other = torch.randn(17, 4)
        archive = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(archive(other), unfolded(other))
    assert load_file(tmp_path / "model.safetensors").keys() == folded.state_dict().keys()
    assert load_file(tmp_path / "batchnorm.safetensors").keys() == unfolded.state_dict().keys()


def test_a_wrong_network_is_found_and_not_kept(tmp_path):
    folded, unfolded, example = pair()
    with torch.no_grad():
        folded[2].bias[2] += 1e-3
    found = {item.file: item for item in export_network(folded, unfolded, example, tmp_path)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batchnorm.pt2", "batchnorm.safetensors"]
    for name in ("model.safetensors", "model.pt2", "model.onnx"):
        assert found[name].status == "failed"
        assert found[name].relative_difference > 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_never_passes(tmp_path, bad):
    folded, unfolded, example = pair()
    with torch.no_grad():
        folded[2].bias[0] = bad
    found = export_network(folded, unfolded, example, tmp_path)
    assert {item.file for item in found if item.status == "failed"} == {
        "model.safetensors",
        "model.pt2",
        "model.onnx",
    }


def test_a_tensor_that_the_file_lacks_is_found(tmp_path, monkeypatch):
    folded, unfolded, example = pair()
    monkeypatch.setattr(export, "load_file", lambda path: {k: v for k, v in load_file(path).items() if "0" not in k})
    found = {item.file: item for item in export_network(folded, unfolded, example, tmp_path)}
    assert found["model.safetensors"].status == "failed"
    assert "RuntimeError" in found["model.safetensors"].note
    assert not (tmp_path / "model.safetensors").exists()


def without(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name in packages else real(name))


def test_without_onnx_it_is_said_and_the_rest_is_written(tmp_path, monkeypatch):
    without(monkeypatch, "onnxscript")
    found = {item.file: item for item in export_network(*pair(), tmp_path)}
    assert found["model.onnx"].status == "not written"
    assert "batchnorm[export]" in found["model.onnx"].note
    assert not (tmp_path / "model.onnx").exists()
    assert found["model.pt2"].status == "verified"


def test_without_onnxruntime_the_file_is_marked_unchecked(tmp_path, monkeypatch):
    without(monkeypatch, "onnxruntime")
    found = {item.file: item for item in export_network(*pair(), tmp_path)}
    assert found["model.onnx"].status == "not checked"
    assert found["model.onnx"].max_difference is None
    assert (tmp_path / "model.onnx").exists()


def test_a_network_for_one_batch_size_says_so(tmp_path, monkeypatch):
    without(monkeypatch, "onnx")
    found = {item.file: item for item in export_network(*pair(batch_fixed=True), tmp_path)}
    assert found["model.pt2"].status == "verified", found["model.pt2"]
    assert "batches of 9 only" in found["model.pt2"].note


def test_weights_that_cannot_be_written_are_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        save_weights(nn.Linear(2, 2), tmp_path / "missing" / "a.safetensors")
