"""One suite in this process: `python -m benchmarks.worker SUITE [--quick]` writes JSON lines for `benchmarks.run`."""

from __future__ import annotations

import json
import os
import sys

from .machine import environment
from .suites import SUITES


def main(name: str, quick: bool) -> None:
    """Writes how many jobs there are, each row, and a line after each job."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up among the rows

    def write(line: dict[str, object]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    key = {**environment(), "quick": quick}  # before a job changes the number of threads
    jobs = SUITES[name].jobs(quick)
    write({"jobs": len(jobs)})
    for job in jobs:
        try:
            for row in job():
                write({"row": {**key, **row}})
        except Exception as error:  # one case that fails must not cost the others
            write({"failed": f"{name}: {job}: {type(error).__name__}: {error}"})
        write({"done": 1})


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv[2:])
