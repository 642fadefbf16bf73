"""The loop without Ray: it learns, resumes bit for bit, and stops when the loss is no number."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayloop.config import AugmentConfig, ModelConfig, TrainConfig
from rayloop.data.batches import Batch, ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, Split
from rayloop.errors import Diverged
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.train import floor
from rayloop.train.account import Ledger
from rayloop.train.checkpoint import checkpoint_digest, newest_good, save_checkpoint
from rayloop.train.floor import linear_floor
from rayloop.train.loop import Hooks, Outcome, run_loop

SHAPE = (6, 6, 1)
CONFIG = TrainConfig(
    epochs=3,
    global_batch_size=10,
    num_workers=1,
    learning_rate=0.02,
    checkpoint_every_epochs=0.5,
    augment=AugmentConfig(translate_px=1, erase_share=0.2),
)


def rows(count: int, seed: int = 0) -> Split:
    """Images of two classes, told apart by which half is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    images = random.integers(0, 100, (count, *SHAPE), dtype=np.uint8)
    images[labels == 0, :3] += 100
    images[labels == 1, 3:] += 100
    return Split(images, labels, np.arange(count))


TRAIN, VAL = rows(44), rows(21, seed=1)


def model_of(name: str = "fastnet", seed: int = 0) -> ImageClassifier:
    """A small model."""
    return build_classifier(ModelConfig(name=name, widths=(4, 8)), SHAPE, 2, (0.3,), (0.2,), seed)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors on one thread: faster, and the same whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stopped(Exception):
    """Stands for a worker that dies."""


def run(
    config: TrainConfig = CONFIG, state: dict[str, Any] | None = None, hooks: Hooks | None = None
) -> Outcome:
    """Train a fresh model, or go on from a state."""
    order = SampleOrder(len(TRAIN), config.global_batch_size, config.seed)
    feed = ResidentFeed(TRAIN, order, 0, 1)
    return run_loop(model_of(seed=config.seed), config, order, feed, VAL, state=state, hooks=hooks)


def test_the_loop_learns_and_tells_each_epoch() -> None:
    records: list[dict[str, float]] = []
    steps: list[int] = []
    config = replace(CONFIG, epochs=6, augment=AugmentConfig(flip=False, translate_px=0))
    outcome = run(
        config, hooks=Hooks(on_record=records.append, on_step=lambda step, _: steps.append(step))
    )
    assert outcome.num_steps == outcome.steps_done_here == 26
    assert steps == list(range(1, 27))
    assert records == outcome.history
    assert [round(record["epoch"]) for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["val_accuracy"] > 0.9
    assert all(0 <= record["train_accuracy"] <= 1 for record in records)
    assert len(outcome.ledger.step_seconds) == 26


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    once, again = (checkpoint_digest(run().model) for _ in range(2))
    assert once == again
    assert checkpoint_digest(run(replace(CONFIG, seed=1)).model) != once


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop_at", [1, 3, 8])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    tmp_path: Path, optimizer: Any, stop_at: int
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    storage = Storage(str(tmp_path))

    def save(step: int, state: dict[str, Any]) -> None:
        save_checkpoint(storage, "r", step, state, {}, keep=2)

    def stop(step: int, _: Ledger) -> None:
        if step == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        run(config, hooks=Hooks(save=save, on_step=stop))
    checkpoint = newest_good(storage, "r")
    assert (checkpoint is None) == (stop_at <= 3)
    resumed = run(config, state=checkpoint.state if checkpoint else None)
    unbroken = run(config)
    done_before = checkpoint.step if checkpoint else 0
    assert resumed.steps_done_here == unbroken.num_steps - done_before
    assert checkpoint_digest(resumed.model) == checkpoint_digest(unbroken.model)
    for name in ("step", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        mine, theirs = ([record[name] for record in out.history] for out in (resumed, unbroken))
        assert mine == theirs


def test_checkpoints_come_as_often_as_configured_and_at_the_end() -> None:
    for every, expected in ((1.0, [5, 9, 13]), (0.5, [3, 5, 7, 9, 11, 13]), (100, [13])):
        saved: list[int] = []
        run(
            replace(CONFIG, checkpoint_every_epochs=every),
            hooks=Hooks(save=lambda step, _, saved=saved: saved.append(step)),  # type: ignore[misc]
        )
        assert saved == expected


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    config = replace(CONFIG, optimizer="sgd", learning_rate=1000.0, clip_norm=0.0, warmup_share=0.0)
    saved: list[int] = []
    with pytest.raises(Diverged, match=r"became (nan|inf) at step \d+, .*learning_rate"):
        run_loop(
            model_of("linear"),
            replace(config, learning_rate=1000.0, weight_decay=1e6),
            order := SampleOrder(len(TRAIN), 10, 0),
            ResidentFeed(TRAIN, order, 0, 1),
            VAL,
            hooks=Hooks(save=lambda step, _: saved.append(step)),
        )


def test_read_only_batches_are_taken_as_they_are() -> None:
    """Arrays in Ray's object store are read-only, which torch warns about."""

    class Frozen(ResidentFeed):
        def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
            for batch in super().batches(first_step, last_step):
                batch.images.setflags(write=False)
                batch.labels.setflags(write=False)
                yield batch

    order = SampleOrder(len(TRAIN), 10, 0)
    frozen = run_loop(model_of(), CONFIG, order, Frozen(TRAIN, order, 0, 1), VAL)
    assert checkpoint_digest(frozen.model) == checkpoint_digest(run().model)


def test_the_linear_floor_is_trained_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DatasetVersion(
        name="d", version="v", digest="d", parent="", created_at="", class_names=("a", "b"),
        shape=SHAPE, splits={"train": len(TRAIN)}, class_counts={}, profile={}, pixel_mean=(0.3,),
        pixel_std=(0.2,),
    )  # fmt: skip
    monkeypatch.setattr(floor, "MIN_STEPS", 50)
    accuracy = linear_floor(CONFIG, dataset, TRAIN, VAL)
    assert accuracy is not None
    assert accuracy > 0.8
    assert linear_floor(replace(CONFIG, floor_epochs=0), dataset, TRAIN, VAL) is None
