"""A sweep's trials -> a picture: every curve, what the budget bought, and what the space gave."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from rayloop.config import TuneConfig
from rayloop.tune.objective import DIRECTIONS
from rayloop.tune.trial import Trial

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
        epochs = [record["epoch"] for record in trial.records]
        values = [record[name] for record in trial.records]
        axis.plot(epochs, values, "o-", ms=2.5, lw=1, color=COLORS[trial.status], alpha=0.8)
    if name in winner.figures:
        axis.plot(
            [record["epoch"] for record in winner.records],
            [record[name] for record in winner.records],
            "o-", ms=4, lw=2.2, color=WINNER,
        )  # fmt: skip
    for status, count in counts.items():
        if count:
            axis.plot([], [], "o-", ms=3, color=COLORS[status], label=f"{status} ({count})")
    axis.plot([], [], "o-", ms=4, lw=2.2, color=WINNER, label=f"best, trial {winner.number}")
    axis.set_xlabel("epoch")
    axis.set_ylabel(name)
    axis.legend(fontsize="small")


def _draw_budget(axis: Axes, name: str, trials: Sequence[Trial]) -> None:
    """Best so far of the finished trials against the epochs that all before them took."""
    spent, best = 0.0, None
    places, values = [], []
    better = max if DIRECTIONS[name] == "maximize" else min
    for trial in trials:
        spent += trial.epochs
        if trial.status == "finished" and not trial.stop_epochs:
            best = trial.figures[name] if best is None else better(best, trial.figures[name])
            places.append(spent)
            values.append(best)
    axis.step([*places, spent], [*values, *values[-1:]], where="post", color=WINNER, lw=2)
    axis.plot(places, values, "o", ms=4, color=WINNER)
    axis.set_xlabel("epochs spent in all trials")
    axis.set_ylabel(f"best {name} so far")


def _draw_front(axis: Axes, tune: TuneConfig, trials: Sequence[Trial], winner: Trial) -> None:
    first, second = tune.objectives[:2]
    done = [trial for trial in trials if trial.status == "finished" and second in trial.figures]
    axis.scatter(
        [trial.figures[second] for trial in done], [trial.figures[first] for trial in done],
        s=26, color=COLORS["finished"],
    )  # fmt: skip
    axis.scatter([winner.figures[second]], [winner.figures[first]], s=70, color=WINNER)
    axis.set_xlabel(second)
    axis.set_ylabel(first)
