"""A sweep's settings and its trials' records -> what is tried next, what is stopped, what is best.

This is the whole of a sweep but for the work itself. One process owns it, and every change is on
disk before it has an effect, so a process that comes after a SIGKILL goes on from there.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import Config, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.errors import ConfigError
from rayloop.storage import Storage
from rayloop.train.claim import deciding_settings
from rayloop.train.loop import Record
from rayloop.train.start import order_of
from rayloop.tune.declare import parse_space
from rayloop.tune.objective import check_objectives
from rayloop.tune.population import check_population
from rayloop.tune.search import best, num_trials, suggest
from rayloop.tune.space import Space, assign
from rayloop.tune.stopping import should_stop
from rayloop.tune.suggestion import Wait
from rayloop.tune.trial import Trial, load_trials, save_trial

LONGEST_ERROR = 500
MEANS = frozenset({"max_concurrent", "max_failures", "trainable"})
"""Tune settings that say how the work is done; a sweep may go on with others."""


class Sweep:
    """One sweep, new or continued.

    Args:
        config: All settings, `run_id` filled in.
        storage: The root.
        dataset: The dataset version it trains on.
        clock: For the trials' seconds.

    Raises:
        ConfigError: The space or the objectives make no sense, or the run id belongs to another
            sweep or to a single run.
    """

    def __init__(
        self, config: Config, storage: Storage, dataset: DatasetVersion, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.config, self.storage, self._clock = config, storage, clock
        self._dataset = dataset
        self.space = read_space(config)
        self._claim(dataset)
        self._trials = {trial.number: trial for trial in load_trials(storage, config.run_id)}
        self._waiting = [trial.number for trial in self.trials if not trial.is_over]
        self._began_s: dict[int, float] = {}

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, in order."""
        return [self._trials[number] for number in sorted(self._trials)]

    def trial(self, number: int) -> Trial:
        """One trial as it is now."""
        return self._trials[number]

    @property
    def is_complete(self) -> bool:
        """Whether every trial is over and there is none left to suggest."""
        numbers = range(self.num_trials)
        return all(n in self._trials and self._trials[n].is_over for n in numbers)

    @property
    def num_trials(self) -> int:
        """How many trials the whole sweep has."""
        return num_trials(self.config.tune, self.space, self.config.train.epochs)

    @property
    def budget_epochs(self) -> float:
        """Epochs trained in all trials."""
        return sum(trial.epochs for trial in self.trials)

    def best(self) -> Trial | None:
        """The best finished trial so far."""
        return best(self.config.tune, self.trials)

    def next(self) -> Trial | Wait | None:
        """The trial to begin now: first those an earlier session left, then new ones."""
        if self._waiting:
            return self._begin(self._trials[self._waiting.pop(0)])
        number = next(n for n in itertools.count() if n not in self._trials)
        before = [trial for trial in self.trials if trial.number < number]  # a record was removed
        found = suggest(self.config.tune, self.space, self.config.train.epochs, before)
        if found is None or isinstance(found, Wait):
            return found
        trial = Trial(
            number=number,
            run_id=f"{self.config.run_id}-{number:04d}",
            assignment=found.assignment,
            parent=found.parent,
            start_epoch=found.start_epoch,
            stop_epochs=found.stop_epochs,
        )
        try:
            self.settings_of(trial)
        except ConfigError as error:  # two values contradict each other that never met before
            self._end(trial, status="failed", error=_one_line(str(error)))
            return self.next()
        return self._begin(trial)

    def requeue(self, number: int) -> None:
        """A trial that was under way is to be begun again in this session."""
        self._waiting.append(number)

    def settings_of(self, trial: Trial) -> Config:
        """The whole configuration of a trial's run."""
        return replace(assign(self.config, trial.assignment), run_id=trial.run_id)

    def cost(self, number: int, costs: dict[str, float]) -> None:
        """Keep what a trial's network costs."""
        self._save(replace(self._trials[number], costs=dict(costs)))

    def report(self, number: int, record: Record) -> bool:
        """Keep a trial's record of an epoch; gives whether the trial is to stop here.

        A record that is known already, or that comes after the end, changes nothing.
        """
        before = self._trials[number]
        if before.is_over:
            return True
        wrong = [name for name, value in record.items() if not math.isfinite(value)]
        if wrong:
            self.fail(number, f"{wrong[0]} is {record[wrong[0]]} at epoch {record['epoch']}")
            return True
        trial = before.add(record)
        if trial is before:
            return False
        epochs = self.config.train.epochs
        if not self._is_last(trial) and should_stop(self.config.tune, trial, self.trials, epochs):
            self._end(trial, status="stopped", error="")
            return True
        self._save(trial)
        return False

    def retry(self, number: int, error: str) -> None:
        """A trial crashed and is begun again; one that is over stays so."""
        trial = self._trials[number]
        if not trial.is_over:
            attempts = trial.attempts + 1
            self._save(replace(trial, attempts=attempts, error=_one_line(error)))

    def finish(self, number: int) -> None:
        """A trial came to its end; one that was stopped or failed stays so."""
        trial = self._trials[number]
        if not trial.is_over:
            self._end(trial, status="finished", error="")

    def fail(self, number: int, error: str) -> None:
        """A trial failed for good; the sweep goes on."""
        trial = self._trials[number]
        if not trial.is_over:
            self._end(trial, status="failed", error=_one_line(error))

    def _is_last(self, trial: Trial) -> bool:
        """Whether a trial's newest record is that of its last step."""
        train = self.settings_of(trial).train
        num_steps = order_of(train, self._dataset).num_steps(trial.stop_epochs or train.epochs)
        return trial.records[-1]["step"] >= num_steps

    def _begin(self, trial: Trial) -> Trial:
        self._began_s[trial.number] = self._clock.monotonic()
        self._save(replace(trial, attempts=trial.attempts + 1))
        return self._trials[trial.number]

    def _end(self, trial: Trial, **changes: Any) -> None:
        began_s = self._began_s.get(trial.number, self._clock.monotonic())
        seconds = round(self._clock.monotonic() - began_s, 3)
        self._save(replace(trial, seconds=seconds, **changes))

    def _save(self, trial: Trial) -> None:
        save_trial(self.storage, self.config.run_id, trial)
        self._trials[trial.number] = trial

    def _claim(self, dataset: DatasetVersion) -> None:
        """Write what the sweep is, or refuse the run id of another one."""
        run_id = self.config.run_id
        path = f"runs/{run_id}/sweep.json"
        mine = _identity(self.config, dataset)
        if not self.storage.exists(path):
            if self.storage.exists(f"runs/{run_id}/config.json"):
                raise ConfigError(
                    f"Run {run_id!r} exists and is a single run, not a sweep; use another --run-id."
                )
            self.storage.write_json(path, mine)
            return
        theirs = self.storage.read_json(path)
        is_longer = theirs.get("tune", {}).get("trials", 0) <= self.config.tune.trials
        if is_longer and self.config.tune.search != "pbt":  # whose turns depend on their number
            theirs = {**theirs, "tune": {**theirs["tune"], "trials": self.config.tune.trials}}
        differences = list(_differences("", theirs, mine))
        if differences:
            raise ConfigError(
                f"Sweep {run_id!r} exists with other settings: {'; '.join(differences[:4])}. "
                "Use the same settings to continue it, or another --run-id."
            )
        self.storage.write_json(path, mine)


def _one_line(error: str) -> str:
    return " ".join(error.split())[:LONGEST_ERROR]


def read_space(config: Config) -> Space:
    """The space of the tune section, with its objectives checked.

    Raises:
        ConfigError: They make no sense, by themselves or together.
    """
    check_objectives(config.tune.objectives)
    space = parse_space(config.tune.space, config)
    if config.tune.search == "pbt":
        check_population(config.tune, space)
    if config.tune.search == "grid":
        space.grid()
    return space


def _identity(config: Config, dataset: DatasetVersion) -> dict[str, Any]:
    """What makes a sweep this one: its search, the settings it does not search, and the data."""
    tune = {name: value for name, value in to_dict(config.tune).items() if name not in MEANS}
    return {"tune": tune, **deciding_settings(config), "dataset_digest": dataset.digest}


def _differences(name: str, theirs: Any, mine: Any) -> Sequence[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        prefix = f"{name}." if name else ""
        return [
            line
            for key in sorted({*theirs, *mine})
            for line in _differences(f"{prefix}{key}", theirs.get(key), mine.get(key))
        ]
    return [] if theirs == mine else [f"{name} was {theirs}, now {mine}"]
