"""What one Ray Train worker does: find its place, open its feed, run the loop, report the end."""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed

from rayloop import __version__
from rayloop.config import Config
from rayloop.data.batches import Feed, ResidentFeed
from rayloop.data.feed import StreamFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, Split
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.train.account import flops_per_image, measured_peak_flops
from rayloop.train.checkpoint import checkpoint_digest, newest_good, save_checkpoint
from rayloop.train.evaluate import evaluate
from rayloop.train.loop import Hooks, Outcome, Worker, run_loop


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerTask:
    """All a worker needs; small enough to be sent to each of them.

    Attributes:
        config: The run's settings, its `run_id` filled in.
        storage: Where checkpoints go.
        dataset: The dataset version.
        splits: Object references to the splits in Ray's object store; without `train` where the
            feed is the stream.
        board: Handle of the progress board.
        about: What every checkpoint's manifest says.
    """

    config: Config
    storage: Storage
    dataset: DatasetVersion
    splits: dict[str, Any]
    board: Any
    about: dict[str, str]


def train_worker(settings: dict[str, WorkerTask]) -> dict[str, Any] | None:
    """Run one worker to the end of training; rank 0 returns the summary."""
    task = settings["task"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(task.config.train.cpus_per_worker)
    torch.set_num_interop_threads(1)
    worker = Worker(rank=rank, world_size=world_size, device=device)
    splits = {name: ray.get(reference) for name, reference in task.splits.items()}
    order = SampleOrder(
        task.dataset.splits["train"], task.config.train.global_batch_size, task.config.train.seed
    )
    checkpoint = newest_good(task.storage, task.config.run_id)
    outcome = run_loop(
        _build_model(task),
        task.config.train,
        order,
        _open_feed(task, splits, order, worker),
        splits["val"],
        worker,
        state=checkpoint.state if checkpoint else None,
        hooks=_hooks(task),
    )
    summary = _summary(task, splits["test"], outcome, worker)
    summary["resumed_at_step"] = checkpoint.step if checkpoint else 0
    return summary if rank == 0 else None


def _build_model(task: WorkerTask) -> ImageClassifier:
    dataset = task.dataset
    return build_classifier(
        task.config.model,
        dataset.shape,
        len(dataset.class_names),
        dataset.pixel_mean,
        dataset.pixel_std,
        task.config.train.seed,
    )


def _open_feed(
    task: WorkerTask, splits: dict[str, Split], order: SampleOrder, worker: Worker
) -> Feed:
    if "train" in splits:
        return ResidentFeed(splits["train"], order, worker.rank, worker.world_size)
    shard = ray.train.get_dataset_shard("train")
    return StreamFeed(shard, order, worker.rank, worker.world_size)


def _hooks(task: WorkerTask) -> Hooks:
    config, board = task.config, task.board
    keep = config.train.keep_checkpoints

    def save(step: int, state: dict[str, Any]) -> None:
        save_checkpoint(task.storage, config.run_id, step, state, task.about, keep)

    return Hooks(
        on_record=lambda record: board.add_record.remote(record),
        on_step=lambda step: board.set_step.remote(step) if step % 10 == 0 else None,
        save=save,
    )


def _summary(task: WorkerTask, test: Split, outcome: Outcome, worker: Worker) -> dict[str, Any]:
    """Test the final model with all workers; then figures that only rank 0 needs."""
    config, model, ledger = task.config, outcome.model, outcome.ledger
    with ledger.spending("evaluate"):
        tested = evaluate(
            model, test, model.num_classes, config.train.eval_batch_size, worker.device,
            worker.rank, worker.world_size,
        )  # fmt: skip
    if worker.rank != 0:
        return {}
    trained_s = ledger.seconds["step"] + ledger.seconds["data_wait"]
    images = outcome.steps_done_here * config.train.global_batch_size
    rate = images / trained_s if images else 0.0
    mfu = None
    if images and not config.train.compile:
        peak = measured_peak_flops(worker.device, outcome.precision) * worker.world_size
        mfu = round(flops_per_image(model, task.dataset.shape) * rate / peak, 4)
    return {
        "checkpoint_digest": checkpoint_digest(model),
        "test_accuracy": tested.accuracy,
        "history": outcome.history,
        "steps": outcome.num_steps,
        "precision": outcome.precision,
        "images_per_second": round(rate, 1),
        "data_wait_share": round(ledger.data_wait_share, 5),
        "mfu": mfu,
        "step_ms": ledger.step_percentiles_ms(),
        "ledger_s": {cause: round(spent, 3) for cause, spent in ledger.seconds.items()},
    }


def manifest_about(config_digest: str, dataset: DatasetVersion) -> dict[str, str]:
    """What a checkpoint's manifest says of where it comes from."""
    return {
        "config_digest": config_digest,
        "dataset": f"{dataset.name}:{dataset.version}",
        "dataset_digest": dataset.digest,
        "rayloop": __version__,
        "torch": torch.__version__,
        "ray": ray.__version__,
    }
