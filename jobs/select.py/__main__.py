"""Choose among finished runs by accuracy, speed and size, and register the one that is best.

    python jobs/select.py laptop
    python jobs/select.py laptop --max-latency-ms 2 --max-bytes 100000
    python jobs/select.py laptop --min-accuracy 0.92 --prefer latency
    python jobs/select.py laptop --sweep mine --no-register
    python jobs/select.py laptop --runs first second third
    ray job submit --working-dir . -- python jobs/select.py cluster --max-latency-ms 2

Each run is quantized and compared on the validation split, and timed on this machine beside the
others; the Pareto front is drawn. Only the chosen one sees the test split. Every field of the
select section is a flag with or without its section (--max-bytes, --select.max-bytes). The table
goes to stderr; the last line of stdout is the result as JSON. Exit code 1 means that no run is
within the limits, or that the chosen one does not pass the gates.

This is a folder: a file jobs/select.py would be what every other job, run as python jobs/x.py,
imports as the standard library's select.
"""

from typing import Any

from rich.console import Console

from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.select.comparison import Comparison
from rayloop.select.runs import find_runs
from rayloop.select.table import comparison_table
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, compare, choose, register, and give the result's last line."""
    config = parse_config(__doc__, section="select")
    storage = Storage(home())
    found = find_runs(storage, config)
    with connect(config.cluster):
        from rayloop.select.run import select  # noqa: PLC0415  imports Ray, after connect

        return select(storage, config, found, show)


def show(comparison: Comparison) -> None:
    """Print the candidates as a table for people."""
    Console(stderr=True).print(comparison_table(comparison))


if __name__ == "__main__":
    run_job(main)
