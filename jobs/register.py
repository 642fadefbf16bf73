"""Register a quantized run as a model version with an alias, if it passes every gate.

    python jobs/register.py laptop
    python jobs/register.py laptop --run-id mine --registry.alias challenger
    ray job submit --working-dir . -- python jobs/register.py laptop --run-id mine

Without --run-id the newest trained run is taken. The last line of stdout is the result as JSON;
exit code 1 with the reasons means that a gate refused the run. Needs no Ray.
"""

from typing import Any

from rayloop.clock import SYSTEM_CLOCK
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.registry.register import register
from rayloop.storage import Storage, home


def main() -> dict[str, Any]:
    """Parse the command line, register, and give the result's last line."""
    config = parse_config(__doc__)
    return register(Storage(home()), config, SYSTEM_CLOCK).summary()


if __name__ == "__main__":
    run_job(main)
