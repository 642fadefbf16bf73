"""Points, curves and what twice as much would give -> one picture, and lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from rayloop.drawing import COLORS, INK, look, to_png
from rayloop.tune.scaling import UNITS, Axis, Doubling
from rayloop.tune.scaling_fit import NO_EFFECT, Forecast

SIZE_NAMES: dict[Axis, str] = {
    "data": "training_rows", "parameters": "parameters", "batch": "batch_size"
}  # fmt: skip
WHAT: dict[Axis, str] = {
    "data": "twice the data", "parameters": "twice the parameters", "batch": "twice the batch"
}  # fmt: skip
BLUE, ORANGE, GREEN = COLORS[:3]
GREY, DARK = "#8a93a6", INK["light"][1]
NORMAL_90 = 1.645
"""Standard deviations that bound 90% of a normal distribution."""
BAR_SHARE = 0.018
"""Half the width of the bar that shows the rows' chance, as a share of the axis."""
LOG_FROM = 8.0
"""Largest over smallest mean from which on the errors are drawn on a logarithmic axis."""


def draw_scaling(
    rows: Sequence[dict[str, Any]],
    found: Mapping[Axis, Doubling],
    axes: Sequence[Axis],
    title: str,
    val_rows: int,
) -> bytes:
    """A PNG with one panel an axis: validation error against size.

    Args:
        rows: As `rayloop.tune.scaling.point_rows` gives them; points without a run are left out.
        found: What twice as much would give, for the axes where that is known.
        axes: Those that were asked for, at least one.
        title: Shown on top.
        val_rows: Rows of the validation split.
    """
    with look("light"):
        figure, panels = plt.subplots(
            1, len(axes), figsize=(4.9 * len(axes) + 0.4, 4.9), layout="constrained", squeeze=False
        )
        figure.suptitle(title)
        legend: dict[str, Any] = {}
        for panel, axis in zip(panels[0], axes, strict=True):
            _draw_panel(panel, axis, _on_axis(rows, axis), found.get(axis), val_rows)
            for drawn in (panel, *_twins(panel)):
                lines, labels = drawn.get_legend_handles_labels()
                legend |= dict(zip(labels, lines, strict=True))
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center",
            ncols=6 if len(axes) > 1 else 2, fontsize="small",
        )  # fmt: skip
        return to_png(figure)


def _on_axis(rows: Sequence[dict[str, Any]], axis: Axis) -> list[dict[str, Any]]:
    here = [row for row in rows if axis in row["axes"] and "val_error" in row]
    return sorted(here, key=lambda row: row[SIZE_NAMES[axis]])


def _draw_panel(
    panel: Axes, axis: Axis, rows: list[dict[str, Any]], told: Doubling | None, val_rows: int
) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xlabel(UNITS[axis])
    panel.set_ylabel("validation error, %")
    panel.set_title("too few points for a curve yet", fontsize="medium")
    if not rows:
        return
    sizes = [row[SIZE_NAMES[axis]] for row in rows]
    panel.set_xlabel(f"{UNITS[axis]} ({_steps(rows)})")
    if told:
        _draw_curve(panel, told.val_error)
        panel.set_title(_heading(axis, told.val_error), fontsize="medium")
    _draw_points(panel, sizes, rows)
    at = sizes.index(told.val_error.x_now) if told else len(sizes) - 1
    marked = [*sizes, told.val_error.x_then] if told else sizes
    half_width = (max(marked) / min(marked)) ** BAR_SHARE
    _draw_binomial(panel, sizes[at], half_width, rows[at], val_rows)
    panel.xaxis.set_major_locator(FixedLocator(sorted(set(marked))))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    _set_heights(panel, rows, told)
    if told and told.images_per_second:
        _draw_speed(panel, sizes, rows, told.images_per_second)


def _steps(rows: list[dict[str, Any]]) -> str:
    """How many steps the runs had: with the same epochs they follow the data and the batch."""
    first, last = rows[0]["steps"], rows[-1]["steps"]
    is_same = abs(first - last) <= 0.01 * max(first, last)
    return f"{last:,} steps each" if is_same else f"{first:,} to {last:,} steps"


def _twins(panel: Axes) -> list[Axes]:
    shared = panel.get_shared_x_axes().get_siblings(panel)
    return [other for other in shared if other is not panel]


def _set_heights(panel: Axes, rows: list[dict[str, Any]], told: Doubling | None) -> None:
    """A logarithmic axis where the errors lie far apart; below 0 there is nothing."""
    means = [100 * row["val_error"] for row in rows]
    if told:
        means.append(100 * told.val_error.predicted)
    if min(means) > 0 and max(means) / min(means) > LOG_FROM:
        top = panel.get_ylim()[1]
        panel.set_yscale("log")
        panel.set_ylim(min(means) / 3, top)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.set_ylim(bottom=max(0.0, panel.get_ylim()[0]))


def _draw_curve(panel: Axes, told: Forecast) -> None:
    curve = {name: np.array(values) for name, values in told.curve.items()}
    low, high = 100 * curve["low"], 100 * curve["high"]
    panel.fill_between(curve["x"], low, high, color=BLUE, alpha=0.15, lw=0, label="90% interval")
    panel.plot(curve["x"], 100 * curve["median"], color=BLUE, lw=1.8, label="curve (median)")
    middle = 100 * told.predicted
    around = [[middle - 100 * told.low], [100 * told.high - middle]]
    panel.errorbar(
        [told.x_then], [middle], yerr=around, fmt="D", ms=7, color=ORANGE, capsize=4,
        label="twice as much", zorder=4,
    )  # fmt: skip


