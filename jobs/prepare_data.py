"""Make raw images a dataset version: decoded, checked, split by content, written once.

    python jobs/prepare_data.py laptop
    python jobs/prepare_data.py smoke --data.source image-folder --data.path photos/
    ray job submit --working-dir . -- python jobs/prepare_data.py cluster

The last line of stdout is one JSON object. Running it again on the same rows writes nothing.
"""

from typing import Any

from rayloop.clock import SYSTEM_CLOCK
from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, prepare the data, and tell what is there."""
    config = parse_config(__doc__)
    started = SYSTEM_CLOCK.monotonic()
    storage = Storage(home())
    with connect(config.cluster):
        from rayloop.data.prepare import prepare  # noqa: PLC0415  imports Ray, after connect

        prepared = prepare(config.data, storage)
    dataset = prepared.dataset
    if not prepared.is_new:
        print(f"{dataset.name}:{dataset.version} is there already; nothing was changed.")
    return {
        "dataset": dataset.name,
        "version": dataset.version,
        "digest": dataset.digest,
        "rows": sum(dataset.splits.values()),
        "splits": dataset.splits,
        "refused": dataset.refused,
        "changed": prepared.is_new,
        "seconds": round(SYSTEM_CLOCK.monotonic() - started, 3),
    }


if __name__ == "__main__":
    run_job(main)
