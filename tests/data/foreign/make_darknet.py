"""Weights of Darknet at 61c9d02, as Debian 12 has it: apt-get install darknet=0.0.0+git20180914.61c9d02e-2+b4.

It needs gcc and NumPy. Seen on 2026-11-28.
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from case import CHANNELS, HERE, batches, expect, first, pack

LIBRARY = Path("/usr/lib/darknet")
NETWORK = """[net]
batch={n}
channels=3
height=2
width=2
learning_rate=0.05
momentum=0
decay=0
policy=constant
max_batches=100

[convolutional]
batch_normalize=1
filters=3
size=1
activation=relu

[convolutional]
batch_normalize=1
filters=3
size=1
activation=linear

[cost]
type=sse
"""


def run(name: str) -> None:
    x, target = batches(2)
    n = len(target)
    numbers = np.concatenate([*(first(each).ravel() for each in x), first(target).ravel()])
    (HERE / name).mkdir()
    config, weights = HERE / name / "net.cfg", HERE / name / "net.weights"
    config.write_text(NETWORK.format(n=n))
    with tempfile.TemporaryDirectory() as folder:
        program, given, made = (Path(folder) / each for each in ("program", "given", "made"))
        numbers.tofile(given)
        link = [f"-I{LIBRARY}/include", f"-L{LIBRARY}", "-ldarknet", f"-Wl,-rpath,{LIBRARY}"]
        subprocess.run(["gcc", HERE / "make_darknet.c", "-o", program, *link, "-lm"], check=True)
        subprocess.run([program, config, weights, given, made], check=True)
        got = np.fromfile(made, np.float32)
    before, after, vectors = np.split(got, [target.size, 2 * target.size])
    shape = first(target).shape
    before, after = (np.moveaxis(each.reshape(shape), 1, -1) for each in (before, after))
    layers = [
        dict(zip(("gamma", "beta", "mean", "var"), each, strict=True)) for each in vectors.reshape(2, 4, CHANNELS)
    ]
    expect(name, x, target, before, after, layers)
    pack(name)


run("darknet.folder")
