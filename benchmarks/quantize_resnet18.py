"""INT8 against fp32 on a network of ResNet-18's width: bytes, latency and throughput.

    python benchmarks/quantize_resnet18.py
    python benchmarks/quantize_resnet18.py --repeats 10 --side 64

Weights and images are random, since neither changes the time of a dense network; accuracy is
measured where there is a trained model, by jobs/quantize.py. Writes a result file beside itself.
"""

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from rayloop.clock import SYSTEM_CLOCK
from rayloop.cluster import machine_cores
from rayloop.config import ModelConfig
from rayloop.models.zoo import build_classifier
from rayloop.quantize.compare import batch_difference, measure_latency
from rayloop.quantize.cpu import cpu_features, needs_reduced_range
from rayloop.quantize.export import export_onnx
from rayloop.quantize.methods import StaticQuantizer, write_dynamic
from rayloop.quantize.session import open_session

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
METHODS = ("fp32", "int8_static", "int8_dynamic")
HERE = Path(__file__).parent
TARGET_RATIO, TARGET_SPEEDUP = 0.27, 3.0


def make_files(folder: Path, side: int) -> dict[str, Path]:
    """Export ResNet-18 for images of `side` pixels and write its INT8 forms."""
    model = build_classifier(
        ModelConfig(name="resnet18"), (side, side, 3), 10, (0.5,) * 3, (0.25,) * 3, seed=0
    )
    files = {name: folder / f"{name}.onnx" for name in METHODS}
    export_onnx(model.eval(), files["fp32"])
    reduce_range = needs_reduced_range(cpu_features())
    StaticQuantizer(
        fp32=files["fp32"],
        rows=images_of(64, side),
        reduce_range=reduce_range,
        cache=folder / "ranges.json",
    ).write(files["int8_static"])
    write_dynamic(files["fp32"], files["int8_dynamic"], reduce_range)
    return files


def images_of(count: int, side: int) -> np.ndarray:
    """Noise images, uint8 (count, side, side, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def measure(
    files: dict[str, Path], side: int, repeats: int, seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Median milliseconds of a call, one for each repeat, by method and batch size."""
    sessions = {name: open_session(path) for name, path in files.items()}
    medians: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for size in BATCH_SIZES:
            points = measure_latency(sessions, images_of(size, side), size, seconds, SYSTEM_CLOCK)
            for name, point in points.items():
                medians.setdefault((name, size), []).append(point.median_ms)
    return medians


def table(medians: dict[tuple[str, int], list[float]]) -> list[str]:
    """Rows of a Markdown table: mean and standard deviation of the medians."""
    lines = ["| batch | " + " | ".join(f"{name} ms" for name in METHODS)
             + " | int8_static images/s | speedup |", "|---" * (len(METHODS) + 3) + "|",
            ]  # fmt: skip
    for size in BATCH_SIZES:
        cells = [
            f"{statistics.mean(medians[name, size]):.2f} ± "
            f"{statistics.pstdev(medians[name, size]):.2f}"
            for name in METHODS
        ]
        int8 = statistics.mean(medians["int8_static", size])
        ratios = speedups(medians, size)
        lines.append(
            f"| {size} | {' | '.join(cells)} | {1000 * size / int8:.0f} | "
            f"{statistics.mean(ratios):.2f} ± {statistics.pstdev(ratios):.2f} |"
        )
    return lines


def speedups(medians: dict[tuple[str, int], list[float]], size: int) -> list[float]:
    """How many times faster static INT8 is than fp32, one figure for each repeat."""
    pairs = zip(medians["fp32", size], medians["int8_static", size], strict=True)
    return [slow / fast for slow, fast in pairs]


def report(
    files: dict[str, Path], medians: dict[tuple[str, int], list[float]], side: int, repeats: int
) -> str:
    """The result file's text, misses included."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    ratio = sizes["int8_static"] / sizes["fp32"]
    speedup = statistics.mean(speedups(medians, 1))
    changes = {
        name: batch_difference(open_session(path), images_of(48, side))
        for name, path in files.items()
    }
    verdict = {True: "met", False: "MISSED"}
    return "\n".join(
        [
            f"# INT8 against fp32, ResNet-18 width, {side}x{side}x3",
            "",
            f"- claim: at most {TARGET_RATIO:.0%} of fp32's bytes: {ratio:.1%}, "
            f"{verdict[ratio <= TARGET_RATIO]}",
            f"- claim: at least {TARGET_SPEEDUP:g} times faster than ONNX Runtime fp32 at batch 1: "
            f"{speedup:.2f}, {verdict[speedup >= TARGET_SPEEDUP]}",
            f"- bytes: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}",
            f"- largest change of a probability between alone and in a batch: {changes}",
            f"- machine: {machine_cores()} cores, {' '.join(cpu_features())}; 7-bit weights: "
            f"{needs_reduced_range(cpu_features())}; 1 engine thread; other work may share it",
            f"- software: Python {platform.python_version()}, "
            + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("onnxruntime", "torch")),
            f"- commit {commit()}; n = {repeats} repeats, each the median of all calls in its "
            "time, methods in turns; mean ± standard deviation over repeats",
            "- command: python benchmarks/quantize_resnet18.py",
            "",
            *table(medians),
            "",
        ]
    )


def commit() -> str:
    """The short hash of the checked-out commit."""
    words = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per method and batch size")
    parser.add_argument("--side", type=int, default=32)
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), words.side)
        medians = measure(files, words.side, words.repeats, words.seconds)
        text = report(files, medians, words.side, words.repeats)
    features = cpu_features()
    kind = "vnni" if not needs_reduced_range(features) else features[-1]
    today = datetime.datetime.now(datetime.UTC).date()
    name = f"quantize-resnet18_{machine_cores()}core-{kind}_{today}.md"
    (HERE / name).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
