"""Turn a trained checkpoint into a smaller INT8 model, and compare it with fp32.

    python jobs/quantize.py laptop
    python jobs/quantize.py laptop --run-id mine --quantize.max_accuracy_drop 0.003
    ray job submit --working-dir . -- python jobs/quantize.py laptop --run-id mine

Without --run-id the newest trained run is taken. Progress goes to stderr; the last line of stdout
is the result as JSON. Exit code 1 means that no INT8 model passed the gate; the comparison is
kept in runs/RUN_ID/quantize/result.json all the same.
"""

from typing import Any

from rayloop.cluster import connect
from rayloop.errors import GateRefused
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.quantize.result import quantize_folder
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, quantize, and give the result's last line."""
    config = parse_config(__doc__)
    storage = Storage(home())
    with connect(config.cluster):
        from rayloop.quantize.run import quantize  # noqa: PLC0415  imports Ray, after connect

        result = quantize(storage, config.quantize, config.run_id)
    if not result.passed:
        raise GateRefused(
            f"No INT8 model of run {result.run_id} passes the gate: {result.gate}. The comparison "
            f"is in {storage.path(quantize_folder(result.run_id))}/result.json. Train longer, or "
            "set other limits with --quantize.max_accuracy_drop, --quantize.min_agreement or "
            "--quantize.max_excluded_layers."
        )
    return result.summary()


if __name__ == "__main__":
    run_job(main)
