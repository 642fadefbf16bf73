"""Figures of quantization and serving -> sections of the report."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rayloop.pipeline import page
from rayloop.pipeline.pictures import (
    confusion_picture,
    histogram_picture,
    image_png,
    latency_picture,
    pareto_picture,
    speed_front,
)
from rayloop.quantize.methods import FP32, INT8_STATIC
from rayloop.quantize.result import MethodRow, QuantizeResult

Images = npt.NDArray[np.uint8]

SHOWN_MISTAKES = 24


def confusion(quantized: QuantizeResult) -> str:
    """Which classes the INT8 model confuses: a picture, and its accuracy by class."""
    fp32, int8 = quantized.method(FP32), quantized.method(INT8_STATIC)
    rows = [
        (name, percent(fp32.class_accuracy[name]), percent(share), _points(share, fp32, name))
        for name, share in sorted(int8.class_accuracy.items(), key=lambda item: item[1])
    ]
    drawn = confusion_picture(quantized.confusion, quantized.class_names)
    classes = page.table(("class", "fp32", "INT8", "points"), rows)
    return page.section(
        "confusion",
        "Which classes are confused",
        f"Answers of the INT8 model to all {quantized.test_rows:,} test rows: counts, shaded by "
        "their share of the true class. The hardest class is on top of the table.",
        f'<div class="pair"><div>{page.picture(drawn, "confusion matrix", "dense")}</div>'
        f"<div><h3>Accuracy by class</h3>{classes}</div></div>",
    )


def mistakes(quantized: QuantizeResult, images: Images) -> str:
    """The most confident wrong answers as pictures.

    Args:
        quantized: Names the mistakes.
        images: Their images in the same order, uint8, shape (M, H, W, C).
    """
    names = quantized.class_names
    shown = list(zip(quantized.mistakes, images, strict=True))
    cards = "".join(
        f"<figure>{page.image(image_png(image), f'test row {mistake.row_id}')}<figcaption>"
        f"{page.text(names[mistake.label])} → <b>{page.text(names[mistake.predicted])}</b><br>"
        f"{percent(mistake.confidence, 1)}</figcaption></figure>"
        for mistake, image in shown[:SHOWN_MISTAKES]
    )
    intro = "The most confident wrong answers: true class → chosen class, and its probability."
    none = "<p>Every test row was answered right.</p>"
    body = f'<div class="mistakes">{cards}</div>' if cards else none
    return page.section("mistakes", "Worst mistakes", intro, body)


def quantization(quantized: QuantizeResult) -> str:
    """The compared methods as a table, and what the gate said."""
    fp32 = quantized.method(FP32)
    head = (
        "method", "accuracy", "points", "agreement", "size", "ratio", "ms, 1 row", "p99",
        "images/s, 32 rows", "gate",
    )  # fmt: skip
    cells = [
        (
            row.name,
            percent(row.accuracy),
            f"{100 * (row.accuracy - fp32.accuracy):+.2f}",
            percent(row.agreement),
            size(row.size_bytes),
            f"{row.size_bytes / fp32.size_bytes:.3f}",
            f"{row.at_batch(1).median_ms:.3g}",
            f"{row.at_batch(1).p99_ms:.3g}",
            f"{row.at_batch(32).images_per_second:,.0f}",
            _gate_of(row, quantized),
        )
        for row in quantized.methods
    ]
    names = [row.name for row in quantized.methods]
    chosen = names.index(quantized.chosen) if quantized.chosen else None
    mood = "good-text" if quantized.passed else "bad-text"
    verdict = f'<h3>Gate: <span class="{mood}">{page.text(quantized.gate)}</span></h3>'
    return page.section(
        "quantization",
        "Quantization",
        f"All methods over the same {quantized.test_rows:,} test rows, {quantized.num_threads} "
        f"thread(s) on {' '.join(quantized.cpu_features)}; calibrated with "
        f"{quantized.calibration_rows:,} training rows.",
        page.table(head, cells, chosen),
        verdict,
        _attempts(quantized),
    )


def latency(quantized: QuantizeResult) -> str:
    """Latency against batch size, and accuracy against latency with the Pareto front."""
    rows = quantized.methods
    front = ", ".join(speed_front(rows))
    curves = page.picture(latency_picture(rows), "latency against batch size")
    spots = page.picture(pareto_picture(rows), "accuracy against latency")
    return page.section(
        "latency",
        "Speed",
        f"Measured without serving. On the Pareto front of accuracy and latency: {front}.",
        f'<div class="pair"><div>{curves}</div><div>{spots}</div></div>',
    )


def served(served: dict[str, Any] | None) -> str:
    """How long the served requests took.

    Args:
        served: As in the report's evidence; None when nothing was served.
    """
    if served is None:
        return page.section("served", "Serving", "The model was not served in this turn.")
    if not served["latencies_ms"]:
        return page.section("served", "Serving", "No request was answered.")
    marks_ms = {"p50": served["p50_ms"], "p99": served["p99_ms"]}
    drawn = histogram_picture(served["latencies_ms"], marks_ms)
    intro = (
        f"{served['served_requests']:,} real requests with one image each, as the client saw them."
    )
    picture = page.picture(drawn, "latency histogram")
    body = f'<div class="pair"><div>{picture}</div><div>{_served_facts(served)}</div></div>'
    return page.section("served", "Serving", intro, body)


def percent(share: float, digits: int = 2) -> str:
    """A share (0..1) as text, e.g. `93.42 %`, that does not break."""
    return f"{100 * share:.{digits}f}\u00a0%"


def size(size_bytes: int) -> str:
    """Bytes as text, e.g. `1.25 MB`."""
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _served_facts(served: dict[str, Any]) -> str:
    pairs = [
        (name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
        for name, value in served.items()
        if isinstance(value, int | float)
    ]
    return page.facts(pairs)


def _points(share: float, fp32: MethodRow, name: str) -> str:
    return f"{100 * (share - fp32.class_accuracy[name]):+.1f}"


def _gate_of(row: MethodRow, quantized: QuantizeResult) -> str:
    if row.name == FP32:
        return "reference"
    if row.name != INT8_STATIC:
        return "compared only"
    return "pass" if quantized.passed else "refused"


def _attempts(quantized: QuantizeResult) -> str:
    if len(quantized.attempts) < 2:
        return ""
    rows = [
        (
            ", ".join(attempt["excluded"]) or "none",
            percent(attempt["accuracy"]),
            percent(attempt["agreement"]),
            "; ".join(attempt["reasons"]) or "pass",
        )
        for attempt in quantized.attempts
    ]
    head = ("layers kept in fp32", "accuracy", "agreement", "gate")
    return f"<details><summary>All attempts</summary>{page.table(head, rows)}</details>"