def _draw_points(panel: Axes, sizes: list[int], rows: list[dict[str, Any]]) -> None:
    for size, row in zip(sizes, rows, strict=True):
        errors = [100 * error for error in row["val_errors"]]
        panel.plot([size] * len(errors), errors, ".", ms=4, color=GREY, zorder=2)
    means = [100 * row["val_error"] for row in rows]
    spread = [100 * (row["val_error_deviation"] or 0.0) for row in rows]
    panel.errorbar(
        sizes, means, yerr=spread, fmt="o", ms=5.5, color=DARK, capsize=3, lw=1.3,
        label="mean and deviation of the seeds", zorder=3,
    )  # fmt: skip


def _draw_binomial(
    panel: Axes, size: int, half_width: float, row: dict[str, Any], val_rows: int
) -> None:
    """What the number of validation rows alone leaves open, as a bar behind the point of now."""
    around = 100 * NORMAL_90 * row["val_error_binomial"]
    panel.fill_between(
        [size / half_width, size * half_width],
        max(0.0, 100 * row["val_error"] - around),
        100 * row["val_error"] + around,
        color=GREEN, alpha=0.35, lw=0, zorder=1, label=f"chance of {val_rows:,} validation rows",
    )  # fmt: skip


def _draw_speed(panel: Axes, sizes: list[int], rows: list[dict[str, Any]], told: Forecast) -> None:
    """Images a second on an axis of its own at the right."""
    right = panel.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    kept = [(s, r["images_per_second"]) for s, r in zip(sizes, rows, strict=True)]
    kept = [(size, speed) for size, speed in kept if speed]
    right.plot(*zip(*kept, strict=True), "s", ms=4, mfc="none", color=GREY)
    right.plot(told.curve["x"], told.curve["median"], ":", color=GREY, label="images a second")
    right.set_ylim(bottom=0, top=1.6 * max(speed for _, speed in kept))
    right.set_ylabel("images a second, one process", color=GREY)
    right.tick_params(axis="y", colors=GREY)


def _heading(axis: Axis, told: Forecast) -> str:
    """What twice as much gives, in two lines."""
    second = told.effect
    if told.misfit:
        second = f"{told.effect}; no curve fits well"
    elif told.effect != NO_EFFECT:
        points = sorted(abs(100 * value) for value in (told.change_low, told.change_high))
        second = f"{told.effect} by {points[0]:.2f} to {points[1]:.2f} points"
    return f"{WHAT[axis]}: {_percent(told)}\n{second} ({told.model})"


def _percent(told: Forecast) -> str:
    now, then = 100 * told.now, 100 * told.predicted
    return f"{now:.2f}% to {then:.2f}% ({100 * told.low:.2f} to {100 * told.high:.2f})"


def _count(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            scaled = value / (1e3 if name == "k" else unit)
            return f"{scaled:.3g}{name}"
    return f"{value:g}"


def scaling_lines(
    rows: Sequence[dict[str, Any]], found: Mapping[Axis, Doubling], axes: Sequence[Axis]
) -> list[str]:
    """Aligned lines for a terminal: every point, then what twice as much would give.

    Args:
        rows: As for `draw_scaling`.
        found: As for `draw_scaling`.
        axes: As for `draw_scaling`.
    """
    head = ("point", "rows", "parameters", "batch", "steps", "n", "error %", "±", "loss", "img/s")
    table = [head, *(_cells(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    ]
    for axis in axes:
        told = found.get(axis)
        lines.extend(_said(axis, told) if told else [f"{WHAT[axis]}: too few points for a curve"])
    return lines


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = (f"{row['training_rows']:,}", f"{row['parameters']:,}", f"{row['batch_size']:,}")
    if "val_error" not in row:
        why = "diverged" if row["diverged"] else "not yet"
        return (row["name"], *sizes, "", "0", why, "", "", "")
    spread = row["val_error_deviation"]
    return (
        row["name"],
        *sizes,
        f"{row['steps']:,}",
        f"{len(row['runs'])}",
        f"{100 * row['val_error']:.2f}",
        "" if spread is None else f"{100 * spread:.2f}",
        f"{row['val_loss']:.4f}",
        f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "",
    )


def _said(axis: Axis, told: Doubling) -> list[str]:
    error, loss, speed = told.val_error, told.val_loss, told.images_per_second
    heading = _heading(axis, error).replace("\n", "; ")
    lines = [heading]
    lines.append(
        f"  loss {loss.now:.4f} to {loss.predicted:.4f} ({loss.low:.4f} to {loss.high:.4f}); "
        f"{loss.effect}"
    )
    if told.held_out:
        lines.append(
            f"  the largest point from the others: {100 * told.held_out.predicted:.2f}% "
            f"({100 * told.held_out.low:.2f} to {100 * told.held_out.high:.2f}); measured "
            f"{100 * error.now:.2f}%"
        )
    if speed:
        lines.append(
            f"  images a second times {speed.change:.2f} "
            f"({speed.change_low:.2f} to {speed.change_high:.2f})"
        )
    return lines
