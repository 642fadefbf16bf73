"""Figures of a turn of the loop -> PNG pictures, each in a light and a dark look."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from rayloop.quantize.result import MethodRow

Images = npt.NDArray[np.uint8]

MAX_WRITTEN_CLASSES = 20
"""Confusion matrices of more classes carry no numbers and no names: they would not be readable."""

FRONT = "#8a93a6"
HISTOGRAM_BINS = 48
INK = {"light": ("#ffffff", "#2a3040", "#c9cfda"), "dark": ("#1a1f2b", "#d5dae5", "#414a5e")}
"""Ground, text and line colour of each look; the grounds are those of the page's cards."""

COLORS = ("#3b7dd8", "#e0823d", "#2ba37b", "#a06be0", "#d8548a")


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure as two PNG files: for a light page and for a dark one."""

    light: bytes
    dark: bytes


def in_both_looks(draw: Callable[[], bytes]) -> Picture:
    """Draw a figure twice, with the colours of a light and of a dark page.

    Args:
        draw: Gives a PNG; its matplotlib defaults are what changes.
    """
    drawn = {}
    for look in INK:
        with _look(look):
            drawn[look] = draw()
    return Picture(light=drawn["light"], dark=drawn["dark"])


def pareto_front(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """Names of the methods that no other one beats in accuracy and latency together.

    Args:
        points: Name, accuracy (higher is better) and latency (lower is better) of each method.

    Returns:
        Names, the fastest first. Of equal points all are kept.
    """

    def beaten(point: tuple[str, float, float]) -> bool:
        _, accuracy, latency = point
        return any(
            a >= accuracy and ms <= latency and (a > accuracy or ms < latency)
            for _, a, ms in points
        )

    return [name for name, _, _ in sorted(filter(lambda p: not beaten(p), points), key=_latency)]


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
        return _png(figure)

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
        _plain_numbers(axis.yaxis)
        axis.legend()
        return _png(figure)

    return in_both_looks(draw)


def pareto_picture(rows: Sequence[MethodRow]) -> Picture:
    """Accuracy against latency at batch size 1, the Pareto front joined and ringed."""
    points = [(row.name, row.accuracy, row.at_batch(1).median_ms) for row in rows]
    place = {name: (latency_ms, 100 * accuracy) for name, accuracy, latency_ms in points}
    front = pareto_front(points)

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
        return _png(figure)

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
        _plain_numbers(axis.xaxis)
        axis.set_xlabel("latency of a request, ms")
        axis.set_ylabel("requests")
        axis.legend()
        return _png(figure)

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


def _latency(point: tuple[str, float, float]) -> float:
    return point[2]


def _rgb(image: Images) -> Images:
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _encode(pixels: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _cycle() -> Iterator[str]:
    while True:
        yield from COLORS


def _plain_numbers(axis: Any) -> None:
    """Write a logarithmic axis as 0.2, 1, 5 and not as powers of ten."""
    low, high = axis.get_view_interval()
    narrow = high / low < 30
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    steps = (1, 2, 5) if narrow else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def _write_counts(axis: Axes, counts: npt.NDArray[np.int64], shares: Any) -> None:
    for (i, j), count in np.ndenumerate(counts):
        ink = "#ffffff" if np.sqrt(shares[i, j]) > 0.6 else "#24304a"
        faint = 0.35 if count == 0 else 1.0
        axis.text(j, i, f"{count}", ha="center", va="center", color=ink, alpha=faint, fontsize=9)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


@contextmanager
def _look(name: str) -> Iterator[None]:
    ground, text, line = INK[name]
    settings: dict[str, Any] = {
        "font.size": 10.5,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": line,
        "grid.color": line,
        "grid.alpha": 0.45,
        "legend.frameon": False,
        "lines.linewidth": 1.9,
    }
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(grounds, ground) | dict.fromkeys(texts, text)
    with matplotlib.rc_context():
        plt.rcParams.update(cast(Any, settings))
        yield
