"""From `rayloop submit` to the first line of the job, on one machine.

    .venv/bin/python benchmarks/submit_overhead.py --repeats 5

Starts a Ray with `rayloop up` in a home of its own, and stops it. Each repeat submits a training
run with a seed of its own, starts another by hand for comparison, and stops each at its first line.
Prints JSON.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rayloop.code_version import code_version

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FIRST_LINE = "rayloop.train model"
WORDS = ["smoke", "--train.epochs", "2000", "--train.floor_epochs", "0", "--train.seed"]


def seconds_until(words: list[str], line: str, env: dict[str, str]) -> float:
    """Seconds from the start of a command to a line it prints; the command is stopped then."""
    before = time.monotonic()
    child = subprocess.Popen(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    found = next((text for text in child.stdout if line in text), None)
    seconds = time.monotonic() - before
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=180)
    if found is None:
        raise SystemExit(f"{words} ended without {line!r}: {rest[-2000:]}")
    return seconds


def told(values: list[float]) -> dict[str, object]:
    """n, mean and spread (standard deviation), in seconds."""
    return {
        "n": len(values),
        "mean_s": round(statistics.mean(values), 2),
        "spread_s": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "largest_s": round(max(values), 2),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "RAYLOOP_HOME": home}
        run: Callable[..., object] = subprocess.run
        run([sys.executable, "jobs/prepare_data.py", "smoke"], cwd=ROOT, env=env, check=True)
        run([BIN / "rayloop", "up"], cwd=ROOT, env=env, check=True)
        try:
            submitted, by_hand = [], []
            for seed in map(str, range(repeats)):
                words = [str(BIN / "rayloop"), "submit", "train", *WORDS, seed]
                submitted.append(seconds_until(words, FIRST_LINE, env))
                words = [sys.executable, "jobs/train.py", *WORDS, f"1{seed}"]
                by_hand.append(seconds_until(words, FIRST_LINE, env))
        finally:
            run([BIN / "rayloop", "down"], cwd=ROOT, env=env, check=True)
    found = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "commit": code_version().commit[:7],
        "submitted": told(submitted),
        "by_hand": told(by_hand),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
