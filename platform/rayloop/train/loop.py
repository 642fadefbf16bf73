"""Batches -> a trained model: the loop every worker runs. It knows nothing of Ray.

    for each step of the order
        wait for my part of its rows, augment it, update the model
        at the end of an epoch: validate, record
        every so often: write a checkpoint

A run that starts with a checkpoint's state goes on at its step: sample order, augmentation,
random numbers and the learning rate are functions of (seed, step), so they carry no state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import TrainConfig
from rayloop.data.batches import Batch, Feed
from rayloop.data.order import SampleOrder
from rayloop.data.transforms import augment, choose
from rayloop.data.versions import Split
from rayloop.errors import Diverged
from rayloop.models.classifier import ImageClassifier
from rayloop.train.account import Ledger
from rayloop.train.evaluate import evaluate
from rayloop.train.optim import build_optimizer, learning_rate_at
from rayloop.train.step import Stepper, choose_precision

Record = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """Who and where a worker is."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Outcome:
    """What the loop leaves: the model, its history by epoch, and where the time went."""

    model: ImageClassifier
    history: list[Record]
    ledger: Ledger
    precision: str
    num_steps: int
    steps_done_here: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Where the loop's news go; each is called on rank 0 only.

    Attributes:
        on_record: Gets a record at the end of each epoch.
        on_step: Gets the number of steps done, after each step.
        save: Gets the step and the whole state at each checkpoint.
    """

    on_record: Callable[[Record], None] = lambda _: None
    on_step: Callable[[int], None] = lambda _: None
    save: Callable[[int, dict[str, Any]], None] = lambda *_: None


def run_loop(
    model: ImageClassifier,
    config: TrainConfig,
    order: SampleOrder,
    feed: Feed,
    val: Split,
    worker: Worker | None = None,
    state: dict[str, Any] | None = None,
    hooks: Hooks | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Train from the given state, or from the start, to the last step.

    Args:
        model: The classifier with its initial weights.
        config: The train section.
        order: The run's sample order.
        feed: This rank's batches.
        val: Validation rows, the same on every worker.
        worker: Who this worker is; alone on the CPU when left out.
        state: A checkpoint's state to go on from.
        hooks: Where news go.
        clock: For the accounts.

    Raises:
        Diverged: The loss is no longer a number.
    """
    worker, hooks = worker or Worker(), hooks or Hooks()
    device, is_first = worker.device, worker.rank == 0
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).train()  # type: ignore[call-overload]
    precision = choose_precision(config, device)
    stepper = Stepper(
        _wrap(model, config, worker), build_optimizer(model, config), config, precision, device
    )
    num_steps = order.num_steps(config.epochs)
    outcome = Outcome(model, [], Ledger(clock), precision, num_steps)
    step = _restore(stepper, model, outcome, state) if state else 0
    sums = _Sums(device)
    ledger = outcome.ledger
    batches = iter(feed.batches(step, num_steps))
    while step < num_steps:
        with ledger.spending("data_wait"):
            batch = next(batches)
        with ledger.spending("step"):
            rate = learning_rate_at(step, num_steps, config)
            images, labels = _prepare(batch, order, config, worker)
            torch.manual_seed(_step_seed(config.seed, step, worker.rank))
            result = stepper(images, labels, rate)
            sums.add(result.loss_sum, result.num_correct, len(labels))
            if device.type == "cpu":
                _refuse_nan(float(result.loss_sum), step)
        step += 1
        outcome.steps_done_here += 1
        ends_epoch = step == num_steps or order.epoch_of(step) != order.epoch_of(step - 1)
        if is_first:
            hooks.on_step(step)
        if ends_epoch:
            with ledger.spending("evaluate"):
                record = _close_epoch(step, order, rate, sums, model, val, config, worker)
                record["data_wait_share"] = ledger.data_wait_share
            outcome.history.append(record)
            if is_first:
                hooks.on_record(record)
        if is_first and (step == num_steps or _is_checkpoint_step(step, order, config)):
            with ledger.spending("checkpoint"):
                _refuse_nan(sums.loss_sum(), step)  # a checkpoint never holds a diverged model
                hooks.save(step, _state(stepper, model, outcome, step))
    return outcome


