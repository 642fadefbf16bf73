"""The local commands of docs/operations.md, in their order, as a user types them into one shell."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayloop.ports import free_port
from tests.e2e.conftest import LONG, ROOT, environment
from tests.pages import blocks

PAGE = (ROOT / "docs" / "operations.md").read_text()
LONGEST_S = 540


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A copy of the repository, of which no Ray is left over in the end."""
    folder = tmp_path / "rayloop"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent, target_is_directory=True)
    yield folder
    subprocess.run(
        [Path(sys.executable).with_name("rayloop"), "down"],
        cwd=folder, env=environment(tmp_path / "home"), check=True, timeout=60,
    )  # fmt: skip


@LONG
def test_the_local_commands_work_one_after_the_other(checkout: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ports = {"HTTP_PORT": free_port("127.0.0.1"), "GRPC_PORT": free_port("127.0.0.1")}
    env = environment(home) | {name: str(port) for name, port in ports.items()}
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    typed = "".join(blocks(PAGE, "sh", "local"))
    assert {"rayloop up", "rayloop down"} <= set(typed.splitlines())
    script = f"PS4='+ $SECONDS s: '\n{typed}"
    log = tmp_path / "log"
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=checkout, env=env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(timeout=LONGEST_S)
            left = [told for process in psutil.process_iter() if (told := _of(process, checkout))]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    told = log.read_text()
    assert code == 0, told[-6000:]
    assert "run first is finished already; nothing was trained" in told
    assert '{"ready": true}' in told
    assert "Every row" in told or "beyond what was measured" in told
    assert left == []
    assert not (home / "local" / "ray.json").exists()
    assert json.loads((home / "runs" / "first" / "result.json").read_text())["run_id"] == "first"


def _of(process: psutil.Process, folder: Path) -> str:
    """The command line of a process that works in a folder; empty for any other."""
    try:
        is_there = process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder
        return " ".join(process.cmdline()) if is_there else ""
    except (psutil.Error, OSError):
        return ""
