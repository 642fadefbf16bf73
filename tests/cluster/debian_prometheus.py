"""Debian's package `prometheus` for tests: found here, or downloaded and unpacked without root."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"

UNPACK = "rm -rf new && dpkg-deb -x prometheus_*.deb new && mv new/usr . && rm -rf new *.deb"


def prometheus_programs(cache: pytest.Cache) -> dict[str, str]:
    """Where `prometheus` and `promtool` are; the test is skipped where apt cannot give them.

    Args:
        cache: Keeps what was downloaded.
    """
    names = ("prometheus", "promtool")
    installed = {name: shutil.which(name) or "" for name in names}
    if all(installed.values()):
        return installed
    folder = cache.mkdir("prometheus")
    unpacked = {name: str(folder / "usr/bin" / name) for name in names}
    steps = [["apt-get", "download", "prometheus"], ["sh", "-c", UNPACK]]
    said = ""
    for step in [] if all(Path(path).exists() for path in unpacked.values()) else steps:
        with contextlib.suppress(OSError):
            done = subprocess.run(
                step, cwd=folder, capture_output=True, text=True, timeout=300, check=False
            )
            said += done.stderr
    if not all(Path(path).exists() for path in unpacked.values()):
        pytest.skip(f"apt cannot give Debian's prometheus here: {said[-300:]}")
    return unpacked


def promtool(programs: dict[str, str], *words: object, page: bytes = b"") -> tuple[int, str]:
    """What promtool says, and how it ends."""
    done = subprocess.run(
        [programs["promtool"], *map(str, words)],
        input=page, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).decode()
