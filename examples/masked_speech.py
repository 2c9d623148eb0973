"""Speech of unequal lengths: padding out of the statistics by `lengths=`.

    python examples/masked_speech.py

Vowels of nine Japanese speakers, 12 cepstral coefficients a frame, 7 to 29 frames; they come with aeon. Padding with
zeros moves mean and variance, by more for short recordings. With lengths given, how much padding there is changes
nothing: the same recordings padded to 29 or to 100 frames give the same output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.training.datasets import load_data


def recordings() -> tuple[Tensor, Tensor]:
    """(N, 12, 29) padded with zeros, and the lengths."""
    data = load_data("japanese-vowels")
    x = data.x_train.movedim(-1, 1) if data.x_train.shape[-1] == 12 else data.x_train
    frames = (x != 0).any(1)
    return x, (frames * torch.arange(1, x.shape[2] + 1)).amax(1)


def main() -> dict[str, float]:
    x, lengths = recordings()
    more = nn.functional.pad(x, (0, 71))
    plain, masked = (bn.BatchNorm1d(12, affine=False) for _ in range(2))
    valid = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
    moved = ((plain(x) - plain(more)[..., : x.shape[2]]) * valid).abs().max()
    kept = (masked(x, lengths=lengths) - masked(more, lengths=lengths)[..., : x.shape[2]]).abs().max()
    truth = torch.cat([row[:, :n] for row, n in zip(x, lengths, strict=True)], 1)
    masked = bn.BatchNorm1d(12, affine=False, momentum=None)
    plain = bn.BatchNorm1d(12, affine=False, momentum=None)
    plain(more)
    masked(more, lengths=lengths)
    found = {
        "padding": 1 - float(lengths.sum()) / more[:, 0].numel(),
        "plain moves by": float(moved),
        "masked moves by": float(kept),
        "variance kept, plain / true": float((plain.running_var / truth.var(1)).mean()),
        "variance kept, masked / true": float((masked.running_var / truth.var(1)).mean()),
    }
    for name, value in found.items():
        print(f"{name:30} {value:.4g}")
    return found


if __name__ == "__main__":
    main()
