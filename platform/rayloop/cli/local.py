"""`rayloop up` and `rayloop down`: one Ray on this machine, and exactly that one stopped again.

What was started is noted under the home, with a token that only this user can read.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from rayloop import cluster, haproxy
from rayloop.cli.ending import sigterm_raises
from rayloop.config import Config, ServeConfig
from rayloop.errors import RequestError, WorkError
from rayloop.logs import stage_logger
from rayloop.ports import free_port
from rayloop.presets import load_preset
from rayloop.storage import Storage, home

log = stage_logger("cluster")

HOST = "127.0.0.1"
DASHBOARD_PORT = 8265
STOP_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 20.0
JOB_STOP_WAIT_S = 30
"""How long a job that is stopped may take to end its run and its own processes."""

OTHER_RAYS = {
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH", *cluster.LOCAL_ENVIRONMENT,
}  # fmt: skip
"""Variables that lead to, or tell of, another Ray than the one started here."""

Document = dict[str, Any]


def folder() -> Path:
    """Where the note lies: under the home, or under `.rayloop` where the home is not a folder."""
    root = home()
    return Path(".rayloop" if "://" in root else root).resolve() / "local"


def token_file() -> Path:
    """The token of the Ray that `rayloop up` starts."""
    return folder() / "auth_token"


def note() -> Document | None:
    """What `rayloop up` started and is still there, or None."""
    file = folder() / "ray.json"
    if not file.is_file():
        return None
    found = _read(file)
    return found if found and _processes(found) else None


def run_up(_: argparse.Namespace, __: list[str]) -> None:
    """Start it."""
    found = note()
    if found:
        log.info("Ray runs already at %s (rayloop down stops it)", found["dashboard_url"])
        return
    ray = _ray()
    if (folder() / "ray.json").is_file():
        run_down(_, __)  # what an earlier one left
    config = load_preset("laptop")
    dashboard_port = free_port(HOST, DASHBOARD_PORT)
    started: Document = {
        "gcs_port": free_port(HOST),
        "dashboard_port": dashboard_port,
        "dashboard_url": f"http://{HOST}:{dashboard_port}",
        "scratch": tempfile.mkdtemp(prefix="rayloop-"),
    }
    with sigterm_raises():
        try:
            Storage(str(folder())).write_json("ray.json", started)
            _start(ray, started, config)
        except BaseException:
            run_down(_, __)  # half a Ray would be taken for a whole one
            raise
    log.info("Ray runs: %s", started["dashboard_url"])
    log.info(
        "rayloop submit JOB PRESET runs a job on it. For Ray's own commands: "
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%s RAY_API_SERVER_ADDRESS=%s",
        token_file(), started["dashboard_url"],
    )  # fmt: skip


def _start(ray: str, started: Document, config: Config) -> None:
    """Start the processes of a head, which go on when this one ends.

    Raises:
        WorkError: They did not all start.
    """
    done = subprocess.run(
        [
            ray, "start", "--head", f"--node-ip-address={HOST}",
            f"--port={started['gcs_port']}", f"--dashboard-host={HOST}",
            f"--dashboard-port={started['dashboard_port']}", "--disable-usage-stats",
            # Ray's own choice is always the same; jobs cannot start where another Ray has it.
            f"--dashboard-agent-listen-port={free_port(HOST)}",
            f"--num-cpus={cluster.offered_cpus(config.cluster)}",
        ],
        env=_environment(Path(started["scratch"]), config.serve),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise WorkError(f"Ray did not start: {(done.stderr or done.stdout).strip()[-1500:]}")


def run_down(_: argparse.Namespace, __: list[str]) -> None:
    """Stop it, and what it left."""
    file = folder() / "ray.json"
    if not file.is_file():
        log.info("rayloop up has started nothing here (%s)", folder())
        return
    found = _read(file)
    if found is None:
        file.unlink()
        raise WorkError(
            f"{file} is damaged, so what it told of is not known; it is removed now. Look for "
            "processes of Ray with `ps aux | grep gcs_server`."
        )
    stopped = _stop(found)
    shutil.rmtree(found["scratch"], ignore_errors=True)
    file.unlink()
    log.info("stopped %d processes of Ray", stopped)


def _stop(found: Document) -> int:
    """End the processes, asking first; gives how many there were."""
    processes = _processes(found)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    late = {process.pid: process for process in (*processes, *_processes(found))}
    for process in late.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(late.values(), timeout=KILL_TIMEOUT_S)
    if alive:
        raise WorkError(f"These processes of Ray do not end: {[p.pid for p in alive]}.")
    return len(processes)


def _read(file: Path) -> Document | None:
    """The note; None where there is none, or a damaged one."""
    try:
        found: Document = json.loads(file.read_text())
        return found if {"gcs_port", "dashboard_url", "scratch"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _environment(scratch: Path, serve: ServeConfig) -> dict[str, str]:
    """What Ray, and every job on it, finds in its environment."""
    kept = {name: value for name, value in os.environ.items() if name not in OTHER_RAYS}
    return {
        **cluster.SWITCHES,
        **haproxy.prepare(scratch, serve),
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_WAIT_S),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_own_token()),
        **kept,
        "RAYLOOP_HOME": home(),
        "RAYLOOP_SCRATCH": str(scratch),
        # `python` of a job is the one this command runs with, wherever it was called from.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _own_token() -> Path:
    """The token's file, made where there is none."""
    token = token_file()
    token.parent.mkdir(parents=True, exist_ok=True)
    if not token.is_file():
        handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(32))
    return token


def _processes(found: Document) -> list[Any]:
    """The processes of one Ray that live.

    Those that have its scratch folder in their environment and are told its port, and what they
    started. A port alone may be another Ray's by now.
    """
    mark = re.compile(rf"--(gcs_server_port=|(gcs-)?address=.*:){found['gcs_port']}")
    heads: dict[int, Any] = {}
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("RAYLOOP_SCRATCH") == found["scratch"]
            if is_ours and any(mark.fullmatch(word) for word in process.cmdline()):
                for one in (process, *process.children(recursive=True)):
                    heads[one.pid] = one
        except psutil.Error:
            continue
    return list(heads.values())


def _ray() -> str:
    """Ray's own command, beside this interpreter."""
    command = Path(sys.executable).with_name("ray")
    if not command.is_file():
        raise RequestError(f"There is no {command}; install ray[default] in this environment.")
    return str(command)
