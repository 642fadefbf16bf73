"""Which code runs: rayloop's version, and the commit of the checkout its source lies in.

A package that was installed has a version alone; one that was shipped to a cluster without its
`.git` has the commit that `rayloop submit` sent along. Two calls of git, some milliseconds each,
are made once per process.
"""

import os
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import rayloop

TIMEOUT_S = 10.0
SHIPPED_COMMIT = "RAYLOOP_COMMIT"
"""Variable with the commit of the checkout a submitted job was shipped from."""

CHANGES = "+changes"
"""Behind that commit, where the checkout had any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeVersion:
    """The code of this process.

    Attributes:
        version: rayloop's own version.
        commit: The checkout's newest commit; empty where there is no checkout or no git.
        has_changes: Whether the checkout holds anything that is not in that commit, a new file
            included; False where there is no commit.
    """

    version: str
    commit: str = ""
    has_changes: bool = False


@cache
def code_version() -> CodeVersion:
    """The version of the code this process runs, as it was at the first call."""
    found = read_code_version(Path(rayloop.__file__).parent)
    commit, mark, _ = os.environ.get(SHIPPED_COMMIT, "").partition(CHANGES)
    return found if found.commit else replace(found, commit=commit, has_changes=bool(mark))


def read_code_version(package: Path) -> CodeVersion:
    """The version of a package's code.

    Args:
        package: Its folder. Where git does not track the folder's `__init__.py`, the checkout
            around it is somebody else's (a virtual environment inside a project) and is passed
            over.
    """
    version = rayloop.__version__
    if not _git(package, "ls-files", "--", "__init__.py"):
        return CodeVersion(version=version)
    lines = _git(package, "status", "--porcelain=v2", "--branch").splitlines()
    told = dict(line.split(" ", 2)[1:] for line in lines if line.startswith("# "))
    commit = told.get("branch.oid", "")
    if not commit.isalnum():  # "(initial)": nothing is committed yet
        return CodeVersion(version=version)
    has_changes = any(not line.startswith("# ") for line in lines)
    return CodeVersion(version=version, commit=commit, has_changes=has_changes)


def _git(folder: Path, *words: str) -> str:
    """What git prints; empty where git, or a checkout it trusts, is missing."""
    # Inside a hook git's own variables name another checkout; and a reader takes no lock.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            env={**kept, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
