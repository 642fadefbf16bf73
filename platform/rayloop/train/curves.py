"""A run's history -> one picture: loss, accuracy, their gap, and the learning rate."""

import io

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt


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
