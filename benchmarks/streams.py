"""Data larger than memory: moments of a Parquet set beside other streaming scalers, and training on a memory map.

Each contestant runs in a process of its own, on one thread. `seconds` are those of its processor without imports, so
other work on the machine counts little; `peak_mb` is the largest resident memory of the process, imports included, by
the system's `VmHWM`: `ru_maxrss` of a process begins with that of the one that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .machine import ROOT
from .rows import Row

COLUMNS, ROWS = 16, 2_000_000  # of a file: 256 MB in float64
LIMIT = 1_000_000_000  # bytes that a training may write to (ulimit -d)

_PEAK = """
def peak_of(pid="self"):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
"""
_BEFORE = f"""
import glob, json, os, sys, time
{_PEAK}
files = sorted(glob.glob(os.path.join(sys.argv[1], "*.parquet")))
def told(mean, std, seconds=None, peak=None):
    used = time.process_time() - begun if seconds is None else seconds
    peak = peak_of() if peak is None else peak
    print(json.dumps(dict(seconds=used, peak=peak, mean=list(map(float, mean)), std=list(map(float, std)))))
"""
CONTESTANTS = {
    "ours": """
import batchnorm as bn, batchnorm.data.measuring, pyarrow.parquet
begun = time.process_time()
found = bn.data.moments(files).moments
told(found.mean, found.variance(unbiased=False).sqrt())
""",
    "sklearn partial_fit": """
import numpy as np, pyarrow.parquet as pq
from sklearn.preprocessing import StandardScaler
begun = time.process_time()
scaler = StandardScaler()
for name in files:
    with pq.ParquetFile(name, pre_buffer=False) as file:
        for block in file.iter_batches(batch_size=65536, use_threads=False):
            scaler.partial_fit(np.column_stack([column.to_numpy() for column in block.columns]))
told(scaler.mean_, scaler.scale_)
""",
    "polars": """
os.environ["POLARS_MAX_THREADS"] = "1"
import polars as pl
begun = time.process_time()
data = pl.scan_parquet(files)
names = data.collect_schema().names()
every = [pl.col(n).mean().alias(f"m{n}") for n in names] + [pl.col(n).std(ddof=0).alias(f"s{n}") for n in names]
found = data.select(every).collect(engine="streaming").row(0)
told(found[: len(names)], found[len(names) :])
""",
    "spark": """
import subprocess
from pyspark.sql import SparkSession
from pyspark.ml.feature import StandardScaler, VectorAssembler
builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
builder = builder.config("spark.driver.memory", "2g").config("spark.driver.host", "127.0.0.1")
session = builder.getOrCreate()
session.sparkContext.setLogLevel("OFF")
def java():
    pid = subprocess.run(["pgrep", "-P", str(os.getpid()), "java"], capture_output=True, text=True).stdout.split()[0]
    fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), peak_of(pid)
begun, of_java = time.process_time(), java()[0]
data = session.read.parquet(*files)
data = VectorAssembler(inputCols=data.columns, outputCol="x").transform(data)
model = StandardScaler(inputCol="x", outputCol="y", withMean=True).fit(data)
seconds, peak = java()
told(model.mean, model.std, time.process_time() - begun + seconds - of_java, peak)
""",
}
_TRAIN = f"""
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from batchnorm.cli import main
sys.path.insert(0, ".")
begun = time.process_time()
code = main(["train", "--network", "wide:net", "--data", "x.npy", "--labels", "y.npy", "--steps", "50",
             "--threads", "1", "--out", "run"])
{_PEAK}
print("\\n" + json.dumps(dict(code=code, seconds=time.process_time() - begun, peak=peak_of())))
"""
_NETWORK = """
from torch import nn
def net(num_features, num_classes):
    return nn.Sequential(nn.Linear(num_features, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""


def measure(files: int) -> Iterator[Row]:
    """Mean and standard deviation of every column of `files` files."""
    columns = {
        "suite": "streams",
        "what": "moments",
        "files": files,
        "shape": [files * ROWS, COLUMNS],
        "dtype": "float64",
    }
    with tempfile.TemporaryDirectory() as folder:
        size = _write_parquet(Path(folder), files)
        found: dict[str, Row] = {}
        for name, code in CONTESTANTS.items():
            said = _run(_BEFORE + code, folder)
            found[name] = said if isinstance(said, dict) else {"absent": said}
    ours = found["ours"]
    for name, said in found.items():
        row = {**columns, "bytes": size, "contestant": name}
        if "absent" in said:
            yield {**row, **said}
            continue
        off = _distance(said, ours)
        if off > 1e-6:
            yield {**row, "absent": f"off by {off:.3g}, no figure"}
            continue
        row |= {"seconds": said["seconds"], "peak_mb": said["peak"] / 1e6, "error": off}
        if name == "ours" and "seconds" in found["sklearn partial_fit"]:
            row["x_sklearn"] = found["sklearn partial_fit"]["seconds"] / said["seconds"]
        yield row


def train(gigabytes: float) -> Iterator[Row]:
    """`batchnorm train` on a .npy file of so many GB, in a process that may write to 1 GB."""
    rows = int(gigabytes * 1e9) // 4000
    row: Row = {"suite": "streams", "what": "train", "shape": [rows, 1000], "dtype": "float32", "contestant": "ours"}
    with tempfile.TemporaryDirectory() as folder:
        x = np.lib.format.open_memmap(f"{folder}/x.npy", mode="w+", dtype=np.float32, shape=(rows, 1000))
        rng = np.random.default_rng(0)
        block = rng.normal(size=(10_000, 1000)).astype(np.float32)
        for start in range(0, rows, len(block)):
            x[start : start + len(block)] = block[: rows - start]
        np.save(f"{folder}/y.npy", (x[:, 0] > 0).astype(int))
        del x
        Path(folder, "wide.py").write_text(_NETWORK)
        said = _run(_TRAIN, str(LIMIT), cwd=folder)
    if isinstance(said, str) or said["code"]:
        yield {**row, "absent": f"no run: {said}"}
        return
    yield {
        **row,
        "bytes": rows * 4000,
        "limit_mb": LIMIT / 1e6,
        "seconds": said["seconds"],
        "peak_mb": said["peak"] / 1e6,
    }


def _write_parquet(folder: Path, files: int) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(files):
        rng = np.random.default_rng(number)
        table = pa.table({f"c{k}": rng.normal(10 * k, 1 + k, ROWS) for k in range(COLUMNS)})
        pq.write_table(table, folder / f"part-{number}.parquet")
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))


def _run(code: str, *arguments: str, cwd: str | None = None) -> Row | str:
    """What the process says in its last line, or why it says nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _distance(a: Row, b: Row) -> float:
    """The largest difference of means and standard deviations, in standard deviations."""
    std = np.array(b["std"])
    return float(max(np.abs((np.array(a[key]) - np.array(b[key])) / std).max() for key in ("mean", "std")))
