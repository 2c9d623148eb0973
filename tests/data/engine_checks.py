"""What tests/data/test_engines.py runs in a process of its own, with one session of an engine: ENGINE CHECK..."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.data import ColumnMoments, moments
from batchnorm.errors import BatchNormError, DataError, SynchronizationError

ROWS = 103


def rows(seed=0, features=3):
    generator = np.random.default_rng(seed)
    return generator.normal([1.7, -200.0, 3e4][:features], [1.0, 7.0, 0.5][:features], (ROWS, features))


def frame(x):
    return pandas.DataFrame(x, columns=list("abc")[: x.shape[1]])


class Ray:
    def __init__(self):
        import ray

        self.ray = ray
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False

    def close(self):
        self.ray.shutdown()

    def table(self, x, cuts):
        return self.ray.data.from_pandas([frame(part) for part in np.split(x, cuts)])

    def array(self, x, cuts):
        return self.ray.data.from_numpy([part for part in np.split(x, cuts) if len(part)])


class Spark:
    def __init__(self):
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.master("local[2, 3]").appName("batchnorm")  # three attempts of a task
        options = {"ui.enabled": "false", "sql.shuffle.partitions": "4", "driver.memory": "600m", "log.level": "OFF"}
        options |= {"sql.execution.arrow.maxRecordsPerBatch": "16", "driver.host": "127.0.0.1"}
        for name, value in options.items():
            builder = builder.config(f"spark.{name}", value)
        self.session = builder.getOrCreate()
        self.session.sparkContext.setLogLevel("OFF")

    def close(self):
        self.session.stop()

    def table(self, x, cuts):
        parts = [[tuple(map(float, row)) for row in part] for part in np.split(x, cuts)]
        schema = ", ".join(f"{name} double" for name in list("abc")[: x.shape[1]])
        data = self.session.sparkContext.parallelize(range(len(parts)), len(parts)).flatMap(lambda k: parts[k])
        return self.session.createDataFrame(data, schema)

    def array(self, x, cuts):
        parts = [[(row.tolist(),) for row in part] for part in np.split(x, cuts)]
        data = self.session.sparkContext.parallelize(range(len(parts)), len(parts)).flatMap(lambda k: parts[k])
        return self.session.createDataFrame(data, "x array<double>")


class Dask:
    def close(self):
        pass

    def table(self, x, cuts):
        import dask
        import dask.dataframe

        parts = [dask.delayed(frame)(part) for part in np.split(x, cuts)]
        return dask.dataframe.from_delayed(parts, meta=frame(x[:0]))

    def array(self, x, cuts):
        import dask.array

        sizes = tuple(len(part) for part in np.split(x, cuts) if len(part))
        return dask.array.from_array(x, chunks=(sizes, 2))


def same(found, x):
    expected = bn.Moments.of(torch.from_numpy(x))
    torch.testing.assert_close(found.count.expand(3), expected.count.expand(3), rtol=0, atol=0)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.m2, expected.m2, rtol=1e-12, atol=0)


def close_networks(mine, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(
            mine.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


def network():
    torch.manual_seed(0)
    inner = [nn.Linear(3, 5), bn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()]
    return nn.Sequential(bn.BatchNorm1d(3), *inner).double()


SPLITS = ([], [0, 0, 40, 103], [10, 20, 30, 64, 65, 66, 90])


def check_moments(engine):
    """Whatever the split, partitions without rows included."""
    x = rows()
    for cuts in SPLITS:
        found = moments(engine.table(x, cuts))
        assert found.columns == ("a", "b", "c")
        assert found.rows == ROWS
        same(found.moments, x)
    same(moments(engine.array(x, [30, 60])).moments, x)
    assert moments(engine.table(x, [30]), columns=["c"]).moments.mean.item() == pytest.approx(x[:, 2].mean())


def check_standardize(engine):
    x = rows()
    expected = bn.Standardize(3).fit(torch.from_numpy(x))
    layer = bn.Standardize(3).fit(engine.table(x, [7, 80]), columns=["a", "b", "c"])
    torch.testing.assert_close(layer.var, expected.var, rtol=1e-12, atol=0)


def check_many_partitions(engine):
    """So many that results merge on the workers first."""
    x = rows()
    same(moments(engine.table(x, list(range(1, 80)))).moments, x)


def check_refusals(engine):
    x = rows()
    with pytest.raises(DataError, match="no column 'z'"):
        moments(engine.table(x, [50]), columns=["a", "z"])
    x[60:62, 1] = np.nan
    with pytest.raises(DataError, match=r"column 'b': 2, the first in"):
        moments(engine.table(x, [50]))
    assert moments(engine.table(x, [50]), nonfinite="skip").nonfinite.tolist() == [0, 2, 0]
    with pytest.raises(DataError, match="no rows"):
        moments(engine.table(x[:0], []))
    with pytest.raises(DataError, match=r"partition \d.*'b' has"):
        bn.calibrate(network(), engine.table(x, [50]), batch_size=8)
    with pytest.raises(BatchNormError, match="batch_size"):
        bn.calibrate(network(), engine.table(x, [50]))
    with pytest.raises(BatchNormError, match="samples"):
        bn.calibrate(network(), engine.table(x, [50]), batch_size=8, samples=9)


def check_strings(engine):
    table = engine.table(rows(), [50])
    if isinstance(engine, Ray):
        table = table.map_batches(lambda t: t.append_column("s", pa.array(["x"] * len(t))), batch_format="pyarrow")
    elif isinstance(engine, Spark):
        table = table.selectExpr("*", "'x' as s")
    else:
        table = table.assign(s="x")
    with pytest.raises(DataError, match=r"column 's' is of type"):
        moments(table)
    same(moments(table, columns=["a", "b", "c"]).moments, rows())


def check_calibrate(engine):
    """Pooled, ioffe and sequential statistics are those of one process with the same batches."""
    x = rows() - [0, -195, 29997]
    batches = list(torch.from_numpy(x).split(16))
    for method in ("pooled", "ioffe", "sequential"):
        expected = bn.calibrate(network(), batches, method=method)
        for cuts in SPLITS[1:] if method == "pooled" else SPLITS[2:]:
            close_networks(bn.calibrate(network(), engine.table(x, cuts), method=method, batch_size=16), expected)
    close_networks(bn.calibrate(network(), engine.array(x, [40, 77]), batch_size=16), bn.calibrate(network(), batches))
    given = network()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pytest.raises((BatchNormError, RuntimeError)):
        bn.calibrate(given, engine.table(rows(features=2), [50]), batch_size=16, columns=["a", "b"])
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def check_retries(engine):
    """A worker that dies in the middle of a partition is replaced, and its partition counts once."""
    x = rows() - [0, -195, 29997]
    expected = bn.calibrate(network(), list(torch.from_numpy(x).split(16)))
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "died"
        parent = os.getpid()

        def forward(net, batch):
            out = net(batch)
            if not mark.exists() and os.getpid() != parent:
                mark.touch()
                os._exit(1)
            return out

        found = bn.calibrate(network(), engine.table(x, [50]), batch_size=16, forward=forward)
        assert mark.exists()
        close_networks(found, expected)


def check_limit(engine):
    """A stuck worker ends in an error, within the limit."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:  # the worker is stuck while the folder is there

        def forward(net, batch):
            while Path(folder).exists():
                time.sleep(0.1)

        with pytest.raises(SynchronizationError, match="timeout=2"):
            bn.calibrate(network(), engine.table(rows(), [50]), batch_size=16, forward=forward, timeout=2)
    assert time.monotonic() - began < 20


