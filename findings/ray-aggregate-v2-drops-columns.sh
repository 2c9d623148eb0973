#!/usr/bin/env bash
# Ray Data 2.60.0: an AggregateFnV2 with on=None is documented to be "performed over the entire row", but in
# groupby(...).aggregate(...) its aggregate_block is given the columns of the keys alone. An AggregateFn is given all.
# Source: ray/data/_internal/logical/rules/projection_pushdown.py (a projection on the keys and get_target_column()) and
# ray/data/aggregate.py (docstring of AggregateFnV2, argument `on`).
# Seen on 2026-11-28: "AggregateFnV2: ['site'], AggregateFn: ['a', 'c', 'site']".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0" pandas==3.1.1 pyarrow==26.0.1
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 venv/bin/python - <<'PYTHON'
import pandas
import ray
from ray.data.aggregate import AggregateFn, AggregateFnV2


class Columns(AggregateFnV2):
    def __init__(self):
        super().__init__("new", lambda: "", on=None, ignore_nulls=False)

    def aggregate_block(self, block):
        return ",".join(sorted(block.column_names))

    def combine(self, current_accumulator, new):
        return max(current_accumulator, new)


old = AggregateFn(
    init=lambda key: "",
    merge=max,
    name="old",
    accumulate_block=lambda found, block: max(found, ",".join(sorted(block.column_names))),
)
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
data = ray.data.from_pandas([pandas.DataFrame({"a": [1.0, 2.0], "c": [3.0, 4.0], "site": ["u", "u"]})])
new = data.groupby("site", num_partitions=1).aggregate(Columns()).take_all()[0]["new"].split(",")
old = data.groupby("site", num_partitions=1).aggregate(old).take_all()[0]["old"].split(",")
print(f"AggregateFnV2: {new}, AggregateFn: {old}")
assert new == ["site"], "all columns are handed on now"
assert old == ["a", "c", "site"]
PYTHON
echo "as described"
