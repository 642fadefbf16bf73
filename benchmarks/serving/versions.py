"""What several versions, a shadow and events cost: each beside the same server without them.

    python benchmarks/serving/versions.py
    python benchmarks/serving/versions.py --repeats 5 --seconds 8

Versions and shadow are switched on and off in one running server, by its traffic plan, in turns;
events need a server of their own, in turns as well. Throughput is a closed loop with 16
connections; the shadow's p99 is taken open loop, at half of the capacity. The time from a new plan
to its effect is measured from the end of the write to the first look at which every replica
follows.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from common import check_answers, demo_model, keep, noise, parser, prepare, say
from load import closed, open_loop, poisson
from servers import Model, Running, serving

SERVERS = ("rayloop-registered", "rayloop-events")
VERSIONS = 3
PLANS = {
    "one": ({"1": 1.0}, ()),
    "three": ({"1": 0.8, "2": 0.1, "3": 0.1}, ()),
    "shadow": ({"1": 1.0}, ("2",)),
}


def registered(model: Model, root: Path) -> Any:
    """A root with several versions of one file, that differ in a comment; gives its steering."""
    import io

    import numpy as np

    from rayloop.clock import SYSTEM_CLOCK
    from rayloop.config import RegistryConfig
    from rayloop.registry.release import ReleaseRecord
    from rayloop.registry.store import open_registry
    from rayloop.serve.engine import OnnxEngine
    from rayloop.serve.steer import Steering
    from rayloop.storage import Storage

    storage = Storage(str(root))
    registry = open_registry(storage, RegistryConfig(), SYSTEM_CLOCK)
    rows = noise(model.shape, 4, 0)
    for number in range(1, VERSIONS + 1):
        graph = onnx.load(model.path)
        graph.doc_string = f"version {number}"
        content = graph.SerializeToString()
        buffer = io.BytesIO()
        np.savez(buffer, images=rows, probabilities=OnnxEngine(content).predict(rows))
        digest, golden = hashlib.sha256(content).hexdigest(), buffer.getvalue()
        assert registry.reserve("classifier", digest, "benchmark", "") == str(number)
        record = ReleaseRecord(
            model="classifier", version=str(number), created_at="", artifact="model.onnx",
            artifact_digest=digest, method="int8_static",
            class_names=tuple(str(index) for index in range(model.classes)), shape=model.shape,
            run_id="", checkpoint_digest="", dataset={}, config_digest="", config={}, metrics={},
            gates=(), profile={}, cpu_features=(), reduce_range=False, packages={},
            golden={"file": "golden.npz", "digest": hashlib.sha256(golden).hexdigest()},
        )  # fmt: skip
        folder = f"models/classifier/{number}"
        storage.write(f"{folder}/model.onnx", content)
        storage.write(f"{folder}/golden.npz", golden)
        storage.write_json(f"{folder}/release.json", record.to_json())
    registry.move_alias("classifier", "champion", "1")
    return Steering(storage, registry, "classifier", SYSTEM_CLOCK, by="benchmark")


def change(running: Running, steering: Any, name: str) -> float:
    """Put one of `PLANS` in force; seconds until every replica follows."""
    from rayloop.cli.running import wait_in_force

    shares, shadows = PLANS[name]
    plan = steering.split(shares, shadows=shadows, why=name)
    start = time.monotonic()
    wait_in_force(f"http://127.0.0.1:{running.port}", plan.number)
    return time.monotonic() - start


def alternate(running: Running, steering: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Throughput of one and of three versions, and p99 with and without a shadow, in turns."""
    closed(running, 16, 3.0)
    rate = 0.5 * closed(running, 16, 4.0).requests_per_s
    found: dict[str, list[float]] = {name: [] for name in ("one", "three", "plain", "shadow")}
    changes = []
    for repeat in range(arguments.repeats):
        for name in ("one", "three") if repeat % 2 else ("three", "one"):
            changes.append(change(running, steering, name))
            closed(running, 16, 0.5)
            found[name].append(closed(running, 16, arguments.seconds).requests_per_s)
        for name in ("plain", "shadow") if repeat % 2 else ("shadow", "plain"):
            changes.append(change(running, steering, "one" if name == "plain" else name))
            time.sleep(3.0)  # the shadow's process starts
            one = open_loop(running, poisson(rate, arguments.seconds, repeat))
            found[name].append(one.percentile_ms(99))
        say(f"{ {name: round(values[-1], 2) for name, values in found.items()} }")
    return {
        "three_per_one": ratios(found["three"], found["one"]),
        "shadow_p99_per_plain": ratios(found["shadow"], found["plain"]),
        "p99_ms": {name: found[name] for name in ("plain", "shadow")},
        "requests_per_s": {name: found[name] for name in ("one", "three")},
        "rate": rate,
        "change_s": changes,
        "longest_change_s": max(changes),
    }


def ratios(one: list[float], other: list[float]) -> dict[str, float]:
    """Of the pairs of one round each."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return {
        "mean": statistics.fmean(found),
        "median": statistics.median(found),
        "stdev": spread,
        "n": len(found),
    }


def measure(arguments: argparse.Namespace, model: Model) -> dict[str, list[dict[str, Any]]]:
    """Results by server."""
    with tempfile.TemporaryDirectory(prefix="rayloop-versions-") as folder:
        os.environ["BENCH_HOME"] = folder
        steering = registered(model, Path(folder))
        with serving("rayloop-registered", model, arguments.peers, arguments.settings) as running:
            check_answers(running, 1)
            result = alternate(running, steering, arguments)
        say(
            f"three versions {result['three_per_one']}, shadow {result['shadow_p99_per_plain']}, "
            f"longest change {result['longest_change_s']:.2f} s"
        )
        rates: dict[str, list[float]] = {name: [] for name in SERVERS}
        steering.split({"1": 1.0}, shadows=())
        for repeat in range(arguments.repeats):
            for name in SERVERS if repeat % 2 else SERVERS[::-1]:
                with serving(name, model, arguments.peers, arguments.settings) as running:
                    closed(running, 16, 2.0)
                    rates[name].append(closed(running, 16, arguments.seconds).requests_per_s)
            say(f"{ {name: round(values[-1]) for name, values in rates.items()} }")
        result["events_per_none"] = ratios(rates["rayloop-events"], rates["rayloop-registered"])
        result["events_requests_per_s"] = rates
        say(f"events {result['events_per_none']}")
    return {"rayloop": [result]}


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=6.0)
    arguments = flags.parse_args()
    prepare()
    keep(arguments.out, "versions", arguments, measure(arguments, demo_model(arguments.model)))


if __name__ == "__main__":
    main()
