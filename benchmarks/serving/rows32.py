"""Images a second with 32 images in a request, beside the bare engine on the same cores.

    python benchmarks/serving/rows32.py

For each server the bare engine runs right before it: as many processes as the server has engines,
one thread each, batches of 32, no HTTP. Closed loop, four connections for each engine.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from common import check_answers, demo_model, figures, keep, order, parser, prepare, say
from load import closed
from servers import SERVERS as ALL
from servers import Model, environment, serving

SERVERS = ("rayloop", "rayloop-2", "fastapi", "litserve", "bentoml", "mlserver-batch")
ROWS = 32
BARE = """
import json, sys, time
import numpy as np
from engine import SHAPE, load
predict, rows, seconds = load(), int(sys.argv[1]), float(sys.argv[2])
images = np.random.default_rng(0).integers(0, 256, (rows, *SHAPE), dtype=np.uint8)
start, cpu, calls = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - start < seconds:
    predict(images)
    calls += 1
passed = time.perf_counter() - start
print(json.dumps({"images_per_s": calls * rows / passed,
                  "cpu_ms": (time.process_time() - cpu) * 1000 / calls}))
"""


def bare_engine(model: Model, engines: int, seconds: float) -> dict[str, float]:
    """Images a second of the engine alone, summed over processes that run at the same time."""
    server = ALL["rayloop"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, str(ROWS), str(seconds)], stdout=subprocess.PIPE,
            env=environment(server, model, 0, None), text=True,
        )
        for _ in range(engines)
    ]  # fmt: skip
    said = [json.loads(run.communicate()[0]) for run in runs]
    return {
        "images_per_s": sum(one["images_per_s"] for one in said),
        "cpu_ms": sum(one["cpu_ms"] for one in said) / engines,
    }


def measure(arguments: argparse.Namespace, model: Model) -> dict[str, list[dict[str, Any]]]:
    """Rounds by server."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.servers}
    for repeat in range(arguments.repeats):
        for name in order(arguments.servers, repeat):
            engines = ALL[name].workers
            bare = bare_engine(model, engines, arguments.seconds)
            with serving(name, model, arguments.peers, arguments.settings) as running:
                check_answers(running, ROWS)
                closed(running, 4 * engines, 1.0, ROWS)
                one = closed(running, 4 * engines, arguments.seconds, ROWS)
            images_per_s = one.requests_per_s * ROWS
            share = images_per_s / bare["images_per_s"]
            found[name].append(
                {**figures(one), "images_per_s": images_per_s, "bare": bare, "share": share}
            )
            say(f"{name}: {images_per_s:.0f} images/s, {share:.0%} of the bare engine")
    return found


def main() -> None:
    """Measure and keep."""
    arguments = parser(__doc__, SERVERS, seconds=6.0).parse_args()
    prepare()
    keep(arguments.out, "rows32", arguments, measure(arguments, demo_model(arguments.model)))


if __name__ == "__main__":
    main()
