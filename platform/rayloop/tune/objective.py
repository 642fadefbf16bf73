"""The name of a figure -> which way it is better, and what a trial scored."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

from rayloop.errors import ConfigError

Direction = Literal["maximize", "minimize"]

CURVES: dict[str, Direction] = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "train_accuracy": "maximize",
    "train_loss": "minimize",
}
"""Figures that every epoch reports."""
COSTS: dict[str, Direction] = {
    "num_parameters": "minimize",
    "latency_ms_b1": "minimize",
    "size_bytes": "minimize",
}
"""Figures of the network, known before it is trained."""
DIRECTIONS = CURVES | COSTS


def check_objectives(objectives: Sequence[str]) -> None:
    """Refuse what no trial will ever report.

    Raises:
        ConfigError: Names the nearest figure.
    """
    for name in objectives:
        if name not in DIRECTIONS:
            close = difflib.get_close_matches(name, DIRECTIONS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"tune.objectives names {name!r}, which no trial reports; there are "
                f"{', '.join(DIRECTIONS)}.{hint}"
            )
    if objectives[0] not in CURVES:
        raise ConfigError(
            f"tune.objectives begins with {objectives[0]!r}, which no training changes; the first "
            f"one must be of {', '.join(CURVES)}, as in --tune.objectives val_accuracy "
            f"{objectives[0]}."
        )


def goodness(name: str, figures: Mapping[str, float]) -> float:
    """A figure with the sign by which more is better."""
    return figures[name] if DIRECTIONS[name] == "maximize" else -figures[name]
