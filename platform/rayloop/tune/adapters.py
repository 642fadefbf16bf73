"""What Ray Tune asks and tells -> the sweep's answers, in the classes that Tune calls."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray import cloudpickle
from ray.tune.callback import Callback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayloop.logs import stage_logger
from rayloop.train.alone import Segment
from rayloop.tune.progress import Progress
from rayloop.tune.room import Room
from rayloop.tune.suggestion import Wait
from rayloop.tune.sweep import Sweep
from rayloop.tune.track import SweepTracking

log = stage_logger("tune")


class Events:
    """What Tune asks and tells, passed to the sweep first, then to those who show and track it.

    The first error of our own is kept: Tune would wrap it, or take it for a crash of the trial.
    """

    def __init__(
        self, sweep: Sweep, room: Room, tracking: SweepTracking, progress: Progress
    ) -> None:
        self._sweep, self._room, self._tracking, self._progress = sweep, room, tracking, progress
        self._running: set[int] = set()
        self._given_up: set[str] = set()
        """Tune's ids of its trials that have crashed for good."""
        self.error: Exception | None = None

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keep what is raised, so that it ends the sweep as it is."""
        if self.error is not None:
            raise self.error
        try:
            yield
        except Exception as error:
            self.error = error
            raise

    def wanted(self) -> dict[str, Any] | Wait | None:
        """The settings of the trial to begin now, if there is room for one more."""
        if len(self._running) >= self._room.max_concurrent:
            return Wait.FOR_TRIALS
        trial = self._sweep.next()
        if trial is None or isinstance(trial, Wait):
            return trial
        self._running.add(trial.number)
        config = self._sweep.settings_of(trial)
        train = replace(
            config.train, num_workers=self._room.num_workers, min_workers=0,
            cpus_per_worker=self._room.cpus_per_worker, max_failures=0,  # Tune tries again
        )  # fmt: skip
        config = replace(config, train=train)
        self._tracking.begin(trial, config)
        parent = self._sweep.trial(trial.parent).run_id if trial.parent >= 0 else ""
        segment = Segment(begin_with=parent, stop_epochs=trial.stop_epochs)
        return {"number": trial.number, "config": config, "segment": segment}

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        """A trial reported; gives whether it is to stop."""
        if "stuck" in result:
            raise result["stuck"][0]
        if "failed" in result:
            self.ended(number, error=result["failed"])
            return True
        if "costs" in result:
            self._sweep.cost(number, dict(result["costs"]))
            return False
        stop = self._sweep.report(number, dict(result["record"]))
        self._tracking.record(self._sweep.trial(number))
        if stop:
            self._told(number)
        return stop

    def retried(self, number: int, error: str) -> None:
        """A trial crashed and is begun again by Tune."""
        log.warning("trial %d is tried again: %s", number, error)
        self._sweep.retry(number, error)

    def crashed(self, tune_trial: TuneTrial) -> None:
        """A trial crashed and Tune gives it up; as often as is allowed it is begun again."""
        if tune_trial.trial_id in self._given_up:
            return
        self._given_up.add(tune_trial.trial_id)
        number, error = tune_trial.config["number"], _error_of(tune_trial)
        trial = self._sweep.trial(number)
        if not trial.is_over and trial.attempts <= self._sweep.config.tune.max_failures:
            log.warning("trial %d is tried again: %s", number, error)
            self._running.discard(number)
            self._sweep.requeue(number)
        else:
            self.ended(number, error=error)

    def ended(self, number: int, error: str = "") -> None:
        """A trial's work is over."""
        if self._sweep.trial(number).is_over:
            return
        if error:
            self._sweep.fail(number, error)
        else:
            self._sweep.finish(number)
        self._told(number)

    def lost(self, trials: Iterable[TuneTrial]) -> None:
        """Trials that Tune has given up without a word."""
        for trial in trials:
            if trial.status == TuneTrial.ERROR:
                self.crashed(trial)

    def _told(self, number: int) -> None:
        trial = self._sweep.trial(number)
        self._running.discard(number)
        self._tracking.end(trial)
        self._progress.show(trial)


class _OfThisProcess:
    """Tune pickles what it is given, to restore it; a sweep never restores Tune."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Suggestions(_OfThisProcess, Searcher):
    """Tune's question what to run next."""

    def __init__(self, events: Events) -> None:
        super().__init__(metric=None, mode=None)
        self._events = events

    def suggest(self, trial_id: str) -> Any:
        """The next trial's settings; None while there is nothing to do yet."""
        with self._events.keeping_errors():
            wanted = self._events.wanted()
        if wanted is None:
            return Searcher.FINISHED
        return None if isinstance(wanted, Wait) else wanted

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the decisions hear of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's records are on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class Decisions(_OfThisProcess, FIFOScheduler):
    """Tune's question whether a trial goes on."""

    def __init__(self, events: Events) -> None:
        cast(Any, super()).__init__()
        self._events = events

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Go on, or stop."""
        with self._events.keeping_errors():
            stop = self._events.reported(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """The trial's function returned."""
        with self._events.keeping_errors():
            self._events.ended(trial.config["number"])


class Crashes(_OfThisProcess, Callback):
    """Tune's news that a trial crashed, and whether it is begun again."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """Keep the count."""
        with self._events.keeping_errors():
            self._events.retried(trial.config["number"], _error_of(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """The trial crashed once too often, or where Tune does not try again."""
        with self._events.keeping_errors():
            self._events.crashed(trial)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Tune tells nobody of a trial that could not be handed to a used actor."""
        with self._events.keeping_errors():
            self._events.lost(trials)


def _error_of(trial: TuneTrial) -> str:
    """What a crashed trial left, in one line."""
    path = Path(trial.pickled_error_file or "")
    if not path.is_file():
        return "the process that trained it ended without a word"
    error = cloudpickle.loads(path.read_bytes())
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"[:500]