def check_aggregation(engine):
    """`MomentsOf` composes with Ray's own verbs."""
    from batchnorm.data import MomentsOf

    x = frame(rows()).assign(site=["u", "v"] * 51 + ["u"])
    data = engine.ray.data.from_pandas([x[:50], x[50:]])
    found = data.groupby("site", num_partitions=1).aggregate(MomentsOf(["a", "c"])).take_all()
    assert len(found) == 2
    for row in found:
        assert "error" not in json.loads(row["moments"]), row
        one = ColumnMoments.from_dict(json.loads(row["moments"]))
        values = x[x.site == row["site"]][["a", "c"]].to_numpy()
        assert one.moments.mean.tolist() == pytest.approx(values.mean(0), rel=1e-12)
        assert one.moments.variance(unbiased=False).tolist() == pytest.approx(values.var(0), rel=1e-9)


def check_blocks_that_differ(engine):
    """Blocks of another type or with another column are named."""
    ray, first = engine.ray, frame(rows())
    other = first.astype({"b": np.float32})
    with pytest.raises(DataError, match="'b'"):
        moments(ray.data.from_blocks([pa.Table.from_pandas(first), pa.Table.from_pandas(other)]))
    with pytest.raises(DataError, match="'b'"):
        moments(ray.data.from_blocks([pa.Table.from_pandas(first), pa.Table.from_pandas(first.drop(columns="b"))]))


def check_page(engine):
    """The blocks of docs/machines.md for this engine."""
    page = (Path(__file__).parents[2] / "docs" / "machines.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")}
    title = type(engine).__name__
    space = {"spark": getattr(engine, "session", None)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for section in ("Files larger than memory", title, "Any other engine"):
            for block in re.findall(r"^```python\n(.*?)^```$", sections[section], re.MULTILINE | re.DOTALL):
                exec(compile(block, section, "exec"), space)
        os.chdir("/")
    x = space["x"]
    assert space["layer"].mean.tolist() == pytest.approx(x.mean(0).tolist(), rel=1e-12)
    assert space["net"][1].num_batches_tracked == 40


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = {"ray": Ray, "spark": Spark, "dask": Dask}[sys.argv[1]]()
    try:
        for name in sys.argv[2:]:
            began = time.monotonic()
            globals()[f"check_{name}"](engine)
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    finally:
        engine.close()
    # A thread of Arrow's that still runs when the interpreter ends sometimes aborts the process. All is done by then
    # (apache/arrow#34314, pyarrow 26.0.1).
    os._exit(0)
