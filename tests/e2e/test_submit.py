"""Jobs submitted to a Ray of their own are the jobs run by hand: one result, one log, one end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import LONG, ROOT, Done, environment, run, run_job

RAYLOOP = str(Path(sys.executable).with_name("rayloop"))
RAY = str(Path(sys.executable).with_name("ray"))
TRAIN = ["--train.epochs", "2", "--train.floor_epochs", "0"]


def environment_without_path(home: Path) -> dict[str, str]:
    """As of a user who has not activated the environment."""
    folder = str(Path(sys.executable).parent)
    kept = environment(home)
    parts = [part for part in kept["PATH"].split(os.pathsep) if part != folder]
    return {**kept, "PATH": os.pathsep.join(parts)}


def rayloop(home: Path, *words: str, timeout_s: float = 240, **env: str) -> Done:
    return run([RAYLOOP, *words], {**environment_without_path(home), **env}, timeout_s)


@pytest.fixture(scope="module")
def home(data_home: Path) -> Path:
    return data_home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """The dashboard of a Ray that `rayloop up` started; `rayloop down` must leave nothing."""
    up = rayloop(home, "up")
    assert up.returncode == 0, up.stderr
    note = json.loads((home / "local" / "ray.json").read_text())
    try:
        yield note["dashboard_url"]
    finally:
        down = rayloop(home, "down")
        assert down.returncode == 0, down.stderr
        left = subprocess.run(
            ["pgrep", "-f", f"gcs.*{note['gcs_port']}"], capture_output=True, text=True, check=False
        )
        assert left.stdout == ""
        assert not Path(note["scratch"]).exists()


@pytest.fixture(scope="module")
def by_hand(home: Path) -> str:
    """The digest of the model that the same words train without a cluster."""
    done = run_job(home, "jobs/train.py", "smoke", *TRAIN, "--run-id", "by-hand")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.last_line["checkpoint_digest"]


def test_a_submitted_job_gives_the_same_model_and_the_same_last_line(home, url, by_hand):
    done = rayloop(home, "submit", "train", "smoke", *TRAIN, "--run-id", "submitted")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.last_line["checkpoint_digest"] == by_hand
    assert (home / "runs" / "submitted" / "result.json").is_file()
    assert "epoch" in done.stdout
    shown = json.loads(rayloop(home, "runs", "show", "submitted", "--json").stdout)
    words = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown["commit"][:7] == head[:7]


@LONG
def test_rays_own_command_gives_it_too(home, url, by_hand):
    env = environment_without_path(home)
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "local" / "auth_token")}
    words = [
        "--address",
        url,
        "--working-dir",
        ".",
        "--",
        "python",
        "jobs/train.py",
        "smoke",
        *TRAIN,
    ]
    done = run([RAY, "job", "submit", *words, "--run-id", "by-ray"], env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((home / "runs/by-ray/result.json").read_text())["checkpoint_digest"] == (
        by_hand
    )


WHO = """
from rayloop import __version__, cluster
from rayloop.jobs_entry import run_job
from rayloop.presets import smoke

def main():
    with cluster.connect(smoke().cluster):
        import ray
        def version():
            import rayloop
            return rayloop.__version__
        return {"driver": __version__, "worker": ray.get(ray.remote(version).remote())}

if __name__ == "__main__":
    run_job(main)
"""


@pytest.mark.parametrize("command", ["rayloop", "ray"])
def test_driver_and_workers_run_the_code_that_was_shipped(home, url, tmp_path, command):
    """The nodes have another one installed."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "platform", checkout / "platform")
    (checkout / "platform" / "rayloop" / "__init__.py").write_text('__version__ = "9.9.shipped"')
    (checkout / "jobs").mkdir()
    (checkout / "jobs" / "who.py").write_text(WHO)
    env = environment_without_path(home)
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "local" / "auth_token")}
    words = [RAYLOOP, "submit", "--address", url, "who", "smoke"]
    if command == "ray":
        words = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--",
                 "python", "jobs/who.py", "smoke"]  # fmt: skip
    done = subprocess.run(
        words, cwd=checkout, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(told) == {"driver": "9.9.shipped", "worker": "9.9.shipped"}


def test_a_request_that_is_wrong_ends_as_it_does_by_hand(home, url):
    done = rayloop(home, "submit", "train", "smoke", "--train.epoch", "3")
    assert done.returncode == 2
    assert "--train.epoch" in done.stdout and "Traceback" not in done.stdout + done.stderr
    done = rayloop(home, "submit", "train", "gpu", "--data.source", "digits")
    assert done.returncode == 2
    assert "needs 1 GPUs; the cluster has" in done.stdout


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    """A submission that is followed until it says that epochs pass."""
    return subprocess.Popen(
        [RAYLOOP, "submit", "train", "smoke", *words], cwd=ROOT,
        env=environment_without_path(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def read_until(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout
    for line in child.stdout:
        if word in line:
            return
    raise AssertionError(f"it ended without {word!r}: {child.stderr and child.stderr.read()}")


def test_a_retry_follows_the_job_that_runs_and_ctrl_c_stops_it(home, url, by_hand):
    words = ["--train.epochs", "4000", "--train.floor_epochs", "0", "--run-id", "long"]
    first = start(home, *words)
    try:
        read_until(first, "epoch")
        first.kill()  # as when a laptop dies; the job goes on
        second = start(home, *words)
        read_until(second, "epoch")
        jobs = json.loads(rayloop(home, "status", "--json").stdout)["cluster"]["jobs"]
        assert [job["status"] for job in jobs if job["name"].startswith("train-smoke")].count(
            "RUNNING"
        ) == 1
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=60) == 143
    finally:
        for child in (first, second):
            child.kill()
            child.communicate()
    deadline = time.monotonic() + 30
    while not _is_marked_ended(home, "long"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _is_marked_ended(home: Path, run_id: str) -> bool:
    """Whether the run is not told to be still under way."""
    shown = rayloop(home, "runs", "--json").stdout
    return all(run["status"] != "RUNNING" for run in json.loads(shown) if run["run_id"] == run_id)


def test_a_detached_job_is_stopped_by_its_name(home, url):
    words = ["--train.epochs", "4000", "--train.seed", "5", "--train.floor_epochs", "0"]
    done = rayloop(home, "submit", "train", "smoke", *words, "--detach")
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    unknown = rayloop(home, "stop", "nobody")
    assert unknown.returncode == 2 and name in unknown.stderr
    assert rayloop(home, "stop", name).returncode == 0
    followed = rayloop(home, "submit", "train", "smoke", *words, "--detach")
    if followed.stdout.strip() != name:  # it had ended already, and was started anew
        rayloop(home, "stop", followed.stdout.strip())


@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_token_that_is_wrong_or_missing_is_told_at_once(home, url, tmp_path, token):
    env = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "0" * 64} if token else {"HOME": str(tmp_path)}
    done = rayloop(tmp_path, "submit", "train", "smoke", "--address", url, **env)
    assert done.returncode == 2
    assert ("refuses the token" if token else "wants a token") in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nothing_answers_is_told_at_once(home, tmp_path):
    for address in ("http://127.0.0.1:9", "http://192.0.2.77:8265"):
        done = rayloop(tmp_path, "submit", "train", "smoke", "--address", address)
        assert done.returncode == 2
        assert f"There is no Ray at {address}" in done.stderr and "rayloop up" in done.stderr
