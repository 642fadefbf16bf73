"""A configuration with a space -> a sweep run by Ray Tune -> TuneResult, on disk and tracked.

Tune starts the trials, hands actors on from one to the next, and tries again what crashed. What is
tried, stopped and remembered is the sweep's (`rayloop.tune.sweep`); nothing of Tune's own state is
kept, so nothing of it can be lost.
"""

import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.tune

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import memory_of_nodes, sizes_of_nodes
from rayloop.config import Config, ModelConfig
from rayloop.data.versions import DatasetVersion, open_version
from rayloop.errors import ConfigError, RequestError, WorkError
from rayloop.locks import exclusive
from rayloop.logs import stage_logger
from rayloop.models.classifier import ImageClassifier, count_parameters
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.claim import new_run_id
from rayloop.train.final_test import final_test
from rayloop.train.start import initial_model, order_of, refuse_useless
from rayloop.tune.adapters import Crashes, Decisions, Events, Suggestions
from rayloop.tune.objective import COSTS
from rayloop.tune.picture import draw_sweep
from rayloop.tune.progress import Progress
from rayloop.tune.result import TuneResult, save_tune_result
from rayloop.tune.room import Room, plan_room
from rayloop.tune.search import front
from rayloop.tune.space import Space, assign
from rayloop.tune.stopping import stopping_rule
from rayloop.tune.sweep import Sweep, read_space
from rayloop.tune.track import SweepTracking
from rayloop.tune.trainable import Measure, TrialWork, run_trial
from rayloop.tune.trial import Trial, lineage

log = stage_logger("tune")

DRAWN_TO_CHECK = 50
"""Draws from the space that are tried against the data before a sweep begins."""


