"""A sweep's trials -> a picture: every curve, what the budget bought, and what the space gave."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from rayloop.config import TuneConfig
from rayloop.train.loop import Record
from rayloop.tune.objective import DIRECTIONS
from rayloop.tune.search import front
from rayloop.tune.trial import Trial, lineage

COLORS = {"finished": "#3b7dd8", "stopped": "#b5bcc9", "failed": "#d8548a", "running": "#e0823d"}
WINNER = "#2ba37b"


def draw_sweep(tune: TuneConfig, trials: Sequence[Trial], winner: Trial, title: str) -> bytes:
    """A PNG with two panels: the trials' curves, and the best so far against epochs spent.

    With several objectives the second panel shows the second objective against the first.

    Args:
        tune: The tune section.
        trials: All trials.
        winner: The best one.
        title: Shown on top.
    """
    figure, (curves, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    figure.suptitle(f"{title}: {len(trials)} trials")
    _draw_curves(curves, tune.objectives[0], trials, winner)
    if len(tune.objectives) > 1:
        _draw_front(right, tune, trials, winner)
    else:
        _draw_budget(right, tune.objectives[0], trials)
    for axis in (curves, right):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _draw_curves(axis: Axes, name: str, trials: Sequence[Trial], winner: Trial) -> None:
    counts = {status: sum(t.status == status for t in trials) for status in COLORS}
    for trial in trials:
        parent = trials[trial.parent].records[-1:] if trial.parent >= 0 else ()
        _plot(axis, name, [*parent, *trial.records], ms=2.5, lw=1, color=COLORS[trial.status])
    line = [record for trial in lineage(trials, winner) for record in trial.records]
    _plot(axis, name, line, ms=4, lw=2.2, color=WINNER)
    for status, count in counts.items():
        if count:
            axis.plot([], [], "o-", ms=3, color=COLORS[status], label=f"{status} ({count})")
    axis.plot([], [], "o-", ms=4, lw=2.2, color=WINNER, label=f"best, trial {winner.number}")
    axis.set_xlabel("epoch")
    axis.set_ylabel(name)
    axis.legend(fontsize="small")


def _plot(axis: Axes, name: str, records: Sequence[Record], **style: Any) -> None:
    epochs = [record["epoch"] for record in records]
    axis.plot(epochs, [record[name] for record in records], "o-", **style)


def _draw_budget(axis: Axes, name: str, trials: Sequence[Trial]) -> None:
    """Best so far of the trials that came to their end, against the epochs of all before them."""
    spent, best = 0.0, None
    places, values = [], []
    better = max if DIRECTIONS[name] == "maximize" else min
    for trial in trials:
        spent += trial.epochs
        if trial.status == "finished":
            best = trial.figures[name] if best is None else better(best, trial.figures[name])
            places.append(spent)
            values.append(best)
    axis.step([*places, spent], [*values, *values[-1:]], where="post", color=WINNER, lw=2)
    axis.plot(places, values, "o", ms=4, color=WINNER)
    axis.set_xlim(left=0)
    axis.set_xlabel("epochs spent in all trials")
    axis.set_ylabel(f"best {name} so far")


def _draw_front(axis: Axes, tune: TuneConfig, trials: Sequence[Trial], winner: Trial) -> None:
    first, second = tune.objectives[:2]
    done = [trial for trial in trials if trial.status == "finished" and second in trial.figures]
    axis.scatter(
        [trial.figures[second] for trial in done], [trial.figures[first] for trial in done],
        s=26, color=COLORS["finished"],
    )  # fmt: skip
    kept = sorted(front(tune, trials), key=lambda trial: trial.figures[second])
    axis.plot(
        [trial.figures[second] for trial in kept], [trial.figures[first] for trial in kept],
        "--", color="#8a93a6", lw=1.4, label="no other trial is better in all objectives",
    )  # fmt: skip
    axis.scatter(
        [winner.figures[second]], [winner.figures[first]], s=70, color=WINNER, zorder=3,
        label=f"best, trial {winner.number}",
    )  # fmt: skip
    axis.legend(fontsize="small")
    axis.set_xlabel(second)
    axis.set_ylabel(first)
