"""Batches -> a trained model: the loop every worker runs. It knows nothing of Ray.

    for each step of the order
        wait for my part of its rows, augment it
        forward and backward; tell the other workers; update
        at the end of an epoch: validate, record
        every so often: write a checkpoint

A run that starts with a checkpoint's state goes on at its step: sample order, augmentation,
random numbers and the learning rate are functions of (seed, step), so they carry no state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import TrainConfig
from rayloop.data.batches import Batch, Feed
from rayloop.data.order import SampleOrder
from rayloop.data.transforms import augment, choose
from rayloop.data.versions import Split
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import with_ghost_norms
from rayloop.train.account import Ledger
from rayloop.train.average import WeightAverage
from rayloop.train.divergence import DivergenceWatch, Loss
from rayloop.train.evaluate import evaluate
from rayloop.train.optim import build_optimizer, learning_rate_at
from rayloop.train.step import Stepper, choose_precision
from rayloop.train.watchdog import Phase

Record = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """Who and where a worker is."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Outcome:
    """What the loop leaves: the model, its history by epoch, and where the time went.

    `model` is the average of the weights where `ema_decay` asks for one.
    """

    model: ImageClassifier
    history: list[Record]
    ledger: Ledger
    precision: str
    num_steps: int
    steps_done_here: int = 0

    def figures(self, global_batch_size: int) -> dict[str, Any]:
        """What a run's record says of the loop; rates are those of this session."""
        trained_s = self.ledger.seconds["step"] + self.ledger.seconds["data_wait"]
        images = self.steps_done_here * global_batch_size
        return {
            "history": self.history,
            "steps": self.num_steps,
            "precision": self.precision,
            "images_per_second": round(images / trained_s, 1) if images else 0.0,
            "data_wait_share": round(self.ledger.data_wait_share, 5),
            "step_ms": self.ledger.step_percentiles_ms(),
            "checkpoint_ms": self.ledger.checkpoint_ms,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Where the loop's news go and who may ask for a checkpoint.

    Attributes:
        on_phase: Gets the step and what begins: `data_wait`, `prepare`, `step`, `exchange`,
            `evaluate` or `checkpoint`; on every rank.
        on_losses: Gets the global losses that have been read, in order; on every rank.
        on_step: Gets the number of steps done and the ledger, after each step; on rank 0.
        on_record: Gets a record at the end of each epoch; on rank 0.
        is_checkpoint_due: Asked after each step whether to write one beyond those of the
            configured interval; on rank 0.
        save: Gets the step and the whole state at each checkpoint; on rank 0.
    """

    on_phase: Callable[[int, Phase], None] = lambda *_: None
    on_losses: Callable[[list[Loss]], None] = lambda _: None
    on_step: Callable[[int, Ledger], None] = lambda *_: None
    on_record: Callable[[Record], None] = lambda _: None
    is_checkpoint_due: Callable[[], bool] = lambda: False
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
    last_step: int | None = None,
) -> Outcome:
    """Train from the given state, or from the start, to the last step.

    Args:
        model: The classifier with its initial weights; changed in place.
        config: The train section.
        order: The run's sample order.
        feed: This rank's batches.
        val: Validation rows, the same on every worker.
        worker: Who this worker is; alone on the CPU when left out.
        state: A checkpoint's state to go on from.
        hooks: Where news go.
        clock: For the accounts.
        last_step: Where to stop before the configured end; the learning rate goes on as if the
            whole run were done.

    Raises:
        Diverged: The loss is no longer a number; on every worker at the same step.
    """
    worker, hooks = worker or Worker(), hooks or Hooks()
    num_steps = order.num_steps(config.epochs)
    end = num_steps if last_step is None else min(last_step, num_steps)
    compiles = config.compile or worker.device.type == "cuda"
    run = _Run(model, config, worker, Ledger(clock, first_step_is_compile=compiles), end)
    watch = DivergenceWatch(order, worker.device, trust_norms=run.outcome.precision != "fp16")
    outcome, stepper, is_first = run.outcome, run.stepper, worker.rank == 0
    step = run.restore(state) if state else 0

    @contextmanager
    def during(phase: Phase, of_step: int) -> Iterator[None]:
        hooks.on_phase(of_step, phase)
        with outcome.ledger.spending(phase):
            yield

    batches = iter(feed.batches(step, end))
    while step < end:
        with during("data_wait", step):
            batch = next(batches)
        with during("step", step):
            hooks.on_phase(step, "prepare")
            rate = learning_rate_at(step, num_steps, config)
            images, labels = _prepare(batch, order, config, worker)
            hooks.on_phase(step, "step")
            stepper.backward(images, labels, _seeds(config, order, step, worker))
            hooks.on_phase(step, "exchange")
            totals = stepper.exchange()
            norm = stepper.update(rate)
            run.average_weights(step)
            run.epoch_sums += totals
            hooks.on_losses(watch.add(step, totals[0], norm))
        step += 1
        outcome.steps_done_here += 1
        if is_first:
            hooks.on_step(step, outcome.ledger)
        if step == end or order.epoch_of(step) != order.epoch_of(step - 1):
            with during("evaluate", step - 1):
                record = run.close_epoch(step, order, rate, val)
            if is_first:
                hooks.on_record(record)
        if step == end:
            hooks.on_losses(watch.read())
        is_due = step == end or _is_checkpoint_step(step, order, config)
        if is_first and (is_due or hooks.is_checkpoint_due()):
            with during("checkpoint", step - 1):
                if watch.is_sound():  # a checkpoint never holds a diverged model
                    hooks.save(step, run.state(step))
    return outcome


class _Run:
    """All that changes while a run goes on, and how it becomes a checkpoint's state and back."""

    def __init__(
        self,
        model: ImageClassifier,
        config: TrainConfig,
        worker: Worker,
        ledger: Ledger,
        num_steps: int,
    ) -> None:
        self._config, self._worker = config, worker
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        with_ghost_norms(model, config.norm_group_rows)
        self._model = model.to(worker.device, memory_format=memory_format).train()  # type: ignore[call-overload]
        self._average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        precision = choose_precision(config, worker.device)
        if config.compile:
            model.network.compile()  # in place: the names of the weights stay as they are
        self.stepper = Stepper(
            model, build_optimizer(model, config), config, precision, worker.device,
            worker.world_size,
        )  # fmt: skip
        self.epoch_sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
        """Loss, hits and rows since the epoch began, over all workers."""
        kept = self._average.model if self._average else model
        self.outcome = Outcome(kept, [], ledger, precision, num_steps)

    def average_weights(self, step: int) -> None:
        """Take the newest weights into the average, if one is kept."""
        if self._average:
            self._average.update(step)

    def close_epoch(self, step: int, order: SampleOrder, rate: float, val: Split) -> Record:
        """Validate with all workers, and add one line to the history."""
        loss_sum, num_correct, count = self.epoch_sums.tolist()
        self.epoch_sums.zero_()
        model, worker = self.outcome.model, self._worker
        metrics = evaluate(
            model, val, model.num_classes, self._config.eval_batch_size, worker.device,
            worker.rank, worker.world_size,
        )  # fmt: skip
        record = {
            "step": step,
            "epoch": round(step * order.global_batch_size / order.num_rows, 3),
            "train_loss": loss_sum / count,
            "train_accuracy": num_correct / count,
            "val_loss": metrics.loss,
            "val_accuracy": metrics.accuracy,
            "learning_rate": rate,
            "data_wait_share": self.outcome.ledger.data_wait_share,
        }
        self.outcome.history.append(record)
        return record

    def state(self, step: int) -> dict[str, Any]:
        """Everything that decides the future; the best so far is a line of the history."""
        return {
            "step": step,
            "model": self._model.state_dict(),
            "average": self._average.model.state_dict() if self._average else None,
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "epoch_sums": self.epoch_sums,
            "history": list(self.outcome.history),
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Go back to a state; gives the number of steps that were done then."""
        self._model.load_state_dict(state["model"])
        if self._average:
            self._average.model.load_state_dict(state["average"])
        optimizer = self.stepper.optimizer
        decays = [group.get("weight_decay") for group in optimizer.param_groups]  # filters: none
        optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            if decay is not None:
                group["weight_decay"] = decay  # the settings' own, also where they changed
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.epoch_sums.copy_(state["epoch_sums"])
        self.outcome.history.extend(state["history"])
        return int(state["step"])


def _prepare(
    batch: Batch, order: SampleOrder, config: TrainConfig, worker: Worker
) -> tuple[Tensor, Tensor]:
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


def _seeds(
    config: TrainConfig, order: SampleOrder, step: int, worker: Worker
) -> Callable[[int], int]:
    """Random numbers inside the network (dropout) are a function of the step and the place too."""
    first = order.stripe(step, worker.rank, worker.world_size).start

    def seed(place: int) -> int:
        mixed = np.random.SeedSequence([config.seed, step, first + place])
        return int(mixed.generate_state(1, np.uint64)[0] >> 1)

    return seed


def _is_checkpoint_step(step: int, order: SampleOrder, config: TrainConfig) -> bool:
    """Whether the configured interval ends here."""
    if config.checkpoint_every_epochs == 0:
        return False
    rows_between = config.checkpoint_every_epochs * order.num_rows
    done = step * order.global_batch_size
    return int(done // rows_between) != int((done - order.global_batch_size) // rows_between)
