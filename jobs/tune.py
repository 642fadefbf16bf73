"""Search a space of configurations for the best one, with Ray Tune.

    python jobs/tune.py laptop
    python jobs/tune.py laptop --tune.trials 40 --run-id mine
    python jobs/tune.py laptop --tune.space "train.learning_rate=log(0.003, 0.1)"
    python jobs/tune.py laptop --tune.objectives val_accuracy latency_ms_b1
    ray job submit --working-dir . -- python jobs/tune.py cluster --tune.trials 200

Prints the space and each trial to stderr, then the result as one JSON line. The same --run-id
continues a sweep, also after SIGKILL. Only the winner sees the test split, once; it becomes the
newest run, which jobs/quantize.py takes.
"""

from typing import Any

from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.quantize.cost import measure_cost
from rayloop.storage import Storage, home
from rayloop.tracking import Tracker
from rayloop.tune.sweep import read_space


def main() -> dict[str, Any]:
    """Parse the command line, search, and give the result's last line."""
    config = parse_config(__doc__)
    read_space(config)  # a mistake in it is said before Ray starts
    storage = Storage(home())
    tracker = Tracker(storage, config.registry.tracking_uri)
    with connect(config.cluster):
        from rayloop.tune.run import tune  # noqa: PLC0415  imports Ray, after connect

        return tune(config, storage, tracker, measure_cost).last_line()


if __name__ == "__main__":
    run_job(main)
