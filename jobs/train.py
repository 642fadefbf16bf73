"""Train one model on a prepared dataset.

    python jobs/train.py laptop
    python jobs/train.py laptop --model.name tiny_resnet --train.epochs 3 --run-id mine
    ray job submit --working-dir . -- python jobs/train.py cluster --train.num_workers 16

Prints progress to stderr, then the result as one JSON line. The same --run-id continues a run.
"""

from typing import Any

from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.storage import Storage, home
from rayloop.tracking import Tracker


def main() -> dict[str, Any]:
    """Parse the command line, train, and give the result's last line."""
    config = parse_config(__doc__)
    storage = Storage(home())
    tracker = Tracker(storage, config.registry.tracking_uri)
    with connect(config.cluster):
        from rayloop.train.run import train  # noqa: PLC0415  imports Ray, after connect

        return train(config, storage, tracker).last_line()


if __name__ == "__main__":
    run_job(main)
