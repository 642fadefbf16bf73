"""`rayloop submit` and `rayloop stop`: a job on a cluster as if it ran here."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rayloop.cli import local
from rayloop.cli.ending import sigterm_raises
from rayloop.code_version import CHANGES, code_version
from rayloop.errors import RayloopError, RequestError, WorkError
from rayloop.logs import stage_logger
from rayloop.presets import load_preset
from rayloop.submit.address import cluster_address, use_token
from rayloop.submit.arrival import library_versions, refuse_versions
from rayloop.submit.job import RUNNING
from rayloop.submit.package import LIMIT_BYTES, Package, collect
from rayloop.submit.request import Submission, compose, job_script

if TYPE_CHECKING:
    from rayloop.submit.client import Cluster

log = stage_logger("submit")


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    submit = commands.add_parser(
        "submit",
        help="run jobs/JOB.py PRESET on a cluster, and follow it; Ctrl-C stops it",
        description="Ships the code, follows the job's log, and ends as the job ends: its last "
        "JSON line is the last line here. A job that is already running is followed, not started "
        "a second time. Ctrl-C and SIGTERM stop the job; a terminal that closes does not.",
    )
    submit.add_argument("job")
    submit.add_argument("preset")
    submit.add_argument("--address", default="", help="URL of the head's dashboard")
    submit.add_argument(
        "--detach", action="store_true", help="print the job's name and leave it running"
    )
    submit.add_argument(
        "--max-package-mib",
        type=float,
        default=LIMIT_BYTES / 2**20,
        help="most code and other files that may be shipped (%(default)g)",
    )
    stop = commands.add_parser("stop", help="end a submitted job as Ctrl-C would")
    stop.add_argument("name", help="as `rayloop submit` and `rayloop status` print it")
    stop.add_argument("--address", default="", help="URL of the head's dashboard")


def run_submit(chosen: argparse.Namespace, words: list[str]) -> NoReturn:
    """Submit a job, follow it, and end as it ends."""
    root = Path.cwd()
    load_preset(chosen.preset)
    script = job_script(root, chosen.job)
    home = os.environ.get("RAYLOOP_HOME", "")
    package = collect(
        root,
        home=Path(home) if home and "://" not in home else None,
        limit_bytes=round(chosen.max_package_mib * 2**20),
    )
    cluster = open_cluster(chosen.address)
    versions = library_versions()
    refuse_versions(versions, cluster.versions())
    submission = compose(
        script,
        [chosen.preset, *words],
        environment=os.environ,
        folder=root,
        is_here=_is_here(cluster),
        package_digest=package.digest(),
        versions=versions,
        commit=_commit(),
    )
    name = _started(cluster, submission, package)
    if chosen.detach:
        log.info("rayloop submit with the same words follows it, rayloop stop %s ends it", name)
        print(name, flush=True)
        raise SystemExit(0)
    _end_as(cluster, name)


def _started(cluster: "Cluster", submission: Submission, package: Package) -> str:
    """`start`, after which no job is left where a signal came in the middle of it."""
    asked: list[str] = []
    with sigterm_raises():
        try:
            return start(cluster, submission, package, asked)
        except (KeyboardInterrupt, SystemExit):
            for name in asked:
                with contextlib.suppress(RayloopError):
                    cluster.stop(name)
            raise


def start(cluster: "Cluster", submission: Submission, package: Package, asked: list[str]) -> str:
    """Start the job, or find the one that runs; gives its name.

    The cluster keeps one job of a name, so of two commands at the same moment one starts it.

    Args:
        cluster: Where.
        submission: What.
        package: Its files.
        asked: Gets the name that the cluster may have been asked to start.
    """
    for attempt in range(1, 10_000):
        name = submission.name(attempt)
        found = cluster.find(name)
        if found is None:
            asked[:] = [name]
            megabytes = package.num_bytes / 2**20
            if cluster.submit(submission, name, package):
                log.info("job %s (%.1f MiB of code) on %s", name, megabytes, cluster.address)
                return name
            found = cluster.find(name)
            asked.clear()  # somebody else started it
        if found is not None and found.status in RUNNING:
            log.info("job %s runs already on %s; following it", name, cluster.address)
            return name
    raise RequestError(f"{submission.key} was submitted 10,000 times; delete old jobs.")


def run_stop(chosen: argparse.Namespace, _: list[str]) -> None:
    """End a job."""
    if not chosen.name:
        raise RequestError("The job's name is empty; rayloop status lists those that run.")
    cluster = open_cluster(chosen.address)
    if cluster.find(chosen.name) is None:
        names = [job.name for job in cluster.jobs() if job.status in RUNNING]
        raise RequestError(
            f"{cluster.address} has no job {chosen.name!r}; "
            f"{'running are ' + ', '.join(names) if names else 'no job runs there'}."
        )
    stopped = cluster.stop(chosen.name)
    log.info("%s %s", chosen.name, "is told to stop" if stopped else "has ended already")


def open_cluster(given: str) -> "Cluster":
    """The cluster meant by `--address`, the environment or `rayloop up`.

    Raises:
        RequestError: Nothing answers, or the token is refused.
    """
    note = local.note()
    local_url = note["dashboard_url"] if note else ""
    url = cluster_address(given, os.environ, local_url)
    use_token(local.token_file() if url == local_url else None, os.environ)
    from rayloop.submit.client import Cluster  # noqa: PLC0415  imports Ray, which reads the token

    return Cluster(url)


def _is_here(cluster: "Cluster") -> bool:
    """Whether every node of the cluster is this machine.

    A node that joined a moment ago has told its name to the head, and nothing else yet.
    """
    hosts = {node["raylet"].get("nodeManagerHostname") for node in cluster.nodes()
             if node["raylet"].get("state", "ALIVE") == "ALIVE"}  # fmt: skip
    return hosts == {os.uname().nodename}


def _commit() -> str:
    version = code_version()
    return version.commit + (CHANGES if version.commit and version.has_changes else "")


def _end_as(cluster: "Cluster", name: str) -> NoReturn:
    from rayloop.submit.follow import Stopper, follow  # noqa: PLC0415

    def warn(text: str) -> None:
        log.warning("%s: %s", name, text)

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends this command at once
        log.info("stopping %s", name)
        stopper.start()

    stopper = Stopper(lambda: cluster.stop(name), warn)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        code, last = follow(
            stream=lambda: cluster.log_stream(name),
            look=lambda: cluster.find(name),
            tell=lambda line: print(line, flush=True),
            warn=warn,
        )
    except WorkError as error:
        if stopper.is_owed:
            raise WorkError(
                f"{error} It has not heard that it is to stop: rayloop stop {name}."
            ) from None
        raise
    if last is not None:
        print(last, flush=True)
    sys.stdout.flush()
    raise SystemExit(code)
