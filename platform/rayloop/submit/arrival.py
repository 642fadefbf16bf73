"""What a submitted job makes sure of before it does anything: its code, its libraries, its home.

`ray job submit` ships the working folder, but the nodes may have a package of their own installed;
the job must run the one it came with. Nothing here is done for a job that was started by hand.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import rayloop
from rayloop.errors import RequestError

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of a submitted job."""

COMPARED = ("ray", "torch")


def library_versions() -> dict[str, str]:
    """Versions that decide whether a job runs the same elsewhere: Python's, Ray's and torch's."""
    found = {name: importlib.metadata.version(name) for name in COMPARED}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found}


def run_shipped_code(environment: Mapping[str, str], folder: Path) -> None:
    """Start over with the package in the working folder, where another one was imported.

    Args:
        environment: Of this process.
        folder: The job's working folder.
    """
    shipped = folder / "platform" / "rayloop"
    if SUBMITTED not in environment or not (shipped / "__init__.py").is_file():
        return
    if Path(rayloop.__file__).resolve().parent == shipped.resolve():
        return
    paths = [str(shipped.parent), environment.get("PYTHONPATH", "")]
    changed = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], changed)


def refuse_to_start(environment: Mapping[str, str]) -> None:
    """Compare this node with the machine the job was submitted from.

    Args:
        environment: Of this process.

    Raises:
        RequestError: Libraries differ, or what the job writes would be lost.
    """
    if SUBMITTED not in environment:
        return
    theirs = json.loads(environment.get("RAYLOOP_SUBMITTED_WITH", "{}"))
    refuse_versions(theirs, library_versions())
    home = environment.get("RAYLOOP_HOME", "")
    if "://" not in home and not Path(home).is_absolute():
        raise RequestError(
            f"RAYLOOP_HOME is {home or 'not set'} in this submitted job, whose working folder is a "
            "copy that goes away with it. Set RAYLOOP_HOME to s3://BUCKET/PREFIX or to an absolute "
            "folder that all nodes share: where the nodes start Ray, or for this job with "
            """--runtime-env-json '{"env_vars": {"RAYLOOP_HOME": "..."}}'; rayloop submit sends """
            "yours along."
        )


def refuse_versions(mine: Mapping[str, str], clusters: Mapping[str, str]) -> None:
    """Compare the versions here with the cluster's.

    Args:
        mine: Of the machine the job is submitted from, by library.
        clusters: Of the cluster; what is known.

    Raises:
        RequestError: Python differs in its second number, or another library at all.
    """
    for name in mine.keys() & clusters.keys():
        here, there = mine[name], clusters[name]
        if name == "python":
            here, there = (".".join(version.split(".")[:2]) for version in (here, there))
        # A build's own mark, as in 2.15.0+cpu, says nothing about the interface.
        if here.partition("+")[0] != there.partition("+")[0]:
            raise RequestError(
                f"The cluster runs {name} {there}, and the job was submitted with {name} {here}; "
                "pickles and checkpoints need the same. Nothing was started. Set up the cluster "
                "from this checkout's requirements.lock (ray up cluster.yaml), or submit with the "
                "versions of the cluster."
            )
