"""Settings and a dataset version -> a finished run, trained in this process alone, without Ray.

The run is the one that `rayloop.train.run` would make: the same folder, checkpoints and record,
and, with `train.worker_invariant`, the same weights bit for bit as any number of workers gives.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import Config
from rayloop.data.batches import ResidentFeed
from rayloop.data.versions import DatasetVersion, Split
from rayloop.errors import DataMissing
from rayloop.storage import Storage
from rayloop.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoint_digest,
    is_due,
    newest_good,
    refuse_foreign_state,
    refuse_other_manifest,
    save_checkpoint,
)
from rayloop.train.claim import claim_run, run_digest
from rayloop.train.loop import Hooks, Outcome, Record, Worker, run_loop
from rayloop.train.result import TrainResult, facts_of, load_result, save_result
from rayloop.train.start import initial_model, manifest_about, order_of, refuse_useless
from rayloop.train.watchdog import Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of a run that goes on with another run's state, for population-based training.

    Attributes:
        begin_with: Run whose newest checkpoint it goes on from; empty begins anew.
        stop_epochs: Passes over the training split after which it stops; 0 is the whole run.
    """

    begin_with: str = ""
    stop_epochs: float = 0.0


def train_alone(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    splits: dict[str, Split],
    on_record: Callable[[Record], None],
    segment: Segment | None = None,
    clock: Clock = SYSTEM_CLOCK,
    on_phase: Callable[[int, Phase], None] = lambda *_: None,
) -> TrainResult:
    """Train the run named in the configuration, or go on with it, on one worker.

    The test split is not touched. An exception out of `on_record` stops the run; the same call
    later goes on at the newest checkpoint.

    Args:
        config: All settings, `run_id` filled in.
        storage: The root.
        dataset: The dataset version.
        splits: `train` and `val` rows.
        on_record: Gets every epoch's record in order, those before the newest checkpoint too.
        segment: Which part of a run it is; the whole run when left out.
        clock: For the accounts.
        on_phase: Gets the step and what begins, as a watchdog's `mark` does.

    Raises:
        RequestError: The settings cannot train on this data, or the run id belongs to others.
        Diverged: The loss is no longer a number.
    """
    segment = segment or Segment()
    began_s = clock.monotonic()
    model, order = initial_model(config, dataset), order_of(config.train, dataset)
    refuse_useless(config, dataset, model)
    claim_run(config, dataset, storage)
    if storage.exists(f"runs/{config.run_id}/result.json"):
        done = load_result(storage, config.run_id)
        for record in done.history:
            on_record(record)
        return done
    about = manifest_about(run_digest(config), dataset)
    start = _start(config, storage, segment, about)
    if start:
        refuse_foreign_state(start, model)
        for record in start.state["history"]:
            on_record(record)

    def write(step: int, state: dict[str, Any]) -> str:
        keep = config.train.keep_checkpoints
        return save_checkpoint(storage, config.run_id, step, state, about, keep)

    with CheckpointWriter(write) as writer:
        outcome = run_loop(
            model,
            config.train,
            order,
            ResidentFeed(splits["train"], order, 0, 1),
            splits["val"],
            Worker(device=torch.device("cuda" if config.train.use_gpu else "cpu")),
            state=start.state if start else None,
            hooks=replace(_hooks(config, writer, on_record, clock), on_phase=on_phase),
            clock=clock,
            last_step=order.num_steps(segment.stop_epochs) if segment.stop_epochs else None,
        )
    result = _result(config, storage, dataset, outcome, start)
    result = replace(result, seconds=round(clock.monotonic() - began_s, 3))
    save_result(storage, result, newest=False)
    return result


def _start(
    config: Config, storage: Storage, segment: Segment, about: dict[str, str]
) -> Checkpoint | None:
    """Where to go on: at the run's own newest checkpoint, else at the end of the one before it."""
    own = newest_good(storage, config.run_id)
    if own:
        refuse_other_manifest(own, about)
        return own
    if not segment.begin_with:
        return None
    before = newest_good(storage, segment.begin_with)
    if before is None:
        raise DataMissing(
            f"Run {segment.begin_with!r}, which {config.run_id!r} goes on with, has no checkpoint "
            f"under {storage.path('runs', segment.begin_with)} any more."
        )
    return before


def _hooks(
    config: Config, writer: CheckpointWriter, on_record: Callable[[Record], None], clock: Clock
) -> Hooks:
    """Records go to the caller, checkpoints to the writer, as often as their cost share allows."""
    train = config.train
    saved_at_s = clock.monotonic()

    def is_checkpoint_due() -> bool:
        since_s = clock.monotonic() - saved_at_s
        free = train.checkpoint_every_epochs == 0
        return free and is_due(since_s, writer.cost_s, train.checkpoint_cost_share)

    def save(step: int, state: dict[str, Any]) -> None:
        nonlocal saved_at_s
        writer.save(step, state)
        saved_at_s = clock.monotonic()

    return Hooks(on_record=on_record, is_checkpoint_due=is_checkpoint_due, save=save)


def _result(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    outcome: Outcome,
    start: Checkpoint | None,
) -> TrainResult:
    causes = outcome.ledger.causes()
    return TrainResult(
        **facts_of(config, dataset, outcome.model, storage),
        **outcome.figures(config.train.global_batch_size),
        checkpoint_digest=checkpoint_digest(outcome.model),
        val_accuracy=outcome.history[-1]["val_accuracy"],
        test_accuracy=None,
        floor_accuracy=None,
        mfu=None,
        goodput=round(causes.get("step", 0.0) / max(1e-9, sum(causes.values())), 4),
        seconds=0.0,
        feed="resident",
        num_workers=1,
        resumed_at_step=start.step if start else 0,
        ledger_s={cause: round(spent, 3) for cause, spent in causes.items()},
    )
