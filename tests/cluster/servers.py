"""Servers of their own process for the tests of this folder.

Each mode of Serve needs its own environment before Ray starts, so a test runs a script and speaks
to it over the network only.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rayloop.ports import free_port
from tests.releases import LABELS as LABELS
from tests.releases import MODEL as MODEL
from tests.releases import SHAPE as SHAPE
from tests.releases import images as images
from tests.releases import model_bytes as model_bytes

INFER = f"/v2/models/{MODEL}/infer"


def free_ports(count: int) -> list[str]:
    """Ports that are free now."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port("127.0.0.1"))
    return [str(port) for port in found]


@contextlib.contextmanager
def started(folder: Path, script: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server's script while the context lasts; it must end well on SIGTERM.

    Args:
        folder: Holds the script and its log.
        script: Its text; it prints a line once it serves.
        words: Its arguments.
    """
    file = folder / "rayloop_test_server.py"
    file.write_text(script)
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    environment["PYTHONPATH"] = str(folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(file), *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            process.stdout.close()
            code = process.wait(60)
    assert code == 0, (folder / "log").read_text()[-3000:]


def first_line(folder: Path, process: subprocess.Popen[str]) -> list[str]:
    """The words a server says once it serves."""
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line, (folder / "log").read_text()[-3000:]
    return line


UNTIL_STOPPED = """
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            print(url, url.grpc, flush=True)
            stop.wait()
"""
"""The end of a server's script, inside its innermost context."""