def tune(
    config: Config,
    storage: Storage,
    tracker: Tracker,
    measure: Measure | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> TuneResult:
    """Run, or go on with, the sweep named in the configuration.

    Args:
        config: All settings; an empty `run_id` gets a new name.
        storage: The root.
        tracker: Where the sweep and its trials are tracked, on the driver only.
        measure: Tells what a network costs, where an objective asks for that.
        clock: For names and times.

    Raises:
        RequestError: The space or an objective makes no sense, the data is missing, the cluster has
            no room, or the run id belongs to another sweep.
        WorkError: No trial came to its end.
    """
    space = read_space(config)
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    room = plan_room(config, sizes_of_nodes(), sum(memory_of_nodes()))
    _refuse_useless(space, dataset, room)
    config = _fill_in(config, dataset, clock)
    busy = f"Sweep {config.run_id!r} is being worked on by another process of this machine; wait."
    with exclusive(storage, f"sweep-{config.run_id}", busy):
        return _run_sweep(config, storage, dataset, room, tracker, measure, clock)


def _run_sweep(
    config: Config, storage: Storage, dataset: DatasetVersion, room: Room, tracker: Tracker,
    measure: Measure | None, clock: Clock,
) -> TuneResult:  # fmt: skip
    began_s = clock.monotonic()
    sweep = Sweep(config, storage, dataset, clock)
    _announce(config, room, sweep)
    tracking = SweepTracking(sweep, tracker, storage, dataset)
    wanted = {name for name in config.tune.objectives if name in COSTS}
    work = TrialWork(
        root=storage.root,
        kind=room.kind,
        num_threads=room.cpus_per_worker,
        measure=_Costs(measure, wanted) if wanted else None,
    )
    progress = Progress(sweep)
    with tracking.running(), progress.shown():
        if not sweep.is_complete:
            _run(sweep, room, work, Events(sweep, room, tracking, progress))
        result = _conclude(sweep, storage, tracker, began_s, clock)
        tracking.conclude(result)
    return result


def _fill_in(config: Config, dataset: DatasetVersion, clock: Clock) -> Config:
    """The sweep's name, and the dataset version that all its trials train on."""
    return replace(
        config,
        run_id=config.run_id or f"tune-{new_run_id(config, clock)}",
        data=replace(config.data, version=dataset.version),
    )


def _announce(config: Config, room: Room, sweep: Sweep) -> None:
    tune = config.tune
    log.info("sweep %s searches (%s):", config.run_id, tune.search)
    for line in sweep.space.lines():
        log.info("  %s", line)
    known, over = len(sweep.trials), sum(trial.is_over for trial in sweep.trials)
    log.info(
        "%d trials of %g epochs, %s, early stopping %s; %d at once, each %s",
        sweep.num_trials, config.train.epochs, " and ".join(tune.objectives), stopping_rule(tune),
        room.max_concurrent,
        "in one process" if room.kind == "function" else f"by {room.num_workers} workers",
    )  # fmt: skip
    if known:
        log.info("goes on: %d trials are over, %d were under way", over, known - over)


def _refuse_useless(space: Space, dataset: DatasetVersion, room: Room) -> None:
    """Draw from the space, and refuse it if something that is drawn cannot train on the data."""
    random = np.random.default_rng(0)
    models: dict[ModelConfig, ImageClassifier] = {}
    for _ in range(DRAWN_TO_CHECK):
        assignment = space.sample(random)
        config = assign(space.base, assignment)
        config = replace(config, train=replace(config.train, num_workers=room.num_workers))
        if config.model not in models:
            models[config.model] = initial_model(config, dataset)
        try:
            refuse_useless(config, dataset, models[config.model])
        except RequestError as error:
            told = ", ".join(f"{field}={value}" for field, value in assignment.items())
            raise ConfigError(f"tune.space allows {told}, and that is refused: {error}") from None
    if space.base.tune.search == "pbt":
        train = space.base.train
        turn = space.base.tune.perturb_epochs * order_of(train, dataset).num_rows
        if turn < train.global_batch_size:
            raise ConfigError(
                f"tune.perturb_epochs={space.base.tune.perturb_epochs} is less than one step of "
                f"{train.global_batch_size} rows; use a longer turn."
            )


class _Costs:
    """Measures those costs of a network that are wanted."""

    def __init__(self, measure: Measure | None, wanted: set[str]) -> None:
        if measure is None and wanted - {"num_parameters"}:
            raise ConfigError(
                f"tune.objectives names {', '.join(sorted(wanted))}, and there is nothing here "
                "that measures it; run jobs/tune.py."
            )
        self._measure, self._wanted = measure, wanted

    def __call__(self, storage: Storage, config: Config) -> dict[str, float]:
        dataset = open_version(storage, config.data.dataset_name, config.data.version)
        found = {"num_parameters": float(count_parameters(initial_model(config, dataset)))}
        if self._measure and self._wanted - set(found):
            found |= self._measure(storage, config)
        return {name: found[name] for name in self._wanted}


def _run(sweep: Sweep, room: Room, work: TrialWork, events: Events) -> None:
    """Let Tune run what the sweep suggests, until nothing is left."""
    config = sweep.config
    function = room.kind == "function"
    resources = {
        "CPU": room.cpus_per_worker if function else 0.01,
        "GPU": room.gpus_per_worker if function else 0,
    }
    trainable = ray.tune.with_parameters(run_trial, work=work)
    files, folder = sweep.storage.for_library(f"runs/{config.run_id}/ray")
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=Suggestions(events),
            scheduler=Decisions(events),
            num_samples=-1,
            reuse_actors=function,
        ),
        run_config=ray.tune.RunConfig(
            name=f"session-{uuid.uuid4().hex[:6]}",
            storage_path=folder,
            storage_filesystem=files,
            failure_config=ray.tune.FailureConfig(max_failures=config.tune.max_failures),
            callbacks=[Crashes(events)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except ray.tune.TuneError:
        if events.error is None:
            raise
    finally:
        sweep.storage.remove(f"runs/{config.run_id}/ray")
    if events.error is not None:
        raise events.error
    if not sweep.is_complete:
        raise WorkError(
            f"Sweep {config.run_id} was ended before all its trials were over; go on with it by "
            "the same command."
        )


def _conclude(
    sweep: Sweep, storage: Storage, tracker: Tracker, began_s: float, clock: Clock
) -> TuneResult:
    """Test the winner, once, draw the picture, and write the record."""
    config, trials, winner = sweep.config, sweep.trials, sweep.best()
    if winner is None:
        errors = [trial.error for trial in trials if trial.error]
        raise WorkError(
            f"None of the {len(trials)} trials of sweep {config.run_id} came to its end. The first "
            f"error: {errors[0] if errors else 'none was recorded'}"
        )
    tracked = tracker.find(winner.run_id) or ""
    tested = final_test(storage, winner.run_id, config.train, tracked)
    picture = f"runs/{config.run_id}/sweep.png"
    storage.write(picture, draw_sweep(config.tune, trials, winner, config.run_id))
    statuses = [trial.status for trial in trials]
    result = TuneResult(
        run_id=config.run_id,
        best_run_id=winner.run_id,
        best_config=winner.assignment,
        best_score=winner.figures[config.tune.objectives[0]],
        objectives=config.tune.objectives,
        test_accuracy=tested.test_accuracy,
        floor_accuracy=tested.floor_accuracy,
        num_trials=len(trials),
        finished=statuses.count("finished"),
        stopped=statuses.count("stopped"),
        failed=statuses.count("failed"),
        budget_epochs=round(sweep.budget_epochs, 3),
        schedule=_schedule(trials, winner),
        front=[trial.run_id for trial in front(config.tune, trials)],
        picture=picture,
        seconds=round(clock.monotonic() - began_s, 3),
    )
    save_tune_result(storage, result)
    told = " ".join(_flag(field, value) for field, value in winner.assignment.items())
    if result.schedule:
        log.info("best: %s, whose settings changed on the way: see schedule", winner.run_id)
    else:
        log.info("best: %s; the same as a single run, with %s", winner.run_id, told)
    return result


def _schedule(trials: list[Trial], winner: Trial) -> list[dict[str, Any]]:
    line = lineage(trials, winner)
    if len(line) == 1:
        return []
    return [
        {"from_epoch": trial.start_epoch, "run_id": trial.run_id, **trial.assignment}
        for trial in line
    ]


def _flag(field: str, value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, bool):
        section, name = field.rsplit(".", 1)
        return f"--{field}" if value else f"--{section}.no-{name}"
    return f"--{field} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