class _Sums:
    """Loss, hits and rows of an epoch, kept on the device until someone asks."""

    def __init__(self, device: torch.device) -> None:
        self._values = torch.zeros(2, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, loss_sum: torch.Tensor, num_correct: torch.Tensor, count: int) -> None:
        self._values += torch.stack([loss_sum.double(), num_correct.double()])
        self._count += count

    def loss_sum(self) -> float:
        return float(self._values[0])

    def take(self) -> tuple[float, float, int]:
        loss_sum, num_correct = self._values.tolist()
        count, self._count = self._count, 0
        self._values.zero_()
        return loss_sum, num_correct, count


def _wrap(model: ImageClassifier, config: TrainConfig, worker: Worker) -> nn.Module:
    network: nn.Module = model
    if config.compile:
        model.network.compile()  # in place: the names of the weights stay as they are
    if worker.world_size > 1:
        ids = [worker.device.index] if worker.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    return network


def _prepare(
    batch: Batch, order: SampleOrder, config: TrainConfig, worker: Worker
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring a batch's bytes to the device once, and augment them there."""
    rows, epochs = order.rows(batch.step)
    stripe = order.stripe(batch.step, worker.rank, worker.world_size)
    choices = choose(config.augment, config.seed, batch.step, rows, epochs, stripe)
    images = torch.from_numpy(_writable(batch.images)).to(worker.device, non_blocking=True)
    labels = torch.from_numpy(_writable(batch.labels)).to(worker.device, non_blocking=True)
    return augment(images, choices, config.augment), labels


def _writable(values: Any) -> Any:
    """Torch warns about read-only arrays, such as those that lie in Ray's object store."""
    return values if values.flags.writeable else values.copy()


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers inside the network (dropout) are a function of the step and the rank too."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _refuse_nan(loss_sum: float, step: int) -> None:
    if not np.isfinite(loss_sum):
        raise Diverged(
            f"The training loss became {loss_sum} at step {step}. The last good checkpoint is "
            "kept. Lower --train.learning_rate, or use --train.precision fp32."
        )


def _is_checkpoint_step(step: int, order: SampleOrder, config: TrainConfig) -> bool:
    rows_between = config.checkpoint_every_epochs * order.num_rows
    done = step * order.global_batch_size
    return int(done // rows_between) != int((done - order.global_batch_size) // rows_between)


def _close_epoch(
    step: int,
    order: SampleOrder,
    rate: float,
    sums: _Sums,
    model: ImageClassifier,
    val: Split,
    config: TrainConfig,
    worker: Worker,
) -> Record:
    """Validate, and give one line of the history; its training figures are this rank's rows'."""
    loss_sum, num_correct, count = sums.take()
    _refuse_nan(loss_sum, step)
    metrics = evaluate(
        model,
        val,
        model.num_classes,
        config.eval_batch_size,
        worker.device,
        worker.rank,
        worker.world_size,
    )
    return {
        "step": step,
        "epoch": round(step * order.global_batch_size / order.num_rows, 3),
        "train_loss": loss_sum / count,
        "train_accuracy": num_correct / count,
        "val_loss": metrics.loss,
        "val_accuracy": metrics.accuracy,
        "learning_rate": rate,
    }


def _state(stepper: Stepper, model: nn.Module, outcome: Outcome, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": stepper.optimizer.state_dict(),
        "scaler": stepper.scaler.state_dict(),
        "history": outcome.history,
    }


def _restore(stepper: Stepper, model: nn.Module, outcome: Outcome, state: dict[str, Any]) -> int:
    model.load_state_dict(state["model"])
    stepper.optimizer.load_state_dict(state["optimizer"])
    stepper.scaler.load_state_dict(state["scaler"])
    outcome.history.extend(state["history"])
    return int(state["step"])
