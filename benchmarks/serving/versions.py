"""What several versions, a shadow and events cost: each beside the same server without them.

    python benchmarks/serving/versions.py
    python benchmarks/serving/versions.py --repeats 5 --seconds 8

All of it is switched on and off in one running server, in turns: versions and shadow by its
traffic plan, events by a file that the benchmark's server looks for. Throughput is a closed loop
with 16 connections, and beside it stands the server's CPU time a request, which other work on the
machine disturbs less. The shadow's p99 is taken open loop, at half of the capacity. The time from a
new plan to its effect is measured from the end of the write to the first look at which every
replica follows.
"""

import argparse
import datetime
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from common import (
    HERE,
    check_answers,
    demo_model,
    keep,
    machine,
    mean_and_spread,
    noise,
    order,
    parser,
    prepare,
    say,
)
from load import closed, open_loop, poisson
from servers import Model, Running, serving

SERVERS = ("rayloop-registered",)
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
    from rayloop.serve.traffic.steer import Steering
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


def alternate(
    running: Running, steering: Any, root: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of each kind, in turns that go forwards and backwards."""
    closed(running, 16, 3.0)
    rate = 0.5 * closed(running, 16, 4.0).requests_per_s
    rates: dict[str, list[float]] = {}
    cpu_ms: dict[str, list[float]] = {}
    p99_ms: dict[str, list[float]] = {}
    changes = []
    for repeat in range(arguments.repeats):
        for name in order(("one", "three", "events"), repeat):
            changes.append(change(running, steering, "one" if name == "events" else name))
            with events_on(root, name == "events"):
                closed(running, 16, 0.5)
                one = closed(running, 16, arguments.seconds)
            rates.setdefault(name, []).append(one.requests_per_s)
            cpu_ms.setdefault(name, []).append(one.cpu_ms)
        for name in order(("one", "shadow"), repeat):
            changes.append(change(running, steering, name))
            wait_for_shadows(running)
            p99_ms.setdefault(name, []).append(
                open_loop(running, poisson(rate, arguments.seconds, repeat)).percentile_ms(99)
            )
        last = {**rates, **{f"p99 {name}": values for name, values in p99_ms.items()}}
        say(", ".join(f"{name} {values[-1]:.1f}" for name, values in last.items()))
    return {
        "three_per_one": ratios(rates["three"], rates["one"]),
        "three_per_one_cpu": ratios(cpu_ms["three"], cpu_ms["one"]),
        "events_per_none": ratios(rates["events"], rates["one"]),
        "events_per_none_cpu": ratios(cpu_ms["events"], cpu_ms["one"]),
        "shadow_p99_per_none": ratios(p99_ms["shadow"], p99_ms["one"]),
        "requests_per_s": rates,
        "cpu_ms": cpu_ms,
        "p99_ms": p99_ms,
        "rate": rate,
        "longest_change_s": max(changes),
    }


def wait_for_shadows(running: Running) -> None:
    """Wait until each shadow has compared something, which its process must start for."""
    from rayloop.cli.running import ask

    url = f"http://127.0.0.1:{running.port}"
    while True:
        closed(running, 1, 0.5)
        shadows = [shadow for replica in ask(url) for shadow in replica["shadows"]]
        if all(shadow["compared"] for shadow in shadows):
            return


@contextmanager
def events_on(root: Path, wanted: bool) -> Iterator[None]:
    """Let the server make events while the context lasts, or not."""
    switch = root / "on"
    if wanted:
        switch.touch()
    time.sleep(0.3)
    yield
    switch.unlink(missing_ok=True)


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
        steering.opening("@champion")
        with serving("rayloop-registered", model, arguments.peers, arguments.settings) as running:
            check_answers(running, 1)
            result = alternate(running, steering, Path(folder), arguments)
    for name, value in result.items():
        if "_per_" in name:
            say(f"{name}: {value}")
    return {"rayloop": [result]}


CLAIMS = (
    ("three_per_one", "throughput of three versions (0.8, 0.1, 0.1) / of one", ">= 0.95"),
    ("three_per_one_cpu", "server CPU time a request, three versions / one", ""),
    ("events_per_none", "throughput with events / without", ">= 0.97"),
    ("events_per_none_cpu", "server CPU time a request, with events / without", ""),
    ("shadow_p99_per_none", "p99 with a shadow of all requests / without, half load", "<= 1.1"),
)


def page(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The result file."""
    where = machine()
    lines = [
        "# Versions in traffic: what they cost",
        "",
        f"{where['cores']} cores of {where['cpu']}, Linux {where['kernel']}, commit "
        f"{where['commit']}, {where['utc']}. One replica of one engine thread; client and server "
        f"share the cores. Ratios are of rounds of {arguments.seconds:g} s side by side in one "
        "running server.",
        "",
        "| what | goal | median | mean ± standard deviation | n |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, what, goal in CLAIMS:
        one = result[key]
        spread = f"{one['mean']:.3f} ± {one['stdev']:.3f}"
        lines.append(f"| {what} | {goal} | {one['median']:.3f} | {spread} | {one['n']} |")
    changes = result["longest_change_s"]
    lines.append(f"| a new plan in force in every replica, longest, s | <= 1 | {changes:.2f} | | |")
    lines += [
        "",
        f"The shadow's rounds are open loop at {result['rate']:.0f} requests a second:",
        "",
    ]
    for name, values in result["p99_ms"].items():
        lines.append(f"- p99 in ms, {name}: {', '.join(f'{value:.1f}' for value in values)}")
    rates = ", ".join(
        f"{name} {mean_and_spread(values)}" for name, values in result["requests_per_s"].items()
    )
    lines += ["", f"Requests a second, closed loop with 16 connections: {rates}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=6.0)
    today = datetime.date.today().isoformat()
    flags.add_argument("--target", type=Path, default=HERE / f"VERSIONS_cpu_{today}.md")
    arguments = flags.parse_args()
    prepare()
    found = measure(arguments, demo_model(arguments.model))
    keep(arguments.out, "versions", arguments, found)
    arguments.target.write_text(page(found["rayloop"][0], arguments))


if __name__ == "__main__":
    main()
