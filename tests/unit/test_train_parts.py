"""The parts of training: rate, one step, evaluation, accounts, the run's record."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rayloop.config import AugmentConfig, Config, ModelConfig, TrainConfig, to_dict
from rayloop.data.versions import Split
from rayloop.errors import Corrupt, DataMissing
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.train.account import Ledger, flops_per_image
from rayloop.train.checkpoint import checkpoint_digest, save_checkpoint
from rayloop.train.evaluate import evaluate
from rayloop.train.optim import build_optimizer, learning_rate_at
from rayloop.train.result import TrainResult, load_model, load_result, save_result
from rayloop.train.step import Stepper, choose_precision

CPU = torch.device("cpu")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def classifier(name: str = "linear", seed: int = 0, classes: int = 3) -> ImageClassifier:
    """A small model of 4x4 grey images."""
    model = ModelConfig(name=name, widths=(8,))
    return build_classifier(model, (4, 4, 1), classes, (0.5,), (0.25,), seed)


def rows(count: int, classes: int = 3) -> Split:
    """Random images and labels."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return Split(images, random.integers(0, classes, count), np.arange(count))


# --- the learning rate and the optimizer


def test_the_rate_climbs_to_its_peak_and_falls_as_a_cosine() -> None:
    config = TrainConfig(learning_rate=2.0, warmup_share=0.2, final_rate_share=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[19] == rates[20] == max(rates) == 2.0
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[99] == pytest.approx(0.2, rel=0.02)
    assert learning_rate_at(100, 100, config) == pytest.approx(0.2)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("warmup_share", [0.0, 0.5, 1.0])
def test_the_rate_stays_in_range_on_short_runs(num_steps: int, warmup_share: float) -> None:
    config = TrainConfig(learning_rate=1.0, warmup_share=warmup_share)
    rates = [learning_rate_at(step, num_steps, config) for step in range(num_steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert max(rates) > 0.4


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_and_filters_decay(name: Any) -> None:
    model = classifier("fastnet")
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0)


# --- one step


def stepped(config: TrainConfig, steps: int = 3) -> tuple[ImageClassifier, list[float]]:
    """The model after some steps on the same rows, and the loss of each."""
    model, split = classifier(), rows(24)
    stepper = Stepper(model, build_optimizer(model, config), config, "fp32", CPU)
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    losses = []
    for step in range(steps):
        stepper.backward(images, labels, lambda place, step=step: step)  # type: ignore[misc]
        losses.append(float(stepper.exchange()[0]))
        stepper.update(config.learning_rate)
    return model, losses


@pytest.mark.parametrize("micro_batch_size", [1, 6, 8, 24])
def test_micro_batches_update_like_the_whole_batch(micro_batch_size: int) -> None:
    config = TrainConfig(global_batch_size=24, num_workers=1, optimizer="sgd", learning_rate=0.1)
    config = replace(config, worker_invariant=False)
    whole, losses = stepped(config)
    parts, losses_of_parts = stepped(replace(config, micro_batch_size=micro_batch_size))
    assert losses_of_parts == pytest.approx(losses, rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_steps_lower_the_loss_and_count_hits() -> None:
    config = TrainConfig(global_batch_size=24, num_workers=1, learning_rate=0.05)
    _, losses = stepped(config, steps=20)
    assert losses[-1] < 0.7 * losses[0]


def test_clipping_bounds_the_update() -> None:
    config = TrainConfig(global_batch_size=24, num_workers=1, optimizer="sgd", learning_rate=1.0,
                         weight_decay=0.0, clip_norm=1e-3)  # fmt: skip
    before, (after, _) = classifier(), stepped(config, steps=1)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    change = sum(float((one - other).detach().square().sum()) for one, other in pairs) ** 0.5
    assert 0 < change <= 1.9e-3 * (1 + 1e-4)  # Nesterov's first step is 1.9 times the gradient
    free, _ = stepped(replace(config, clip_norm=0.0), steps=1)
    assert not torch.allclose(next(free.parameters()), next(after.parameters()), atol=1e-3)


def test_a_precision_that_is_named_is_taken_and_auto_chooses_a_native_one() -> None:
    for name in ("fp32", "bf16", "fp16"):
        assert choose_precision(TrainConfig(precision=name), CPU) == name
    native = torch.cpu._is_avx512_bf16_supported()
    assert choose_precision(TrainConfig(), CPU) == ("bf16" if native else "fp32")


# --- evaluation


def test_evaluation_counts_each_row_once() -> None:
    model, split = classifier(), rows(23)
    with torch.no_grad():
        logits = model(torch.from_numpy(split.images))
    predicted = logits.argmax(dim=1).numpy()
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(split.labels))
    for batch_size in (1, 5, 23, 100):
        metrics = evaluate(model, split, 3, batch_size, CPU)
        assert metrics.count == 23
        assert metrics.accuracy == pytest.approx((predicted == split.labels).mean())
        assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
        assert metrics.confusion.sum(axis=1).tolist() == np.bincount(split.labels).tolist()
    assert model.training


@pytest.mark.parametrize(("world_size", "count"), [(2, 23), (3, 23), (4, 2)])
def test_workers_share_the_rows_without_a_gap(
    monkeypatch: pytest.MonkeyPatch, world_size: int, count: int
) -> None:
    """Each rank's sums are caught before the exchange; the last rank gets the sum of all."""
    model, split = classifier(), rows(count)
    total: list[torch.Tensor] = []

    def exchange(sums: torch.Tensor) -> None:
        total.append(sums.clone())
        sums.copy_(torch.stack(total).sum(dim=0))

    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    for rank in range(world_size - 1):
        with contextlib.suppress(AssertionError):  # the others' rows are not there yet
            evaluate(model, split, 3, 4, CPU, rank, world_size)
    together = evaluate(model, split, 3, 4, CPU, world_size - 1, world_size)
    alone = evaluate(model, split, 3, 4, CPU)
    assert np.array_equal(together.confusion, alone.confusion)
    assert together.loss == pytest.approx(alone.loss)


# --- accounts and the run's record


class StepClock:
    """A clock that goes on by one second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return 0.0

    def monotonic(self) -> float:
        """One second later than the last time."""
        self.seconds += 1
        return self.seconds


def test_the_ledger_books_time_by_cause() -> None:
    ledger = Ledger(StepClock())
    for cause in ("step", "step", "data_wait", "step"):
        with ledger.spending(cause):
            pass
    assert dict(ledger.seconds) == {"step": 3.0, "data_wait": 1.0}
    assert ledger.data_wait_share == 0.25
    assert ledger.step_percentiles_ms() == {"p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert Ledger(StepClock()).step_percentiles_ms() == {}


def test_the_ledger_knows_what_one_checkpoint_takes() -> None:
    ledger = Ledger(StepClock())
    assert ledger.checkpoint_ms == 0.0
    for _ in range(3):
        with ledger.spending("checkpoint"):
            pass
    assert ledger.checkpoint_ms == 1000.0  # whatever was kept of them


def test_operations_of_a_linear_model_are_counted() -> None:
    model = classifier()
    # forward 2 x 16 x 3; backward to the weights as many, none to the image
    assert flops_per_image(model, (4, 4, 1)) == 2 * 2 * 16 * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def result(storage: Storage) -> tuple[TrainResult, ImageClassifier]:
    """A finished run on disk, and its model."""
    model = classifier("fastnet", seed=4)
    path = save_checkpoint(storage, "r", 9, {"model": model.state_dict()}, {}, keep=1)
    config = Config(run_id="r", model=ModelConfig(widths=(8,)), train=TrainConfig(
        augment=AugmentConfig(flip=False)))  # fmt: skip
    record = TrainResult(
        run_id="r", checkpoint=path, checkpoint_digest=checkpoint_digest(model),
        model_name="fastnet", num_parameters=1, dataset_name="d", dataset_version="v",
        dataset_digest="e", class_names=("a", "b", "c"), shape=(4, 4, 1), pixel_mean=(0.5,),
        pixel_std=(0.25,), val_accuracy=0.5, test_accuracy=0.5, floor_accuracy=None, steps=9,
        images_per_second=1.0, data_wait_share=0.0, mfu=None, goodput=1.0, step_ms={}, seconds=1.0,
        precision="fp32", feed="resident", num_workers=1, resumed_at_step=0,
        history=[{"step": 9.0}], config=to_dict(config),
    )  # fmt: skip
    save_result(storage, record)
    return record, model


def test_a_finished_run_comes_back_with_its_model(storage: Storage) -> None:
    record, model = result(storage)
    assert load_result(storage) == load_result(storage, "r") == record
    loaded = load_model(storage, record)
    assert checkpoint_digest(loaded) == checkpoint_digest(model)
    assert not loaded.training
    assert "history" not in record.last_line()


def test_a_missing_or_damaged_record_is_told(storage: Storage) -> None:
    with pytest.raises(DataMissing, match="There is no finished run under"):
        load_result(storage)
    result(storage)
    with pytest.raises(DataMissing, match="There is no finished run 'other'"):
        load_result(storage, "other")
    storage.write_json("runs/r/result.json", {"run_id": "r"})
    with pytest.raises(Corrupt, match="train again"):
        load_result(storage)
