"""What a sweep's trials have reported -> whether one of them is stopped early.

The rules are functions of the trials' records alone, so that a sweep that was killed decides as
one that was not.
"""

import math
import statistics
from collections.abc import Sequence

from rayloop.config import TuneConfig
from rayloop.tune.objective import goodness
from rayloop.tune.trial import Trial

MIN_TRIALS_FOR_MEDIAN = 4
"""Other trials that must have come as far before a median says anything."""


def stopping_rule(config: TuneConfig) -> str:
    """The rule in force; see `TuneConfig.stopping`."""
    if config.stopping != "auto":
        return config.stopping
    return "none" if config.search == "pbt" or len(config.objectives) > 1 else "asha"


def should_stop(config: TuneConfig, trial: Trial, trials: Sequence[Trial], epochs: float) -> bool:
    """Whether a trial that has just reported is stopped.

    Args:
        config: The tune section.
        trial: The trial with its newest record.
        epochs: Epochs of a whole run.
        trials: All trials; this one may be among them in an older state.
    """
    rule = stopping_rule(config)
    others = [other for other in trials if other.number != trial.number and other.records]
    if rule == "asha":
        return _behind_at_rung(config, trial, others, rungs(config, epochs))
    if rule == "median":
        return _below_median(config, trial, others)
    return False


def rungs(config: TuneConfig, epochs: float) -> list[float]:
    """Epochs at which trials are compared, the first one first.

    They are laid from the end of a run, each `reduction_factor` times earlier than the one after,
    down to the grace. Laid from the grace up, the last one could lie so near the end that stopping
    there saves nothing and only loses finished trials. Beyond the first epoch they are whole
    epochs, since a trial reports at their ends.
    """
    found: list[float] = []
    rung = epochs / config.reduction_factor
    while (whole := math.floor(rung) if rung >= 1 else rung) >= config.grace_epochs - 1e-9:
        found.insert(0, whole)
        rung /= config.reduction_factor
    return found


def _behind_at_rung(
    config: TuneConfig, trial: Trial, others: Sequence[Trial], at: Sequence[float]
) -> bool:
    """Asynchronous successive halving in its stopping form.

    At a rung a trial goes on if it is among the best `1 / reduction_factor` of those that have come
    there so far, itself included, and at least one always is (Li et al., "A System for Massively
    Parallel Hyperparameter Tuning", MLSys 2020).
    """
    epoch = trial.records[-1]["epoch"]
    before = trial.records[-2]["epoch"] if len(trial.records) > 1 else 0.0
    passed = [rung for rung in at if before < rung <= epoch]
    if not passed:
        return False
    mine = _at(config, trial, passed[-1])
    theirs = [value for other in others if (value := _at(config, other, passed[-1])) is not None]
    better = sum(value > mine for value in theirs) if mine is not None else 0
    return better >= max(1, (len(theirs) + 1) // config.reduction_factor)


def _at(config: TuneConfig, trial: Trial, epoch: float) -> float | None:
    """How good a trial was when it first came to an epoch; None if it never did."""
    for record in trial.records:
        if record["epoch"] >= epoch:
            return goodness(config.objectives[0], record)
    return None


def _below_median(config: TuneConfig, trial: Trial, others: Sequence[Trial]) -> bool:
    """The median stopping rule of Golovin et al., "Google Vizier", KDD 2017.

    A trial stops if its best so far is worse than the median of the others' means up to the same
    epoch.
    """
    epoch = trial.records[-1]["epoch"]
    if epoch < config.grace_epochs:
        return False
    name = config.objectives[0]
    means = [
        statistics.fmean(goodness(name, r) for r in other.records if r["epoch"] <= epoch)
        for other in others
        if other.records[-1]["epoch"] >= epoch
    ]
    if len(means) < MIN_TRIALS_FOR_MEDIAN:
        return False
    best = max(goodness(name, record) for record in trial.records)
    return best < statistics.median(means)
