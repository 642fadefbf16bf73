"""Predict what training would do on 1 to 10,000 workers: speed, goodput, cost.

    python jobs/simulate.py laptop
    python jobs/simulate.py laptop --workers 8 64 512 --workers-per-node 8 --link-gbit-per-s 100
    python jobs/simulate.py laptop --run mine --spot --price-per-worker-hour 2.5 --run-rows 1e9
    python jobs/simulate.py laptop --calibration my_machine.json --workers 4 64 --stages 4

Starts from what was measured: a file of benchmarks/simulator.py, or the record of a finished run
(the newest, unless --run names one). Prints a table, a star where a row reaches beyond what was
measured, then the figures as one JSON line. Starts no Ray.
"""

from typing import Any

from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.simulate.table import simulate
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, predict, and print the table."""
    config = parse_config(__doc__, section="simulate")
    lines, last = simulate(config, Storage(home()))
    print("\n".join(lines))
    return last


if __name__ == "__main__":
    run_job(main)
