"""Programs of Debian packages for tests: found here, or downloaded and unpacked without root."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

UNPACK = """rm -rf new
for one in *.deb; do dpkg-deb -x $one new || exit 1; done
mv new/usr . && rm -rf new *.deb
"""


def debian_programs(
    cache: pytest.Cache, packages: list[str], names: dict[str, str]
) -> dict[str, str]:
    """Where programs are; the test is skipped where apt cannot give them.

    Args:
        cache: Keeps what was downloaded.
        packages: Debian's names, with the libraries a small system lacks.
        names: Each program's name, and that of its file in the package.
    """
    installed = {name: shutil.which(name) or "" for name in names}
    if all(installed.values()):
        return installed
    folder = cache.mkdir(packages[0])
    unpacked = {name: str(folder / "usr/bin" / file) for name, file in names.items()}
    steps = [["apt-get", "download", *packages], ["sh", "-c", UNPACK]]
    said = ""
    for step in [] if all(Path(path).exists() for path in unpacked.values()) else steps:
        with contextlib.suppress(OSError):
            done = subprocess.run(
                step, cwd=folder, capture_output=True, text=True, timeout=300, check=False
            )
            said += done.stderr
    if not all(Path(path).exists() for path in unpacked.values()):
        pytest.skip(f"apt cannot give Debian's {packages[0]} here: {said[-300:]}")
    return unpacked


def libraries(program: str) -> str:
    """LD_LIBRARY_PATH for an unpacked program; what the system has already is found as ever."""
    return ":".join(str(path) for path in sorted(Path(program).parents[1].glob("lib/*-linux-gnu*")))
