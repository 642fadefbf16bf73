"""What one Ray Train worker does: find its place, open its feed, run the loop, report the end."""

import contextlib
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import Config
from rayloop.data.batches import Feed, ResidentFeed
from rayloop.data.feed import StreamFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, Split
from rayloop.errors import Diverged, RayloopError, StorageUnreachable
from rayloop.models.classifier import ImageClassifier
from rayloop.storage import Storage
from rayloop.train.account import (
    Ledger,
    datasheet_peak_flops,
    flops_per_image,
    measured_peak_flops,
    mfu,
)
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
from rayloop.train.evaluate import evaluate
from rayloop.train.loop import Hooks, Outcome, Worker, run_loop
from rayloop.train.start import initial_model, order_of
from rayloop.train.watchdog import Hang, Watchdog, describe

NOTE_INTERVAL_S = 0.5
"""Seconds between two signs of life of rank 0 to the progress board."""
SAVE_INTERVAL_UNDER_NOTICE_S = 2.0
"""Seconds between two checkpoints once the node is known to go away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerTask:
    """All a worker needs; small enough to be sent to each of them.

    Attributes:
        config: The run's settings, its `run_id` and `cpus_per_worker` filled in.
        storage: Where checkpoints go.
        dataset: The dataset version.
        splits: Object references to the splits in Ray's object store; without `train` where the
            feed is the stream, and without `test` where the test split is not to be touched.
        board: Handle of the progress board.
        about: What every checkpoint's manifest says.
    """

    config: Config
    storage: Storage
    dataset: DatasetVersion
    splits: dict[str, Any]
    board: Any
    about: dict[str, str]

    @property
    def order(self) -> SampleOrder:
        """The run's sample order."""
        return order_of(self.config.train, self.dataset)


def train_worker(settings: dict[str, WorkerTask]) -> dict[str, Any] | None:
    """Run one worker to the end of training; rank 0 returns the summary, or a final error.

    An error of rayloop's own would come again at every restart, but for a server's silence. All
    workers meet a diverged loss at the same step and return; any other is left on the board, where
    the restarted workers find it and return too.
    """
    task = settings["task"]
    final: RayloopError | None = ray.get(task.board.final_error.remote())
    if final is not None:
        return {"error": final}
    try:
        return _train(task)
    except Diverged as error:
        return {"error": error}
    except StorageUnreachable:
        raise  # it may answer when the workers have started again
    except RayloopError as error:
        ray.get(task.board.set_final_error.remote(error))
        raise


def _train(task: WorkerTask) -> dict[str, Any] | None:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(task.config.train.cpus_per_worker)
    with contextlib.suppress(RuntimeError):  # it can be set once in a process only
        torch.set_num_interop_threads(1)
    worker = Worker(rank=rank, world_size=world_size, device=ray.train.torch.get_device())
    splits = {name: ray.get(reference) for name, reference in task.splits.items()}
    model = initial_model(task.config, task.dataset)
    checkpoint = _newest_of_this_run(task, model)
    first_step = checkpoint.step if checkpoint else 0
    if rank == 0:
        group = ray.util.get_current_placement_group()
        task.board.begin_attempt.remote(first_step, group.id.hex() if group else "")
    with _watched(task, worker) as watchdog, _hooks(task, watchdog, world_size) as hooks:
        outcome = run_loop(
            model,
            task.config.train,
            task.order,
            _open_feed(task, splits, worker),
            splits["val"],
            worker,
            state=checkpoint.state if checkpoint else None,
            hooks=hooks,
        )
        watchdog.mark(outcome.num_steps - 1, "evaluate")
        summary = _summary(task, splits.get("test"), outcome, worker)
    summary["resumed_at_step"] = first_step
    return summary if rank == 0 else None


def _newest_of_this_run(task: WorkerTask, model: ImageClassifier) -> Checkpoint | None:
    checkpoint = newest_good(task.storage, task.config.run_id)
    if checkpoint:
        refuse_other_manifest(checkpoint, task.about)
        refuse_foreign_state(checkpoint, model)
    return checkpoint


def _open_feed(task: WorkerTask, splits: dict[str, Split], worker: Worker) -> Feed:
    if "train" in splits:
        return ResidentFeed(splits["train"], task.order, worker.rank, worker.world_size)
    shard = ray.train.get_dataset_shard("train")
    return StreamFeed(shard, task.order, worker.rank, worker.world_size)


@contextlib.contextmanager
def _hooks(task: WorkerTask, watchdog: Watchdog, world_size: int) -> Iterator[Hooks]:
    """What rank 0 does with the loop's news; checkpoints are written beside the training."""
    config, board = task.config, task.board
    about = {**task.about, "world_size": str(world_size)}
    noted_at_s = -NOTE_INTERVAL_S

    def write(step: int, state: dict[str, Any]) -> str:
        keep = config.train.keep_checkpoints
        return save_checkpoint(task.storage, config.run_id, step, state, about, keep)

    def note(step: int, ledger: Ledger) -> None:
        nonlocal noted_at_s
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s - noted_at_s >= NOTE_INTERVAL_S:
            noted_at_s = now_s
            board.note.remote(step, ledger.causes())

    with CheckpointWriter(write) as writer:
        times = _CheckpointTimes(writer, config)
        yield Hooks(
            on_phase=watchdog.mark,
            on_step=note,
            on_record=lambda record: board.add_record.remote(record),
            is_checkpoint_due=times.is_due,
            save=times.save,
        )


