"""Serve the champion of the registry until Ctrl-C.

    python jobs/serve.py laptop
    python jobs/serve.py laptop --serve.http_port 0 --serve.max_replicas 2
    python jobs/serve.py smoke --serve.no-haproxy

Prints the URL and a request to try. SIGINT and SIGTERM stop it cleanly; the last line of stdout is
then one JSON object.
"""

import signal
import sys
import threading
from typing import Any

from rayloop import cluster, haproxy, storage, tracking
from rayloop.clock import SYSTEM_CLOCK
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config


def main() -> dict[str, Any]:
    """Serve until a signal comes."""
    config = parse_config(__doc__)
    home = storage.home()
    tracking.refuse_silence(storage.Storage(home), config.registry.tracking_uri)
    with haproxy.ingress(config.serve) as extra, cluster.connect(config.cluster, extra):
        from rayloop.serve.run import serving  # noqa: PLC0415  imports Ray

        with serving(config.serve, config.registry, home, events=config.events) as url:
            stop = _stop_on_signals()
            start = SYSTEM_CLOCK.monotonic()
            _welcome(url, config.registry.model)
            stop.wait()
            print("stopping ...", file=sys.stderr)
    seconds = round(SYSTEM_CLOCK.monotonic() - start, 1)
    return {"url": url, "model": config.registry.model, "seconds": seconds}


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _welcome(url: str, model: str) -> None:
    print(f"{url} serves {model!r}; try\n", flush=True)
    print(f"  curl {url}/v2/models/{model}")
    print(f"  curl --data-binary @image.png {url}/predict\n")
    print("Ctrl-C stops it.", flush=True)


if __name__ == "__main__":
    run_job(main)
