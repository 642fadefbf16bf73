"""A real MLflow server for tests: a process of its own on a free port of 127.0.0.1.

It comes out of an environment of its own, which `make .venv-ui/ready` sets up.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from rayloop.ports import free_port

ROOT = Path(__file__).parents[1]
START_S = 300


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[Callable[[], str]]:
    """Run a server with its database and its artifacts under a folder, and stop exactly it.

    Yields:
        What waits until it answers, which takes some seconds, and gives its URL.
    """
    subprocess.run(["make", "-s", ".venv-ui/ready"], cwd=ROOT, check=True, stdout=sys.stderr)
    port = free_port("127.0.0.1")
    words = [
        str(ROOT / ".venv-ui/bin/mlflow"), "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/server.db",
        "--artifacts-destination", f"{folder}/artifacts",
        "--workers", "1", "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    quiet = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | quiet,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answering() -> str:
        until = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
            except OSError:
                time.sleep(0.2)
            else:
                return url

    try:
        yield answering
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
