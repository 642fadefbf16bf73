"""What the scenarios share: their flags, the model they serve, and figures with their spread."""

import argparse
import datetime
import io
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from load import Round, sender
from processes import adopt_orphans
from servers import SERVERS, Model, Running, ask
from wire import noise, probabilities, request_bytes

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
DEFAULT_PEERS = Path(tempfile.gettempdir()) / "rayloop-peers"
TOLERANCE = 1e-5


def parser(document: str | None, servers: Sequence[str], seconds: float) -> argparse.ArgumentParser:
    """The flags every scenario has.

    Args:
        document: Docstring of the scenario.
        servers: Which ones it measures unless told otherwise.
        seconds: Length of one round.
    """
    made = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--servers", nargs="+", default=list(servers), choices=list(SERVERS))
    made.add_argument("--repeats", type=int, default=5, help="rounds of each server, alternating")
    made.add_argument("--seconds", type=float, default=seconds, help="length of one round")
    made.add_argument(
        "--peers", type=Path, default=DEFAULT_PEERS, help="environments made by peers.py"
    )
    made.add_argument("--model", type=Path, help="ONNX file; default: see demo_model()")
    made.add_argument(
        "--settings", type=json.loads, default={}, help="ServeConfig fields of rayloop, as JSON"
    )
    made.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "rayloop-serving-results",
        help="folder for the raw figures, which report.py reads",
    )  # fmt: skip
    return made


def prepare() -> None:
    """Take care that every server started here can be counted and ended."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sender()


def noop_model() -> Model:
    """The engine that only makes zeros."""
    return Model(path="noop", shape=(28, 28, 1), classes=10)


def demo_model(path: Path | None) -> Model:
    """The demo's INT8 net: a given file, or the newest version under RAYLOOP_HOME, or a stand-in.

    The stand-in is the `laptop` preset's architecture with untrained weights, quantized like the
    demo's, since weights do not change the time of a dense net.
    """
    if path is None:
        found = sorted((home() / "models" / "classifier").glob("*/model.onnx"))
        path = found[-1] if found else stand_in(home().parent / "rayloop-stand-in.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    height, width, channels = session.get_inputs()[0].shape[1:]
    classes = session.run(None, {"image": np.zeros((1, height, width, channels), np.uint8)})[0]
    return Model(
        path=str(path.resolve()), shape=(height, width, channels), classes=classes.shape[1]
    )


def home() -> Path:
    """Where results live."""
    return Path(os.environ.get("RAYLOOP_HOME", REPOSITORY / ".rayloop"))


def stand_in(target: Path) -> Path:
    """Write the `laptop` preset's net, untrained and quantized, and give its path."""
    from rayloop.models.zoo import build_classifier
    from rayloop.presets import laptop
    from rayloop.quantize.cpu import cpu_features, needs_reduced_range
    from rayloop.quantize.export import export_onnx
    from rayloop.quantize.methods import StaticQuantizer

    shape = (28, 28, 1)
    target = Path(tempfile.mkdtemp(prefix="bench-model-")) / target.name
    fp32 = target.with_suffix(".fp32.onnx")
    export_onnx(build_classifier(laptop().model, shape, 10, (0.5,), (0.25,), seed=0).eval(), fp32)
    StaticQuantizer(
        fp32=fp32, rows=noise(shape, 256, 0), cache=target.with_suffix(".json"),
        reduce_range=needs_reduced_range(cpu_features()),
    ).write(target)  # fmt: skip
    return target


def check_answers(running: Running, rows: int) -> None:
    """Compare answers with the engine's own; a fast wrong server must not win.

    Raises:
        RuntimeError: They differ.
    """
    import onnxruntime

    model = running.model
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    for seed in range(3):
        request = request_bytes(running.server.wire, running.port, model.shape, rows, seed)
        found = probabilities(running.server.wire, ask(running.port, request), model.classes)
        wanted = session.run(None, {"image": noise(model.shape, rows, seed)})[0]
        if found.shape != wanted.shape or np.abs(found - wanted).max() > TOLERANCE:
            raise RuntimeError(f"{running.name} answers wrongly")


def figures(one: Round) -> dict[str, Any]:
    """What is kept of a round."""
    statuses, counts = np.unique(one.records["status"], return_counts=True)
    return {
        "requests": len(one.records),
        "requests_per_s": one.requests_per_s,
        "cpu_ms": one.cpu_ms,
        "client_cpu_ms": one.client_cpu_ms,
        "p50_ms": one.percentile_ms(50),
        "p99_ms": one.percentile_ms(99),
        "memory_mb": one.after.memory_mb,
        "statuses": {str(s): int(c) for s, c in zip(statuses, counts, strict=True)},
        "cpu_ms_by_process": {name: ms for name, ms in one.cpu_by_name().items() if ms > 0.0005},
        "load_average": os.getloadavg()[0],
    }


def order(servers: Sequence[str], repeat: int) -> list[str]:
    """Forwards in even repeats, backwards in odd ones, so that drift hits all alike."""
    return list(servers) if repeat % 2 == 0 else list(reversed(servers))


def mean_and_spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`."""
    if not values:
        return "none"
    spread = f" ± {short(statistics.stdev(values))}" if len(values) > 1 else ""
    return short(statistics.fmean(values)) + spread


def short(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def keep(out: Path, scenario: str, arguments: argparse.Namespace, result: Any) -> None:
    """Write a scenario's figures with the machine and versions they belong to."""
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "scenario": scenario,
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "machine": machine(),
        "how": {name: SERVERS[name].how for name in arguments.servers},
        "result": result,
    }
    (out / f"{scenario}.json").write_text(json.dumps(document, indent=1))
    print(f"wrote {out / scenario}.json", file=sys.stderr)


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    cpu = platform.processor()
    for line in io.StringIO(Path("/proc/cpuinfo").read_text()):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    import rayloop

    code = str(Path(rayloop.__file__).parent)
    head = _git(code, "rev-parse", "--short", "HEAD") or "unknown"
    changed = " with local changes" if _git(code, "status", "--porcelain", ".") else ""
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": head + changed,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
    }


def _git(folder: str, *command: str) -> str:
    done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    return done.stdout.strip()


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)
