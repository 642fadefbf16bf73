"""Training whose workers are killed: how long until the first new step, and what is it worth?

    .venv/bin/python benchmarks/recovery.py --kills 3 --every-s 40
    .venv/bin/python benchmarks/recovery.py --kills 5 --every-s 60 --epochs 10     # goodput

Runs `jobs/train.py laptop` as a user would and sends SIGKILL to one of its workers again and again.
The figures come from the run's own ledger: `restart` is the time from the last sign of life to the
first new step. Prints one JSON line. Needs the Fashion-MNIST dataset version.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from rayloop.storage import Storage, home

WORKER_NAME = "ray::RayTrainWorker"


def main() -> None:
    """Train, kill, and print what the ledger says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every-s", type=float, default=40.0)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    run_id = f"recovery-{int(time.time())}"
    words = [sys.executable, "jobs/train.py", "laptop", "--run-id", run_id]
    words += ["--train.epochs", f"{options.epochs}", "--train.max-failures", f"{options.kills + 1}"]
    words += ["--train.floor-epochs", "0"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    storage = Storage(home())
    wait_for_attempt(1, storage, run_id, job)
    began_at, before = time.monotonic(), cpu_of_others(job.pid)
    next_at = began_at + options.every_s
    platform_cores = 0.0
    for kill in range(options.kills):
        time.sleep(max(0.0, next_at - time.monotonic()))
        if kill == 0:
            used_s = sum(s - before.get(p, 0.0) for p, s in cpu_of_others(job.pid).items())
            platform_cores = round(used_s / (time.monotonic() - began_at), 4)
        workers = workers_of(job.pid)
        if not workers:
            job.wait()
            raise SystemExit(f"the job was over before kill {kill + 1}; give it more --epochs")
        victim = chance.choice(workers)
        os.kill(victim, signal.SIGKILL)
        print(f"killed worker process {victim}", file=sys.stderr)
        next_at = time.monotonic() + options.every_s
        wait_for_attempt(kill + 2, storage, run_id, job)
    out, _ = job.communicate()
    if job.returncode != 0:
        raise SystemExit(f"the job ended with {job.returncode}")
    result = json.loads(out.splitlines()[-1])
    told = figures(result, storage.read_json(f"runs/{run_id}/ledger.json"))
    print(json.dumps({**told, "platform_cores": platform_cores}))


def figures(result: dict[str, Any], journal: dict[str, Any]) -> dict[str, Any]:
    """What the table asks for."""
    ledger, starts = result["ledger_s"], result["interruptions"]
    return {
        "interruptions": starts,
        "restart_s_mean": round(ledger["restart"] / max(1, starts), 2),
        "lost_steps": result["lost_steps"],
        "goodput": result["goodput"],
        "ledger_s": ledger,
        "sessions": len(journal["sessions"]),
        "test_accuracy": result["test_accuracy"],
        "checkpoint_digest": result["checkpoint_digest"],
    }


def wait_for_attempt(
    number: int, storage: Storage, run_id: str, job: subprocess.Popen[str]
) -> None:
    """Return once so many starts of the workers have done a step, by the run's ledger."""
    path = Path(storage.path("runs", run_id, "ledger.json"))
    while attempts(path) < number and job.poll() is None:
        time.sleep(0.2)


def attempts(path: Path) -> int:
    """Starts of the workers that have done a step so far."""
    if not path.exists():
        return 0
    sessions = json.loads(path.read_bytes())["sessions"]
    return sum(bool(a.get("first_step_at")) for s in sessions for a in s["attempts"])


def workers_of(pid: int) -> list[int]:
    """Process ids of the Ray Train workers among a process's descendants."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return sorted(p for p, name in names.items() if name.startswith(WORKER_NAME) and descends(p))


def cpu_of_others(pid: int) -> dict[int, float]:
    """Processor seconds of a run's processes so far, without its workers."""
    used: dict[int, float] = {}
    job = psutil.Process(pid)
    for process in (job, *job.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            if not " ".join(process.cmdline()).startswith(WORKER_NAME):
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
    return used


if __name__ == "__main__":
    main()
