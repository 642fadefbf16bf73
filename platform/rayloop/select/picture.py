"""Candidates -> a picture: accuracy against latency and against throughput, and the choice."""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from rayloop.config import SelectConfig
from rayloop.drawing import COLORS, look, to_png
from rayloop.select.candidate import AIMS, Aim, Candidate, short_names
from rayloop.select.choice import limits_of
from rayloop.tune.front import pareto_front

PANELS: dict[Aim, str] = {
    "latency": "median latency of one row, ms",
    "throughput": "images per second, 32 rows a call",
}
INT8, CHOSEN, FLOOR, FRONT, FP32 = COLORS[0], COLORS[1], COLORS[4], "#5b6780", "#a3abba"
EDGE = "#16325c"
SMALLEST_AREA, LARGEST_AREA = 14.0, 330.0
MAX_LABELS = 14
"""With more points than this only the front and the choice are named."""
ACCURACY_STEPS = (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
FIGURE_STEPS = ((1,), (2, 5), (3, 7), (1.5, 4), (1.2, 2.5, 6, 8), (1.1, 1.3, 1.4, 1.7, 2.2, 3.5))
ACCURACY_PX, FIGURE_PX = 30.0, 55.0
ENOUGH_TICKS = 5
DISTANCES = (4, 12)
MARGIN, LEAST_MARGIN = 0.1, 0.05
LINE_STEP_PX = 6.0
TITLE_WIDTH = 158
PLACES = [(0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
"""Where a label may stand, seen from its point: right, up, and so on, the first free one wins."""


def draw_comparison(
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    chosen: Candidate | None,
    config: SelectConfig,
    floor: float | None,
    title: str,
    why: str,
) -> bytes:
    """A PNG with two panels, in the look of a light page.

    Args:
        candidates: All models.
        front: Those that can be registered and that no other such one beats.
        chosen: The one to register, if there is one.
        config: The limits.
        floor: Accuracy of a linear model on the same rows.
        title: What was compared.
        why: The decision in words.
    """
    with look("light"):
        figure, axes = plt.subplots(1, 2, figsize=(12.5, 6), sharey=True, layout="constrained")
        told = textwrap.fill(
            f"{title}. {_decision(chosen, why)}", TITLE_WIDTH, break_on_hyphens=False
        )
        figure.suptitle(told, fontsize="medium", x=0.01, ha="left")
        largest = max(candidate.size_bytes for candidate in candidates)
        for axis, aim in zip(axes, PANELS, strict=True):
            axis.set_xscale("log")
            axis.set_xlabel(PANELS[aim])
            _draw_points(axis, aim, candidates, front, config)
            _draw_front(axis, aim, front)
            if chosen:
                _ring(axis, aim, chosen, largest)
            if floor is not None:
                axis.axhline(100 * floor, color=FLOOR, lw=1.4, ls=(0, (6, 3)), zorder=1)
            axis.margins(x=MARGIN)
        _spread_accuracies(axes[0], candidates, config, floor)
        for axis, aim in zip(axes, PANELS, strict=True):
            _shade(axis, aim, config)
            _tick_figures(axis, "{:g}" if aim == "latency" else "{:,.0f}")
        axes[0].set_ylabel("validation accuracy, %")
        _tick_accuracies(axes[0])
        handles = _legend(candidates, chosen, config, floor, largest)
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
        figure.draw_without_rendering()
        named = _named(candidates, front, chosen, config)
        for axis, aim in zip(axes, PANELS, strict=True):
            _name_points(axis, aim, candidates, named, chosen, largest)
        return to_png(figure)


def _decision(chosen: Candidate | None, why: str) -> str:
    return f"Chosen: {chosen.name}, {why}." if chosen else why


def _spread_accuracies(
    axis: Axes, candidates: Sequence[Candidate], config: SelectConfig, floor: float | None
) -> None:
    """Scale accuracy by the logarithm of what is wrong: 99 and 99.9 lie as far apart as 90 and 99.

    Near 100 % a plain axis would lay all good models over one another.
    """
    shares = [candidate.accuracy for candidate in candidates]
    shares += [share for share in (floor, config.min_accuracy or None) if share is not None]
    least = min((1 - share for share in shares if share < 1), default=0.01)
    end = 100 + 100 * least / 3  # where the logarithm ends, so that 100 % has a place

    def place_of(percent: Any) -> Any:
        return -np.log10(np.maximum(end - percent, (end - 100) / 1000))

    def percent_at(place: Any) -> Any:
        return end - 10.0**-place

    axis.set_yscale("function", functions=(place_of, percent_at))
    low, high = place_of(100 * min(shares)), place_of(100 * max(shares))
    room = max(MARGIN * (high - low), LEAST_MARGIN)
    axis.set_ylim(percent_at(low - room), percent_at(high + room))


def _tick_figures(axis: Axes, text: str) -> None:
    """Round figures on the logarithmic axis."""
    low, high = np.log10(axis.get_xlim())
    decades = 10.0 ** np.arange(np.floor(low), np.ceil(high) + 1)
    levels = [[step * decade for decade in decades for step in steps] for steps in FIGURE_STEPS]
    inside = [[tick for tick in level if low <= np.log10(tick) <= high] for level in levels]
    kept = _with_room(inside, lambda tick: axis.transData.transform((tick, 50.0))[0], FIGURE_PX)
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.format(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def _tick_accuracies(axis: Axes) -> None:
    """Round accuracies."""
    bottom, top = axis.get_ylim()
    levels = [
        list(np.arange(np.ceil(bottom / step), np.floor(min(top, 100) / step) + 1) * step)
        for step in ACCURACY_STEPS
    ]
    kept = _with_room(levels, lambda tick: axis.transData.transform((1.0, tick))[1], ACCURACY_PX)
    axis.yaxis.set_major_locator(FixedLocator(kept))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _with_room(
    levels: Sequence[Sequence[float]], place_of: Callable[[float], float], apart_px: float
) -> list[float]:
    """Ticks of the roundest level, then of the next where there is room, and so on."""
    kept: dict[float, float] = {}
    for level in levels:
        if len(kept) >= ENOUGH_TICKS:
            break
        for tick in level:
            place = place_of(tick)
            if all(abs(place - other) >= apart_px for other in kept.values()):
                kept[float(tick)] = place
    return sorted(kept)


def _area(candidate: Candidate, largest: int) -> float:
    """Area of a marker in square points: bytes, from a smallest one that is still seen."""
    return SMALLEST_AREA + (LARGEST_AREA - SMALLEST_AREA) * candidate.size_bytes / largest


def _spot(candidate: Candidate, aim: Aim) -> tuple[float, float]:
    return candidate.figure(aim), 100 * candidate.accuracy


def _draw_points(
    axis: Axes,
    aim: Aim,
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    config: SelectConfig,
) -> None:
    limits, held = limits_of(config), {candidate.name for candidate in front}
    largest = max(candidate.size_bytes for candidate in candidates)
    for candidate in candidates:
        x, y = _spot(candidate, aim)
        within = all(limit.is_met(candidate) for limit in limits)
        looks: dict[str, Any] = {"s": _area(candidate, largest), "zorder": 3}
        if candidate.method == "fp32":
            looks |= {"facecolors": "none", "edgecolors": FP32, "linewidths": 1.2, "zorder": 2}
        elif candidate.refused:
            looks |= {"color": FP32, "marker": "X"}
        else:
            looks |= {"facecolors": INT8, "alpha": 0.9 if within else 0.3}
            looks |= {"edgecolors": EDGE, "linewidths": 1.3 if candidate.name in held else 0}
        axis.scatter([x], [y], **looks)


def _draw_front(axis: Axes, aim: Aim, front: Sequence[Candidate]) -> None:
    """Join those of the front that this panel's two figures alone would put on it."""
    spots = [_spot(candidate, aim) for candidate in front]
    kept = pareto_front(spots, (AIMS[aim][1], "highest"))
    line = np.array(sorted(spots[at] for at in kept))
    if len(line):
        axis.plot(line[:, 0], line[:, 1], "--", color=FRONT, lw=1.3, zorder=2)


def _ring(axis: Axes, aim: Aim, chosen: Candidate, largest: int) -> None:
    x, y = _spot(chosen, aim)
    axis.scatter(
        [x], [y], s=_area(chosen, largest) + 190, facecolors="none", edgecolors=CHOSEN,
        linewidths=2.4, zorder=4,
    )  # fmt: skip


def _shade(axis: Axes, aim: Aim, config: SelectConfig) -> None:
    """Grey what the limits forbid; a limit on bytes shows in the points alone, which are pale."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    forbidden: dict[str, Any] = {"color": "#8a93a6", "alpha": 0.16, "lw": 0, "zorder": 0}
    if aim == "latency" and config.max_latency_ms:
        right = max(right, config.max_latency_ms * 1.1)
        axis.axvspan(config.max_latency_ms, right, **forbidden)
    if config.min_accuracy:
        axis.axhspan(bottom, 100 * config.min_accuracy, **forbidden)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _legend(
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    config: SelectConfig,
    floor: float | None,
    largest: int,
) -> list[Any]:
    def dot(label: str, **looks: Any) -> Line2D:
        return Line2D([], [], ls="none", label=label, **{"marker": "o", "ms": 7, **looks})

    handles: list[Any] = [dot("INT8", color=INT8)]
    if any(candidate.refused and candidate.method != "fp32" for candidate in candidates):
        handles.append(dot("INT8, refused by the gate", color=FP32, marker="X"))
    handles.append(dot("fp32, compared only", mfc="none", mec=FP32))
    handles.append(
        Line2D([], [], ls="--", color=FRONT, lw=1.3, marker="o", ms=7, mfc=INT8, mec=EDGE, mew=1.3,
               label="Pareto front of INT8")
    )  # fmt: skip
    if chosen:
        handles.append(dot("chosen", mfc="none", mec=CHOSEN, mew=2.2, ms=11))
    if floor is not None:
        handles.append(
            Line2D([], [], color=FLOOR, lw=1.4, ls=(0, (6, 3)), label=f"linear {floor:.1%}")
        )
    if limits_of(config):
        handles.append(Patch(color="#8a93a6", alpha=0.16, label="outside a limit (or pale)"))
    size = np.sqrt(LARGEST_AREA)
    handles.append(dot(f"area: file size, this one {_bytes(largest)}", color="#d5dae5", ms=size))
    return handles


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _named(
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    chosen: Candidate | None,
    config: SelectConfig,
) -> list[Candidate]:
    """Which points are named: the choice first, so that its label has the best place."""
    limits = limits_of(config)
    int8 = [candidate for candidate in candidates if candidate.method != "fp32"]
    within = [candidate for candidate in int8 if all(limit.is_met(candidate) for limit in limits)]
    ordered = [*([chosen] if chosen else []), *front, *(within if len(int8) <= MAX_LABELS else [])]
    return list({candidate.name: candidate for candidate in ordered}.values())


def _name_points(
    axis: Axes,
    aim: Aim,
    candidates: Sequence[Candidate],
    named: Sequence[Candidate],
    chosen: Candidate | None,
    largest: int,
) -> None:
    """Write names where they cover neither a point nor another name; else leave them out."""
    figure: Any = axis.figure
    labels = short_names([candidate.run_id for candidate in candidates])
    scale = figure.dpi / 72
    taken = [
        _box_around(axis, _spot(candidate, aim), np.sqrt(_area(candidate, largest)) * scale / 2)
        for candidate in candidates
    ]
    taken += [box for line in axis.lines for box in _boxes_along(axis, line)]
    frame = axis.get_window_extent()
    for candidate in named:
        is_chosen = candidate is chosen
        radius = np.sqrt(_area(candidate, largest) + (190 if is_chosen else 0)) / 2
        for distance, place in itertools.product(DISTANCES, PLACES):
            label = _write(axis, labels[candidate.run_id], _spot(candidate, aim), radius + distance,
                           place, bold=is_chosen, lead=distance > DISTANCES[0])  # fmt: skip
            label.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # without the line to the point
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def _write(
    axis: Axes,
    text: str,
    spot: tuple[float, float],
    away: float,
    place: tuple[int, int],
    bold: bool,
    lead: bool,
) -> Annotation:
    """Write a name beside a point, with a thin line to it where it stands further off."""
    right, up = place
    label = axis.annotate(
        text,
        spot,
        (right * away, up * away),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[right],
        va={1: "bottom", 0: "center", -1: "top"}[up],
        fontsize="small",
        fontweight="bold" if bold else "normal",
        arrowprops={"arrowstyle": "-", "color": FP32, "lw": 0.8, "shrinkA": 0, "shrinkB": 2}
        if lead
        else None,
        zorder=5,
    )
    label.set_in_layout(False)
    return label


def _box_around(axis: Axes, spot: tuple[float, float], radius: float) -> Bbox:
    x, y = axis.transData.transform(spot)
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _boxes_along(axis: Axes, line: Line2D) -> list[Bbox]:
    """Small boxes that cover a line."""
    spots = line.get_transform().transform(np.column_stack(line.get_data()))
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(spots):
        count = max(2, int(np.hypot(x1 - x0, y1 - y0) / LINE_STEP_PX))
        across = zip(np.linspace(x0, x1, count), np.linspace(y0, y1, count), strict=True)
        boxes += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in across]
    return boxes
