"""Moments of data sets in parts: equal to those of the whole, and refused where the parts are not one data set."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.data import ColumnMoments, batches, moments
from batchnorm.data.waiting import within
from batchnorm.errors import BatchNormError, DataError, InputError, SynchronizationError
from batchnorm.moments import Moments

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
feather = pytest.importorskip("pyarrow.feather", reason="pyarrow is not installed")


def draw(rows, features, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(
        generator.normal(size=features) * 100, generator.uniform(0.1, 9, features), (rows, features)
    )


def same(found, x, tolerance=1e-12):
    """The moments are those of the rows of x, relative to the largest M2."""
    expected = Moments.of(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)))
    got = found.moments if isinstance(found, ColumnMoments) else found
    torch.testing.assert_close(got.count.expand_as(got.mean), expected.count.expand_as(expected.mean), rtol=0, atol=0)
    torch.testing.assert_close(got.mean, expected.mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(got.m2, expected.m2, rtol=tolerance, atol=0)


def table(x, names="abcdefgh"):
    return pa.table({names[k]: x[:, k] for k in range(x.shape[1])})


class TestDictionaries:
    @given(st.lists(st.floats(), min_size=1, max_size=4), st.floats(0, allow_infinity=False))
    def test_every_bit_survives_json(self, mean, m2):
        before = Moments(3, torch.tensor(mean, dtype=torch.float64), torch.full((len(mean),), m2, dtype=torch.float64))
        text = json.dumps(before.to_dict(), allow_nan=False)
        after = Moments.from_dict(json.loads(text))
        for name in ("count", "mean", "m2"):
            a, b = getattr(before, name), getattr(after, name)
            assert a.shape == b.shape
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            assert torch.equal(torch.signbit(a), torch.signbit(b)) or a.isnan().any()

    @pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
    def test_shapes_are_kept(self, shape):
        after = Moments.from_dict(Moments.empty(shape).to_dict())
        assert after.mean.shape == torch.Size(shape)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"version": 2}, "version"),
            ({"format": "else"}, "format"),
            ({"mean": None}, "mean"),
            ({"mean": ["one"]}, "mean"),
            ({"mean": [True]}, "mean"),
            ({"mean": [1.0, 2.0]}, "mean"),
            ({"m2": [-1.0]}, "m2"),
            ({"count": [-1.0]}, "count"),
            ({"shape": [2]}, "shape"),
            ({"shape": [1.5]}, "shape"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, named):
        state = {**Moments(2, torch.ones(1), torch.ones(1)).to_dict(), **change}
        with pytest.raises(InputError, match=named):
            Moments.from_dict(state)

    def test_a_missing_entry_is_named(self):
        state = Moments.empty(1).to_dict()
        del state["m2"]
        with pytest.raises(InputError, match="m2"):
            Moments.from_dict(state)

    def test_columns_too(self):
        before = moments(pandas.DataFrame({"a": [1.0, np.nan], "b": [1, 2]}), nonfinite="skip")
        after = ColumnMoments.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
        assert after.to_dict() == before.to_dict()
        with pytest.raises(InputError, match="features"):
            ColumnMoments.from_dict({**before.to_dict(), "columns": ["a"]})


class TestKernels:
    @pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u1", "?"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_every_dtype_and_order(self, dtype, order):
        x = (draw(70_000, 3) * 0.1).astype(dtype, order=order)
        same(moments(x), x)

    @pytest.mark.parametrize(("shape", "axis"), [((500, 3, 5, 7), 1), ((500, 5, 7, 3), -1), ((40, 3, 9000), 1)])
    def test_arrays_with_space(self, shape, axis):
        x = np.random.default_rng(0).normal(5, 2, shape)
        expected = Moments.of(torch.from_numpy(x), axis)
        found = moments(x, feature_axis=axis).moments
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.m2, expected.m2, rtol=1e-12, atol=0)

    def test_a_mean_that_is_large_beside_the_spread_keeps_its_digits(self):
        offsets = np.random.default_rng(0).integers(-4, 5, 300_000).astype(np.float64)
        found = moments(pandas.DataFrame({"time": 1.7e9 + offsets})).moments
        assert found.m2.item() == pytest.approx(((offsets - offsets.mean()) ** 2).sum(), rel=1e-9)

    def test_values_that_are_not_finite_are_left_out_alone(self):
        x = draw(150_000, 3)
        x[7, 0], x[100_000, 2], x[100_001, 2] = np.nan, np.inf, -np.inf
        for data in (x, np.asfortranarray(x), table(x)):
            found = moments(data, nonfinite="skip")
            assert found.nonfinite.tolist() == [1, 0, 2]
            for k in range(3):
                column = x[np.isfinite(x[:, k]), k]
                assert found.moments.count[k] == len(column)
                assert found.moments.mean[k].item() == pytest.approx(column.mean(), rel=1e-13)
                assert found.moments.m2[k].item() == pytest.approx(((column - column.mean()) ** 2).sum(), rel=1e-11)

    def test_they_are_refused_by_column_and_place(self, tmp_path):
        x = draw(10, 2)
        pq.write_table(table(x), tmp_path / "0.parquet")
        x[3, 1] = x[4, 1] = np.nan
        pq.write_table(table(x), tmp_path / "1.parquet")
        with pytest.raises(DataError, match=r"column 'b': 2, the first in .*1\.parquet"):
            moments(tmp_path)

    def test_a_variance_that_overflows_is_refused(self):
        with pytest.raises(DataError, match="'a' are so large"):
            moments(pandas.DataFrame({"a": [1e200, -1e200]}))

    def test_a_column_of_nothing_but_gaps_is_named(self):
        with pytest.raises(DataError, match="column 'b' has no finite value"):
            moments(pandas.DataFrame({"a": [1.0], "b": [np.nan]}), nonfinite="skip")


class TestColumns:
    def test_tables_of_every_library(self):
        x = draw(1000, 3)
        frame = pandas.DataFrame(x, columns=list("abc"))
        same(moments(frame), x)
        same(moments(frame.convert_dtypes()), x)
        same(moments(table(x)), x)
        same(moments(pa.table({"v": pa.FixedSizeListArray.from_arrays(x.ravel(), 3)})), x)
        same(moments(pa.table({"v": pa.array(x.tolist())})), x)
        same(moments(pa.table({"v": pa.FixedShapeTensorArray.from_numpy_ndarray(x)})), x)
        same(moments(pa.RecordBatchReader.from_batches(table(x).schema, table(x).to_batches(100))), x)
        assert moments(pa.table({"v": pa.array(x.tolist())})).columns == ("v[0]", "v[1]", "v[2]")

    def test_polars(self):
        polars = pytest.importorskip("polars", reason="polars is not installed")
        x = draw(1000, 3)
        same(moments(polars.DataFrame(x, schema=list("abc"))), x)

    def test_nulls_decimals_and_booleans(self):
        columns = {"n": pa.array([1, None, 3]), "b": pa.array([True, False, True])}
        columns["d"] = pa.array([1, 2, 4]).cast(pa.decimal128(30, 2))
        found = moments(pa.table(columns), nonfinite="skip")
        assert found.nonfinite.tolist() == [1, 0, 0]
        assert found.moments.mean.tolist() == pytest.approx([2, 2 / 3, 7 / 3])

    def test_the_columns_asked_for_in_their_order(self, tmp_path):
        x = draw(100, 3)
        pq.write_table(table(x).append_column("name", pa.array(["x"] * 100)), tmp_path / "x.parquet")
        for data in (tmp_path / "x.parquet", pq.read_table(tmp_path / "x.parquet")):
            found = moments(data, columns=["c", "a"])
            assert found.columns == ("c", "a")
            same(found, x[:, [2, 0]])
            with pytest.raises(DataError, match="'name' is of type string"):
                moments(data)
            with pytest.raises(DataError, match="no column 'z'"):
                moments(data, columns=["a", "z"])

    @pytest.mark.parametrize("columns", [[], ["a", "a"], "ab", [1]])
    def test_columns_that_are_no_names(self, columns):
        with pytest.raises(InputError, match="columns="):
            moments(table(draw(3, 2)), columns=columns)

    @pytest.mark.parametrize(
        "data",
        [
            pa.table({"a": pa.array([[1.0], [1.0, 2.0]])}),
            pandas.DataFrame({"a": pandas.to_datetime(["2020-01-01"])}),
            pandas.DataFrame({"a": ["1"]}),
            pandas.DataFrame({"a": pandas.Categorical(["u"])}),
            pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]),
            pandas.DataFrame({"a": [1 + 2j]}),
        ],
    )
    def test_what_holds_no_numbers_is_named(self, data):
        with pytest.raises(DataError, match="'a'"):
            moments(data)

    @pytest.mark.parametrize("data", [np.zeros(3), np.zeros((2, 3), dtype=complex), np.array([["a"]]), 3, object()])
    def test_what_is_no_data_set(self, data):
        with pytest.raises(DataError):
            moments(data)


class TestParts:
    def test_whatever_the_split_and_the_order(self):
        x = draw(3000, 4)
        for cuts in ([1500], [1, 2, 2999], list(range(100, 3000, 100))):
            parts = [ColumnMoments.of(piece, part=f"{k}") for k, piece in enumerate(np.split(x, cuts))]
            for order in (parts, parts[::-1], parts[1::2] + parts[::2]):
                whole = ColumnMoments.empty()
                for part in order:
                    whole = whole.merge(part)
                same(whole, x)
                assert whole.rows == 3000

    def test_empty_is_the_identity(self):
        a = ColumnMoments.of(draw(5, 2), part="a")
        for merged in (a.merge(ColumnMoments.empty()), ColumnMoments.empty().merge(a)):
            assert merged.to_dict() == a.to_dict()

    def test_a_part_counts_once(self):
        a = ColumnMoments.of(draw(5, 2), part="partition 3")
        with pytest.raises(DataError, match="partition 3 was read twice"):
            a.merge(ColumnMoments.of(draw(5, 2), part="partition 4")).merge(a)

    def test_parts_without_rows_count_nothing(self, tmp_path):
        x = draw(50, 2)
        for k, piece in enumerate([x[:0], x[:20], x[20:20], x[20:]]):
            pq.write_table(table(piece), tmp_path / f"{k}.parquet")
        same(moments(tmp_path), x)
        empty = table(x[:0])
        with pytest.raises(DataError, match="no rows"):
            moments(empty)

    @pytest.mark.parametrize(
        ("second", "named"),
        [
            (lambda t: t.drop_columns("b"), "no column 'b'"),
            (lambda t: t.append_column("z", t.column("a")), "column 'z'"),
            (lambda t: t.set_column(0, "a", t.column("a").cast(pa.float32())), "column 'a' is of type float"),
            (lambda t: t.set_column(0, "a", pa.array(["x"] * len(t))), "column 'a' is of type string"),
        ],
    )
    def test_columns_that_vanish_or_change(self, tmp_path, second, named):
        first = table(draw(20, 2))
        pq.write_table(first, tmp_path / "part-0.parquet")
        pq.write_table(second(first), tmp_path / "part-1.parquet")
        with pytest.raises(DataError, match=rf"part-1\.parquet.*{named}"):
            moments(tmp_path / "part-*.parquet")

    def test_columns_in_another_order_are_matched_by_name(self, tmp_path):
        x = draw(40, 3)
        pq.write_table(table(x[:20]), tmp_path / "0.parquet")
        pq.write_table(table(x[20:]).select(["c", "a", "b"]), tmp_path / "1.parquet")
        same(moments(tmp_path), x)

    def test_another_type_of_number_where_it_is_wanted(self, tmp_path):
        pq.write_table(pa.table({"a": pa.array([1, 2])}), tmp_path / "0.parquet")
        pq.write_table(pa.table({"a": pa.array([6.0])}), tmp_path / "1.parquet")
        assert moments(tmp_path, any_type=True).moments.mean.item() == 3


class TestFiles:
    def write(self, x, folder):
        np.save(folder / "c.npy", x)
        np.save(folder / "f.npy", np.asfortranarray(x))
        pq.write_table(table(x), folder / "t.parquet", row_group_size=999)
        with pa.OSFile(str(folder / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table(x).schema) as writer:
            writer.write_table(table(x), max_chunksize=777)
        with pa.OSFile(str(folder / "s.arrows"), "wb") as file, pa.ipc.new_stream(file, table(x).schema) as writer:
            writer.write_table(table(x))
        feather.write_feather(table(x), str(folder / "t.feather"))
        return ["c.npy", "f.npy", "t.parquet", "t.arrow", "s.arrows", "t.feather"]

    def test_every_kind(self, tmp_path):

        x = draw(5000, 3)
        for name in self.write(x, tmp_path):
            same(moments(tmp_path / name), x)
            same(moments(str(tmp_path / name)), x)
            read = torch.cat(list(batches(tmp_path / name, batch_size=900, dtype=torch.float64)))
            assert torch.equal(read, torch.from_numpy(x)), name

    def test_a_dataset_of_arrow(self, tmp_path):
        import pyarrow.dataset

        x = draw(100, 2)
        pq.write_table(table(x[:40]), tmp_path / "0.parquet")
        pq.write_table(table(x[40:]).drop_columns("b"), tmp_path / "1.parquet")
        with pytest.raises(DataError, match=r"1\.parquet.*'b'"):
            moments(pyarrow.dataset.dataset(tmp_path))
        pq.write_table(table(x[40:]), tmp_path / "1.parquet")
        same(moments(pyarrow.dataset.dataset(tmp_path)), x)

    def test_a_file_named_twice(self, tmp_path):
        np.save(tmp_path / "x.npy", draw(4, 2))
        os.link(tmp_path / "x.npy", tmp_path / "y.npy")
        for paths in ([tmp_path / "x.npy"] * 2, [tmp_path / "x.npy", tmp_path / "y.npy"], tmp_path):
            with pytest.raises(DataError, match="twice"):
                moments(paths)

    def test_what_cannot_be_read_is_named(self, tmp_path):
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
        (tmp_path / "bad.arrow").write_bytes(b"ARROW1")
        (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
        np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
        np.save(tmp_path / "flat.npy", np.zeros(3))
        (tmp_path / "x.csv").write_text("1,2")
        names = ["bad.parquet", "bad.arrow", "bad.npy", "objects.npy", "flat.npy", "x.csv", "none.npy"]
        for name in names:
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                moments(tmp_path / name)
        with pytest.raises(DataError):
            moments([])


class TestStandardize:
    def test_from_moments(self):
        x = draw(100, 3)
        expected = bn.Standardize(3).fit(torch.from_numpy(x))
        found = moments(x)
        states = (found, found.moments, found.to_dict(), json.loads(json.dumps(found.moments.to_dict())))
        for state in states:
            layer = bn.Standardize.from_moments(state)
            torch.testing.assert_close(layer.mean, expected.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(layer.var, expected.var, rtol=1e-13, atol=0)
            assert layer.count.shape == ()

    @pytest.mark.parametrize(
        "given",
        [
            Moments.empty(2),
            Moments.empty(()),
            Moments.empty((2, 2)),
            Moments(2, torch.tensor([np.nan]), torch.tensor([1.0])),
            Moments(2, torch.tensor([0.0]), torch.tensor([-1.0])),
            {"format": "else"},
            3,
        ],
    )
    def test_moments_that_make_no_layer(self, given):
        with pytest.raises(InputError):
            bn.Standardize.from_moments(given)

    def test_fit_reads_data_sets(self, tmp_path):
        x = draw(1000, 3)
        pq.write_table(table(x), tmp_path / "x.parquet")
        expected = bn.Standardize(3).fit(torch.from_numpy(x))
        for data in (tmp_path / "x.parquet", [str(tmp_path / "x.parquet")], x, table(x), table(x).to_pandas()):
            layer = bn.Standardize(3).fit(data)
            torch.testing.assert_close(layer.var, expected.var, rtol=1e-12, atol=0)
        with pytest.raises(InputError, match="3 features"):
            bn.Standardize(2).fit(x)
        assert bn.Standardize(2).fit(table(x), columns=["c", "a"]).mean[1] == pytest.approx(x[:, 0].mean())

    def test_counts_by_feature_where_values_were_skipped(self):
        x = torch.from_numpy(draw(50, 2))
        x[3, 1] = np.nan
        layers = [bn.Standardize(2).fit(data, nonfinite="skip") for data in (x, [x[:10], x[10:]], x.numpy())]
        layers.append(bn.Standardize(2).partial_fit(x[:20], nonfinite="skip").partial_fit(x[20:]))
        for layer in layers:
            assert layer.count.tolist() == [50, 49]
            torch.testing.assert_close(layer.var[1], x[x[:, 1].isfinite(), 1].var(correction=0), rtol=1e-12, atol=0)
        fresh = bn.Standardize(2)
        fresh.load_state_dict(layers[0].state_dict())
        assert torch.equal(fresh.count, layers[0].count)
        with pytest.raises(InputError, match=r"\{1: 1\}"):
            bn.Standardize(2).fit(x)

    def test_nothing_changes_where_it_is_refused(self, tmp_path):
        layer = bn.Standardize(2).fit(draw(9, 2))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        for data in (tmp_path / "none.npy", np.full((2, 2), np.nan), draw(3, 3)):
            with pytest.raises(BatchNormError):
                layer.fit(data)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


class TestBatches:
    def test_batches_cross_the_borders_of_parts(self, tmp_path):
        x = draw(103, 2)
        for k, piece in enumerate(np.split(x, [10, 10, 55])):
            pq.write_table(table(piece), tmp_path / f"{k}.parquet")
        read = batches(tmp_path, batch_size=20, dtype=torch.float64)
        for _ in range(2):
            found = list(read)
            assert [len(batch) for batch in found] == [20] * 5 + [3]
            assert torch.equal(torch.cat(found), torch.from_numpy(x))

    def test_columns_of_arrays(self):
        images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
        data = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "y": pa.array([0.0, 1, 2, 3])})
        both = list(batches(data, batch_size=3))
        assert torch.equal(torch.cat([batch["x"] for batch in both]), torch.from_numpy(images))
        assert both[0]["y"].dtype == torch.float32
        one = next(iter(batches(data, batch_size=4, columns=["x"])))
        assert one.shape == (4, 2, 3)

    def test_values_that_are_not_finite_are_named(self):
        with pytest.raises(DataError, match="'b' has 1"):
            list(batches(pandas.DataFrame({"a": [1.0], "b": [np.inf]}), batch_size=1))

    @pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
    def test_sizes_that_are_none(self, size):
        with pytest.raises(InputError, match="batch_size"):
            batches(draw(3, 2), batch_size=size)


class TestWaiting:
    def test_a_limit(self):
        import threading

        stop = threading.Event()
        with pytest.raises(SynchronizationError, match="the engine did not answer within timeout"):
            within(0.05, "the engine", lambda: stop.wait(20), stop.set)
        assert stop.is_set()

    def test_an_error_comes_through(self):
        with pytest.raises(ZeroDivisionError):
            within(5, "the engine", lambda: 1 // 0)

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", None, True])
    def test_limits_that_are_none(self, timeout):
        with pytest.raises(InputError, match="timeout"):
            moments(draw(3, 2), timeout=timeout)


def test_memory_is_that_of_a_block(tmp_path):
    """A Parquet file of 64 MB adds less than 40 MB to the largest memory of a process that has torch and pyarrow."""
    import subprocess
    import sys

    with pq.ParquetWriter(tmp_path / "x.parquet", table(draw(1, 8)).schema) as writer:
        for seed in range(8):
            writer.write_table(table(draw(125_000, 8, seed)))
    script = (
        "import resource, sys, torch, pyarrow.parquet, batchnorm.data as d\n"
        "d.moments(sys.argv[2])\n"  # what every reading costs once
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = d.moments(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found.rows)\n"
    )
    pq.write_table(table(draw(10, 8)), tmp_path / "small.parquet")
    command = [sys.executable, "-c", script, str(tmp_path / "x.parquet"), str(tmp_path / "small.parquet")]
    kilobytes, rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == 1_000_000
    assert int(kilobytes) < 40_000


def test_permutations_of_three_parts_agree():
    parts = [ColumnMoments.of(draw(30, 2, seed), part=str(seed)) for seed in range(3)]
    x = np.concatenate([draw(30, 2, seed) for seed in range(3)])
    for order in itertools.permutations(parts):
        same(order[0].merge(order[1]).merge(order[2]), x)
        same(order[0].merge(order[1].merge(order[2])), x)
