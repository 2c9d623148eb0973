"""torch.export archives: every verb works on them as on the network that was exported."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, mobilenet, randomize
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError, InputError, SurgeryError
from batchnorm.surgery.archives import open_archive
from batchnorm.surgery.files import convert_archive, fold_archive, save_archive

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IMAGES = torch.randn(2, 3, 16, 16)


def exported(net, args, path, **options):
    torch.export.save(torch.export.export(net, args, **options), path)
    return path


def operators(program):
    return {str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"}


def test_folding_keeps_names_and_open_shapes(tmp_path):
    net = randomize(mobilenet()).eval()
    path = exported(net, (IMAGES,), tmp_path / "net.pt2", dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    before = path.read_bytes()
    program, certificate = fold_archive(path)
    assert not certificate.kept
    assert "batch_norm" not in operators(program)
    assert any(d.dtype == "float64 unrounded" and d.relative < 1e-12 for d in certificate.differences)
    assert path.read_bytes() == before
    save_archive(program, tmp_path / "folded.pt2")
    again, other = torch.export.load(tmp_path / "folded.pt2"), torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(again.module()(other), net(other), rtol=1e-4, atol=1e-4)
    assert [(int(r.lower), int(r.upper)) for r in again.range_constraints.values()] == [(2, 64)]
    names = {name for name, _ in net.named_parameters() if "bn" not in name}
    assert {name for name in again.state_dict if name.endswith("weight")} <= names


def test_layers_whose_gamma_and_beta_do_not_train_fold_too(tmp_path):
    """Their exported programs detach both; so does the unfolded archive of a run."""
    net = bn.convert(randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))).eval()
    bn.freeze(net)
    path = exported(net, (IMAGES,), tmp_path / "net.pt2")
    assert "detach" in operators(torch.export.load(path))
    assert [layer.name for layer in bn.summary(open_archive(path).net, IMAGES).layers] == ["1"]
    program, certificate = fold_archive(path)
    assert [(i.layer, i.into) for i in certificate.folded] == [("1", "0")]
    assert "batch_norm" not in operators(program)
    torch.testing.assert_close(program.module()(IMAGES), net(IMAGES), rtol=1e-5, atol=1e-5)


def test_what_an_archive_keeps(tmp_path):
    layers = {"conv": nn.ConvTranspose2d(4, 6, 3, groups=2), "a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)}
    net = randomize(Calls(lambda self, x: self.b(F.relu(self.a(self.conv(x)))), **layers)).eval()
    x = torch.randn(2, 4, 5, 5)
    program, certificate = fold_archive(exported(net, (x,), tmp_path / "net.pt2"))
    assert [(i.layer, i.into) for i in certificate.folded] == [("a", "conv")]
    assert "relu" in certificate.kept[0].reason
    assert not [n for n in program.graph.nodes if "batchnorm" in str(n.target)]  # runs without this package
    torch.testing.assert_close(program.module()(x), net(x))


def test_inputs_and_outputs_by_name(tmp_path):
    net = randomize(
        Calls(
            lambda self, x, *, factor: {"a": self.norm(self.fc(x)) * factor, "b": (x,)},
            fc=nn.Linear(3, 4),
            norm=nn.BatchNorm1d(4, affine=False),
        )
    ).eval()
    x, factor = torch.randn(5, 3), torch.tensor(2.0)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,), {"factor": factor}), path)
    program, certificate = fold_archive(path)
    assert len(certificate.folded) == 1
    torch.testing.assert_close(program.module()(x, factor=factor)["a"], net(x, factor=factor)["a"])


def shared(self, x):
    return self.norm(self.conv(x)) + self.conv(2 * x)


def statistics_read(self, x):
    return self.norm(self.conv(x)) + self.norm.running_mean.sum()


def tied(self, x):
    return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(shared, "used 2 times"), (tied, "also goes to|also read"), (statistics_read, "also read")],
)
def test_traps(forward, reason, tmp_path):
    net = randomize(Calls(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))).eval()
    path = exported(net, (IMAGES,), tmp_path / "net.pt2")
    program, certificate = fold_archive(path)
    assert not certificate.folded
    assert re.search(reason, certificate.kept[0].reason), certificate
    torch.testing.assert_close(program.module()(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-4)


def test_summary_and_conversion(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))
    path = exported(randomize(net).eval(), (IMAGES,), tmp_path / "net.pt2")
    archive = open_archive(path)
    assert type(archive.net.get_submodule("1")) is nn.BatchNorm2d
    found, expected = bn.summary(archive.net, archive.example), bn.summary(net, IMAGES)
    assert [row["name"] for row in found.to_dict()["layers"]] == [row["name"] for row in expected.to_dict()["layers"]]
    program = convert_archive(path)
    torch.testing.assert_close(program.module()(IMAGES), net(IMAGES))
    weighed = convert_archive(path, example_weight=0.25)
    bn.convert(net, example_weight=0.25)
    torch.testing.assert_close(weighed.module()(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-4)


def test_files_that_are_none_or_not_for_inference(tmp_path, capfd):
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(InputError, match="bad"):
        fold_archive(tmp_path / "bad.pt2")
    assert "Traceback" not in capfd.readouterr().err
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="exported in training mode"):
        fold_archive(exported(net.train(), (torch.randn(5, 3),), tmp_path / "train.pt2"))
    with pytest.raises(SurgeryError, match="no batch normalization"):
        fold_archive(exported(nn.Linear(3, 4), (torch.randn(5, 3),), tmp_path / "none.pt2"))
    program = torch.export.export(net.eval(), (torch.randn(5, 3),))
    with pytest.raises(BatchNormError, match="cannot be written"):
        save_archive(program, tmp_path / "nowhere" / "out.pt2")
