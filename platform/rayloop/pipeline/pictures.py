"""Figures of a turn of the loop -> PNG pictures, each in a light and a dark look."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from rayloop.drawing import COLORS, Picture, in_both_looks, plain_numbers, to_png
from rayloop.quantize.result import MethodRow
from rayloop.tune.front import pareto_front

Images = npt.NDArray[np.uint8]

MAX_WRITTEN_CLASSES = 20
"""Confusion matrices of more classes carry no numbers and no names: they would not be readable."""

FRONT = "#8a93a6"
HISTOGRAM_BINS = 48


def confusion_picture(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Picture:
    """The confusion matrix: counts written, shaded by share of the true class.

    Args:
        confusion: Rows by true class (row) and predicted class (column).
        class_names: Label names in index order.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    written = len(class_names) <= MAX_WRITTEN_CLASSES

    def draw() -> bytes:
        side = min(2.4 + 0.4 * len(class_names), 7.6)
        figure, axis = plt.subplots(figsize=(side + 0.3, side), layout="constrained")
        axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.15)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        if written:
            _write_counts(axis, counts, shares)
            axis.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
            axis.set_yticks(range(len(class_names)), class_names)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        return to_png(figure)

    return in_both_looks(draw)


def latency_picture(rows: Sequence[MethodRow]) -> Picture:
    """Median latency against batch size, both logarithmic, one line a method."""

    def draw() -> bytes:
        figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
        for row in rows:
            points = sorted(row.latency, key=lambda point: point.batch_size)
            sizes = [point.batch_size for point in points]
            axis.plot(sizes, [p.median_ms for p in points], "o-", ms=4.5, label=row.name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        sizes = sorted({point.batch_size for row in rows for point in row.latency})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("rows in a call")
        axis.set_ylabel("median latency of a call, ms")
        plain_numbers(axis.yaxis)
        axis.legend()
        return to_png(figure)

    return in_both_looks(draw)


def speed_front(rows: Sequence[MethodRow]) -> list[str]:
    """Names of the methods no other one beats in accuracy and latency together, fastest first."""
    figures = [(row.accuracy, row.at_batch(1).median_ms) for row in rows]
    front = pareto_front(figures, ("highest", "lowest"))
    return [rows[at].name for at in sorted(front, key=lambda at: figures[at][1])]


def pareto_picture(rows: Sequence[MethodRow]) -> Picture:
    """Accuracy against latency at batch size 1, the Pareto front joined and ringed."""
    place = {row.name: (row.at_batch(1).median_ms, 100 * row.accuracy) for row in rows}
    front = speed_front(rows)

    def draw() -> bytes:
        figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
        line = np.array([place[name] for name in front])
        axis.plot(line[:, 0], line[:, 1], "--", color=FRONT, lw=1.4, label="Pareto front")
        axis.plot(line[:, 0], line[:, 1], "o", ms=16, mfc="none", mec=FRONT, mew=1.8)
        for color, (name, spot) in zip(_cycle(), place.items(), strict=False):
            axis.plot(*spot, "o", ms=8, color=color)
            away = 13 if name in front else -20
            axis.annotate(name, spot, (0, away), textcoords="offset points", ha="center")
        axis.margins(x=0.25, y=0.3)
        axis.set_xlabel("median latency of one row, ms")
        axis.set_ylabel("test accuracy, %")
        axis.ticklabel_format(useOffset=False)
        axis.legend(loc="lower right")
        return to_png(figure)

    return in_both_looks(draw)


def histogram_picture(latencies_ms: Sequence[float], marks_ms: Mapping[str, float]) -> Picture:
    """How long served requests took, on a logarithmic axis so that the tail shows.

    Args:
        latencies_ms: One positive number a request; at least one.
        marks_ms: Percentiles to mark, by name.
    """
    values = np.asarray(latencies_ms, dtype=np.float64)
    low, high = values.min() * 0.95, values.max() * 1.05

    def draw() -> bytes:
        figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
        axis.hist(values, bins=list(np.geomspace(low, high, HISTOGRAM_BINS)), color=COLORS[0])
        for color, (name, mark_ms) in zip((COLORS[2], COLORS[1]), marks_ms.items(), strict=False):
            axis.axvline(mark_ms, color=color, lw=1.8, label=f"{name} {mark_ms:.3g} ms")
        axis.set_xscale("log")
        plain_numbers(axis.xaxis)
        axis.set_xlabel("latency of a request, ms")
        axis.set_ylabel("requests")
        axis.legend()
        return to_png(figure)

    return in_both_looks(draw)


def grid_png(rows: Images, cell_px: int = 72, gap_px: int = 6) -> bytes:
    """Rows of images as one PNG with a see-through gap between them.

    Args:
        rows: uint8, shape (R, N, H, W, C) with 1 or 3 channels.
        cell_px: Height of an image in the picture, at least; a whole multiple of its own height.
        gap_px: Width of the gap.
    """
    count_down, count_across, height, width, _ = rows.shape
    factor = max(1, -(-cell_px // height))
    down, across = height * factor + gap_px, width * factor + gap_px
    canvas = np.zeros((count_down * down - gap_px, count_across * across - gap_px, 4), np.uint8)
    for i in range(count_down):
        for j in range(count_across):
            cell = _rgb(rows[i, j]).repeat(factor, axis=0).repeat(factor, axis=1)
            spot = canvas[i * down : i * down + height * factor, j * across :][:, : width * factor]
            spot[..., :3], spot[..., 3] = cell, 255
    return _encode(canvas)


def image_png(image: Images) -> bytes:
    """One uint8 image (H, W, C), 1 or 3 channels, as a PNG of its own size."""
    return _encode(_rgb(image))


def data_uri(png: bytes) -> str:
    """A PNG as an address that carries its content."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _rgb(image: Images) -> Images:
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _encode(pixels: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _cycle() -> Iterator[str]:
    while True:
        yield from COLORS


def _write_counts(axis: Axes, counts: npt.NDArray[np.int64], shares: Any) -> None:
    for (i, j), count in np.ndenumerate(counts):
        ink = "#ffffff" if np.sqrt(shares[i, j]) > 0.6 else "#24304a"
        faint = 0.35 if count == 0 else 1.0
        axis.text(j, i, f"{count}", ha="center", va="center", color=ink, alpha=faint, fontsize=9)
