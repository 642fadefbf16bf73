"""A run's history and its seconds by cause -> pictures, and lines for a terminal."""

import io

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from rayloop.train.journal import Journal

LEDGER_COLORS = {
    "step": "tab:green", "data_wait": "tab:orange", "evaluate": "tab:blue",
    "checkpoint": "tab:purple", "compile": "tab:cyan", "start": "tab:olive",
    "restart": "tab:red", "lost_work": "tab:pink", "finish": "tab:brown", "other": "tab:gray",
}  # fmt: skip


def draw_curves(history: list[dict[str, float]], title: str) -> bytes:
    """A PNG with three panels over epochs.

    Args:
        history: Records with `epoch`, `train_loss`, `val_loss`, `train_accuracy`, `val_accuracy`
            and `learning_rate`.
        title: Shown on top.
    """
    epochs = [record["epoch"] for record in history]

    def values(name: str) -> list[float]:
        return [record[name] for record in history]

    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    figure.suptitle(title)
    loss.plot(epochs, values("train_loss"), "o-", ms=3, label="training (smoothed labels)")
    loss.plot(epochs, values("val_loss"), "o-", ms=3, label="validation")
    accuracy.plot(epochs, values("train_accuracy"), "o-", ms=3, label="training (augmented)")
    accuracy.plot(epochs, values("val_accuracy"), "o-", ms=3, label="validation")
    gap = [t - v for t, v in zip(values("train_accuracy"), values("val_accuracy"), strict=True)]
    rate.plot(epochs, values("learning_rate"), "o-", ms=3, color="tab:green", label="learning rate")
    gap_axis = rate.twinx()
    gap_axis.plot(epochs, gap, "o--", ms=3, color="tab:red", label="gap")
    gap_axis.set_ylabel("training minus validation accuracy", color="tab:red")
    for axis, name in ((loss, "loss"), (accuracy, "accuracy"), (rate, "learning rate")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    loss.legend()
    accuracy.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def draw_ledger(causes: dict[str, float], title: str) -> bytes:
    """A PNG, 800 pixels wide: one bar of a run's wall time, divided by cause.

    Args:
        causes: Seconds by cause, as `Journal.causes` gives them; those without time are left out.
        title: Shown on top, followed by the goodput.
    """
    total_s = sum(causes.values())
    figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained")
    here = 0.0
    for cause, spent in causes.items():
        if spent <= 0:
            continue
        label = f"{cause} {spent:.1f} s ({spent / total_s:.1%})"
        axis.barh(0, spent, left=here, color=LEDGER_COLORS.get(cause, "black"), label=label)
        here += spent
    goodput = f"{causes.get('step', 0.0) / total_s:.1%}" if total_s > 0 else "none yet"
    figure.suptitle(f"{title}: goodput {goodput}")
    axis.set_xlim(0, total_s or 1)
    axis.set_yticks([])
    axis.set_xlabel("wall time (s)")
    axis.grid(alpha=0.3, axis="x")
    if total_s > 0:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def ledger_lines(journal: Journal) -> list[str]:
    """One aligned line a cause for a terminal: name, seconds, share of the run's wall time."""
    causes = journal.causes()
    total_s = journal.total_s or 1.0
    width = max(map(len, causes))
    return [
        f"{cause:<{width}} {spent:>10.1f} s {spent / total_s:>7.1%}"
        for cause, spent in causes.items()
    ]
