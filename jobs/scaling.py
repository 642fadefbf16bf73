"""Measure what twice the data, the parameters or the batch would give.

    python jobs/scaling.py laptop
    python jobs/scaling.py laptop --run-id mine --scaling.seeds 5 --train.epochs 3
    python jobs/scaling.py laptop --scaling.batch_factors --scaling.data_shares 0.1 0.3 1
    ray job submit --working-dir . -- python jobs/scaling.py laptop --run-id mine

Trains the configuration on shares of the data, with other widths and with other batch sizes, some
seeds each, and lays curves through the validation errors. Prints progress to stderr, then the
result as one JSON line; the picture is runs/RUN_ID/scaling.png. The same --run-id continues.
"""

from typing import Any

from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.storage import Storage, home
from rayloop.tracking import Tracker


def main() -> dict[str, Any]:
    """Parse the command line, measure, and give the result's last line."""
    config = parse_config(__doc__)
    storage = Storage(home())
    tracker = Tracker(storage, config.registry.tracking_uri)
    with connect(config.cluster):
        from rayloop.tune.scaling_run import measure_scaling  # noqa: PLC0415  imports Ray

        return measure_scaling(config, storage, tracker)


if __name__ == "__main__":
    run_job(main)