class _CheckpointTimes:
    """When rank 0 writes a checkpoint beyond those of a configured interval."""

    def __init__(self, writer: CheckpointWriter, config: Config) -> None:
        self._writer, self._train = writer, config.train
        self._saved_at_s = SYSTEM_CLOCK.monotonic()
        self._saved_under_notice = False

    def is_due(self) -> bool:
        """At once and then often when the node goes away; else as the cost share allows."""
        since_s = SYSTEM_CLOCK.monotonic() - self._saved_at_s
        if node_goes_away():
            return not self._saved_under_notice or since_s >= SAVE_INTERVAL_UNDER_NOTICE_S
        if self._train.checkpoint_every_epochs > 0:
            return False
        return is_due(since_s, self._writer.cost_s, self._train.checkpoint_cost_share)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Hand a state to the writer; under notice also wait until it is on disk."""
        self._writer.save(step, state)
        if node_goes_away():
            self._writer.flush()
            self._saved_under_notice = True
        self._saved_at_s = SYSTEM_CLOCK.monotonic()


def node_goes_away() -> bool:
    """Whether Ray has announced that a node of this run is to be taken away.

    Ray's public `get_preemption_info` waits for all workers at each call; this reads the value it
    would send around, which Ray sets on every worker.
    """
    from ray.train.v2._internal.execution.context import (  # noqa: PLC0415  internal, see above
        get_train_context,
    )

    info = get_train_context().preemption_context.preemption_info
    return info is not None


@contextlib.contextmanager
def _watched(task: WorkerTask, worker: Worker) -> Iterator[Watchdog]:
    """A watchdog over the training thread that ends this process if it holds up the others."""
    timeout_s = task.config.train.step_timeout_s
    run_folder = task.storage.local_path("runs", task.config.run_id, "hangs")
    folder = run_folder or Path(tempfile.gettempdir())
    if timeout_s > 0:
        folder.mkdir(parents=True, exist_ok=True)

    def end_if_suspect(hang: Hang) -> None:
        name = f"runs/{task.config.run_id}/hangs/rank-{hang.rank}-step-{hang.step}.txt"
        task.storage.write(name, f"{describe(hang)}\n\n{hang.stack}".encode())
        ray.get(task.board.hang.remote(hang))
        threading.Event().wait(timeout_s / 2)  # the others fall silent later
        suspects = ray.get(task.board.suspects.remote(worker.world_size))
        reported = {report.rank for report in ray.get(task.board.hangs.remote())}
        nobody_will_end_itself = not reported & set(suspects)
        if worker.rank in suspects or nobody_will_end_itself:
            os.kill(os.getpid(), signal.SIGKILL)  # Ray then starts all workers again

    dump_path = folder / f"rank-{worker.rank}-{uuid.uuid4().hex[:8]}.stacks"
    watchdog = Watchdog(
        worker.rank, timeout_s, end_if_suspect, dump_path if timeout_s > 0 else None
    )
    with watchdog:
        yield watchdog


def _summary(
    task: WorkerTask, test: Split | None, outcome: Outcome, worker: Worker
) -> dict[str, Any]:
    """Test the final model with all workers; then figures that only rank 0 needs."""
    config, model, ledger = task.config, outcome.model, outcome.ledger

    def tested(flip: bool) -> float | None:
        return None if test is None else evaluate(
            model, test, model.num_classes, config.train.eval_batch_size, worker.device,
            worker.rank, worker.world_size, flip,
        ).accuracy  # fmt: skip

    with ledger.spending("evaluate"):
        accuracy = tested(flip=False)
        accuracy_flip = tested(flip=True) if config.train.test_flip else None
    if worker.rank != 0:
        return {}
    task.board.note.remote(outcome.num_steps, ledger.causes())
    figures = outcome.figures(config.train.global_batch_size)
    return {
        **figures,
        "checkpoint_digest": checkpoint_digest(model),
        "test_accuracy": accuracy,
        "test_accuracy_flip": accuracy_flip,
        "num_workers": worker.world_size,
        **_use_of_hardware(task, outcome, worker, figures["images_per_second"]),
    }


def _use_of_hardware(
    task: WorkerTask, outcome: Outcome, worker: Worker, images_per_second: float
) -> dict[str, float | None]:
    """Counted operations over the peak that was measured here, and over the datasheet's."""
    if not images_per_second:
        return {"mfu": None, "mfu_datasheet": None}
    flops = flops_per_image(outcome.model, task.dataset.shape)
    measured = measured_peak_flops(worker.device, outcome.precision)
    is_gpu = worker.device.type == "cuda"
    name = torch.cuda.get_device_name(worker.device) if is_gpu else "cpu"
    datasheet = datasheet_peak_flops(name, outcome.precision)
    each = images_per_second / worker.world_size
    return {
        "mfu": _rounded(mfu(flops, each, measured)),
        "mfu_datasheet": _rounded(mfu(flops, each, datasheet) if datasheet else None),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
