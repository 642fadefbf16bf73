"""Debian's package `prometheus` for tests."""

import subprocess
from pathlib import Path

import pytest

from tests.debian import debian_programs

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"


def prometheus_programs(cache: pytest.Cache) -> dict[str, str]:
    """Where `prometheus` and `promtool` are; the test is skipped where apt cannot give them.

    Args:
        cache: Keeps what was downloaded.
    """
    names = {name: name for name in ("prometheus", "promtool")}
    return debian_programs(cache, ["prometheus"], names)


def promtool(programs: dict[str, str], *words: object, page: bytes = b"") -> tuple[int, str]:
    """What promtool says, and how it ends."""
    done = subprocess.run(
        [programs["promtool"], *map(str, words)],
        input=page, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).decode()
