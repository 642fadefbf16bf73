"""Let a registered version answer a whole dataset, a folder of images or Parquet files.

    python jobs/batch_predict.py laptop
    python jobs/batch_predict.py laptop --batch.input photos/ --batch.version :3
    python jobs/batch_predict.py laptop --batch.input dataset:digits/train --batch.output mine
    ray job submit --working-dir . -- python jobs/batch_predict.py cluster --batch.input s3://b/x

Without --batch.input it reads the test split of the newest dataset version. The answers are those
that the server gives, bit for bit, in RAYLOOP_HOME/predictions/NAME/rows/*.parquet. A job that was
stopped continues when the same command is given again. The last line of stdout is one JSON object;
exit code 1 means that the work failed or that not one image could be read.
"""

from typing import Any

from rayloop.clock import SYSTEM_CLOCK
from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.serve.offline.plan import open_work
from rayloop.serve.offline.result import FileReport, finish
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, predict what is missing, and give the result's last line."""
    config = parse_config(__doc__)
    started = SYSTEM_CLOCK.monotonic()
    work = open_work(Storage(home()), config)
    reports: list[FileReport] = []
    if len(work.done) < work.num_files:
        with connect(config.cluster):
            from rayloop.serve.offline.run import predict_files  # noqa: PLC0415  imports Ray

            reports = predict_files(work)
    result = finish(work, reports, SYSTEM_CLOCK)
    return {**result, "seconds": round(SYSTEM_CLOCK.monotonic() - started, 3)}


if __name__ == "__main__":
    run_job(main)
