"""What each framework's batch normalization means: one row each, which reader, writer and documentation use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from batchnorm.errors import InputError


class Names(NamedTuple):
    """The names of the four vectors."""

    gamma: str
    beta: str
    mean: str
    var: str


@dataclass(frozen=True)
class Convention:
    """How a framework keeps and trains batch normalization.

    Args:
        title: the framework, in words.
        seen: version and date of what was looked at.
        names: of gamma, beta, mean and variance.
        momentum: the name of its number, and what it is a share of: the "old" statistics, or the "new" ones.
        decay: the share of the old statistics by default; None where there is no default.
        eps: by default.
        eps_place: the formula of the denominator.
        variance: the kind that is kept: "biased", "unbiased" or "fused" (unbiased over images and volumes).
        running: "ema", or "debiased": divided by 1 - decay^t.
        counter: the name of the number of batches; None where there is none.
        single: what training does with one value a channel.
        files: files that are read.
        evidence: "files" where files that it wrote are tested, else what is followed.
        keeps_settings: whether momentum and epsilon of our layer stay where none are given, since they are torch's.
    """

    title: str
    seen: str
    names: Names
    momentum: tuple[str, str]
    decay: float | None
    eps: float
    variance: str
    single: str
    files: str
    running: str = "ema"
    counter: str | None = None
    eps_place: str = "sqrt(var + eps)"
    evidence: str = "files"
    keeps_settings: bool = False


_KERAS = Names("gamma", "beta", "moving_mean", "moving_variance")
_TORCH = Names("weight", "bias", "running_mean", "running_var")
_FLAX = Names("scale", "bias", "mean", "var")

CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(
        "PyTorch",
        "2.13.0, 2026-11-28",
        _TORCH,
        ("momentum", "new"),
        0.9,
        1e-5,
        "unbiased",
        "an error",
        ".pt, .pth, .safetensors",
        counter="num_batches_tracked",
        keeps_settings=True,
    ),
    "keras3": Convention(
        "Keras 3",
        "3.15.1, 2026-11-28",
        _KERAS,
        ("momentum", "old"),
        0.99,
        1e-3,
        "biased",
        "beta",
        ".keras, .weights.h5, .weights.json, .h5",
    ),
    "keras2": Convention(
        "Keras 2 (tf_keras)",
        "2.21.0 with TensorFlow 2.21.0, 2026-11-28",
        _KERAS,
        ("momentum", "old"),
        0.99,
        1e-3,
        "fused",
        "beta",
        ".keras, .weights.h5, .h5",
    ),
    "flax": Convention(
        "Flax linen",
        "0.12.8, 2026-11-28",
        _FLAX,
        ("momentum", "old"),
        0.99,
        1e-5,
        "biased",
        "beta",
        "flax.serialization, folders of orbax",
    ),
    "nnx": Convention(
        "Flax nnx",
        "0.12.8, 2026-11-28",
        _FLAX,
        ("momentum", "old"),
        0.99,
        1e-5,
        "biased",
        "beta",
        "flax.serialization, folders of orbax",
    ),
    "haiku": Convention(
        "Haiku",
        "0.0.17, 2026-11-28",
        Names("scale", "offset", "average", "average"),
        ("decay_rate", "old"),
        None,
        1e-5,
        "biased",
        "beta",
        "(params, state), .npz, .pkl or msgpack of both",
        running="debiased",
        counter="counter",
    ),
    "equinox": Convention(
        'Equinox, mode="batch"',
        "0.13.8, 2026-11-28",
        Names("weight", "bias", "mean", "var"),
        ("momentum", "old"),
        0.99,
        1e-5,
        "biased",
        "beta",
        "(model, state), tree_serialise_leaves",
        running="debiased",
        counter="batch_counter",
    ),
    "paddle": Convention(
        "PaddlePaddle",
        "3.3.1, 2026-11-28",
        Names("weight", "bias", "_mean", "_variance"),
        ("momentum", "old"),
        0.9,
        1e-5,
        "biased",
        "x unchanged, without gamma and beta",
        ".pdparams (arrays alone)",
    ),
    "mindspore": Convention(
        "MindSpore",
        "2.10.0, 2026-11-28",
        _KERAS,
        ("momentum", "old"),
        0.9,
        1e-5,
        "unbiased",
        "not seen",
        ".ckpt, .safetensors",
    ),
    "mlx": Convention(
        "MLX",
        "0.32.4, 2026-11-28",
        _TORCH,
        ("momentum", "new"),
        0.9,
        1e-5,
        "unbiased",
        "an error",
        ".safetensors, .npz",
        keeps_settings=True,
    ),
    "jittor": Convention(
        "Jittor",
        "1.3.11, 2026-11-28",
        _TORCH,
        ("momentum", "new"),
        0.9,
        1e-5,
        "biased",
        "beta",
        ".pkl (arrays alone)",
        keeps_settings=True,
    ),
    "tinygrad": Convention(
        "tinygrad",
        "0.14.0, 2026-11-28",
        _TORCH,
        ("momentum", "new"),
        0.9,
        1e-5,
        "unbiased",
        "ZeroDivisionError",
        ".safetensors",
        counter="num_batches_tracked",
        keeps_settings=True,
    ),
    "chainer": Convention(
        "Chainer",
        "7.8.1, 2026-11-28",
        Names("gamma", "beta", "avg_mean", "avg_var"),
        ("decay", "old"),
        0.9,
        2e-5,
        "unbiased",
        "beta",
        ".npz, .h5",
    ),
    "pyg": Convention(
        "PyTorch Geometric",
        "2.8.1, 2026-11-28",
        _TORCH,
        ("momentum", "new"),
        0.9,
        1e-5,
        "unbiased",
        "an error",
        ".pt (keys module.*)",
        counter="num_batches_tracked",
        keeps_settings=True,
    ),
    "caffe": Convention(
        "Caffe",
        "1.0 (BVLC), 2026-11-28",
        Names("blob 0 of Scale", "blob 1 of Scale", "blob 0", "blob 1"),
        ("moving_average_fraction", "old"),
        0.999,
        1e-5,
        "unbiased",
        "variance 0, kept",
        ".caffemodel; blob 2 divides both (0 means 0)",
        running="debiased",
        evidence="its message classes, OpenCV 4.14",
    ),
    "darknet": Convention(
        "Darknet",
        "61c9d02, 2026-11-28",
        Names("scales", "biases", "rolling_mean", "rolling_variance"),
        ("0.99, fixed", "old"),
        0.99,
        1e-6,
        "unbiased",
        "division by 0",
        ".weights, with its .cfg beside it",
        eps_place="sqrt(var) + eps",
    ),
}

# Frameworks whose files are not read here; the documentation has them.
ELSEWHERE: tuple[Convention, ...] = (
    Convention(
        "ONNX",
        "opset 15, onnx 1.23.2, 2026-11-28",
        Names("scale", "B", "input_mean", "input_var"),
        ("momentum", "old"),
        0.9,
        1e-5,
        "biased",
        "B",
        "`fold_onnx`, not loaded",
        evidence="source",
    ),
)

_OTHER_NAMES = {
    "pytorch": "torch",
    "keras": "keras3",
    "tfkeras": "keras2",
    "tensorflow": "keras2",
    "linen": "flax",
    "flaxlinen": "flax",
    "flaxnnx": "nnx",
    "dmhaiku": "haiku",
    "paddlepaddle": "paddle",
    "pytorchgeometric": "pyg",
    "torchgeometric": "pyg",
}


def framework_key(name: str) -> str:
    """The key of a framework in `CONVENTIONS`, from what people call it."""
    plain = "".join(c for c in name.lower() if c.isalnum())
    key = _OTHER_NAMES.get(plain, plain)
    if key not in CONVENTIONS:
        raise InputError(f"got framework={name!r}; expected one of {', '.join(sorted(CONVENTIONS))}")
    return key
