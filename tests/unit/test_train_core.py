"""The training core: one step, whatever the workers and the memory; averages; news; divergence."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import TrainConfig
from rayloop.data.order import SampleOrder
from rayloop.errors import Diverged, WorkError
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import NormStatistics, with_ghost_norms
from rayloop.train import loop
from rayloop.train.account import Ledger
from rayloop.train.average import WeightAverage
from rayloop.train.checkpoint import checkpoint_digest
from rayloop.train.divergence import READ_EVERY_ON_CUDA, DivergenceWatch, Loss
from rayloop.train.loop import Hooks, Worker, _Run
from rayloop.train.optim import learning_rate_at, peak_learning_rate
from rayloop.train.step import Stepper, is_out_of_memory
from rayloop.train.sums import StepSums
from tests.unit import train_cases
from tests.unit.gloo import Job, gloo_workers
from tests.unit.train_cases import (
    CONFIG,
    CPU,
    DDP,
    TRAIN,
    VAL,
    Trained,
    batch,
    classifier,
    narrow,
    order_of,
    run,
    seeds,
    step_with_little_memory,
    stepper_of,
    train_each,
)

SGD = replace(CONFIG, optimizer="sgd", learning_rate=0.05, weight_decay=0.01)
CASES = {
    "adamw": ("fastnet", CONFIG),
    "sgd": ("fastnet", SGD),
    "dropout": ("dropout", replace(CONFIG, ema_decay=0.9)),
    "ddp": ("fastnet", replace(DDP, optimizer="sgd", epochs=1)),
}
WORLDS = [1, 2, 3, 4]
LITTLE = [30, 9]
"""Rows the two workers bear; the stripes have 12 and 18."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors on one thread: faster, and the same whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], list[Any]]]:
    """What the workers of each job gave; they work while the other tests of this file run."""
    jobs = [Job(train_each, world_size, (CASES,)) for world_size in WORLDS]
    jobs.append(Job(step_with_little_memory, 2, (DDP, LITTLE)))
    with gloo_workers(jobs, tmp_path_factory.mktemp("gloo")) as results:
        yield results


def steps_of(stepper: Stepper, config: TrainConfig, count: int = 1, first: int = 0) -> None:
    """Take steps as the loop does."""
    for step in range(first, first + count):
        stepper.backward(*batch(config, step), seeds(step))
        stepper.exchange()
        stepper.update(config.learning_rate)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers."""
    return [value.detach().clone() for value in model.state_dict().values()]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint would have kept."""
    return copy.deepcopy(state)


# --- gradients


def test_gradients_of_a_network_without_norms_are_those_of_the_mean_loss() -> None:
    model, alone = classifier("bare"), classifier("bare")
    images, labels = batch(SGD)
    stepper = stepper_of(model, SGD)
    stepper.backward(images, labels, seeds())
    totals = stepper.exchange()
    logits = alone(images)
    loss = cross_entropy(logits, labels, label_smoothing=0.1)
    loss.backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    hits = int((logits.argmax(dim=1) == labels).sum())
    assert totals.tolist() == [pytest.approx(30 * float(loss.detach()), rel=1e-6), hits, 30]


@pytest.mark.parametrize("config", [SGD, replace(SGD, worker_invariant=False)])
@pytest.mark.parametrize("name", ["fastnet", "tiny_resnet"])
def test_gradients_of_groups_are_those_of_the_whole_batch(name: str, config: TrainConfig) -> None:
    model, whole = classifier(name), with_ghost_norms(classifier(name), SGD.norm_group_rows)
    images, labels = batch(SGD)
    stepper = stepper_of(model, config)
    stepper.backward(images, labels, seeds())
    stepper.exchange()
    cross_entropy(whole(images), labels, label_smoothing=0.1).backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert stepper.micro_batch_size == (4 if config.worker_invariant else 30)


def test_running_statistics_of_a_step_are_those_of_all_its_groups() -> None:
    model, whole = classifier(), classifier()
    with_ghost_norms(whole, SGD.norm_group_rows)
    stepper = stepper_of(model, SGD)
    stepper.backward(*batch(SGD), seeds())
    stepper.exchange()
    statistics = NormStatistics(whole)
    whole(batch(SGD)[0])
    statistics.update_running(statistics.sums.double(), torch.tensor(statistics.groups_in(30)))
    buffers = dict(model.named_buffers())
    for name, value in whole.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffers[name], value)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("invariant", [True, False])
def test_the_memory_order_changes_no_update(optimizer: Any, invariant: bool) -> None:
    """Fused optimizers walk the memory: gradients must lie there as their parameters do."""
    config = replace(SGD, optimizer=optimizer, worker_invariant=invariant)
    models = []
    for channels_last in (True, False):
        model = classifier()
        stepper = stepper_of(model, replace(config, channels_last=channels_last))
        steps_of(stepper, config, 3)
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
        models.append(model)
    strides = [[p.stride() for p in model.parameters()] for model in models]
    assert strides[0] != strides[1]
    for one, other in zip(*map(weights_of, models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_frozen_part_stays_as_it_is() -> None:
    model = classifier()
    stem = model.network.get_submodule("stem").requires_grad_(False)
    before = weights_of(stem)
    steps_of(stepper_of(model, SGD), SGD, 2)
    assert all(map(torch.equal, weights_of(stem), before))
    assert all(parameter.grad is None for parameter in stem.parameters())


def test_sums_begin_anew_with_each_step() -> None:
    layer = nn.Linear(2, 1, bias=False)
    sums = StepSums(NormStatistics(layer), list(layer.parameters()), 1, CPU)
    for _ in range(2):
        sums.clear()
        layer.zero_grad()
        for count in (3, 1):
            layer(torch.ones(count, 2)).sum().backward()
            sums.add(torch.tensor(0.5 * count), torch.tensor(1), count)
            assert layer.weight.grad is None
        sums.exchange()
        assert sums.totals.tolist() == [2.0, 2.0, 4.0]
        assert layer.weight.grad.tolist() == [[4.0, 4.0]]


def test_a_sum_in_float64_does_not_depend_on_its_order() -> None:
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 1, bias=False)
    gradients = [torch.randn(1, 64, generator=random) * 10.0 ** (i % 4) for i in range(40)]
    seen = set()
    for shift in range(5):
        sums = StepSums(NormStatistics(layer), list(layer.parameters()), 1, CPU)
        sums.clear()
        for gradient in [*gradients[7 * shift :], *gradients[: 7 * shift]]:
            layer.weight.grad = gradient.clone()
            sums.add(torch.tensor(0.0), torch.tensor(0), 1)
        sums.exchange()
        assert layer.weight.grad is not None
        seen.add(layer.weight.grad.numpy().tobytes())
    assert len(seen) == 1


# --- fp16


def scaled_stepper() -> tuple[ImageClassifier, Stepper]:
    """A stepper in fp16, whose arithmetic is left in fp32: the scaler is what is tested."""
    model = classifier("bare")
    return model, stepper_of(model, SGD, "fp16")


def test_an_infinite_gradient_skips_the_step_and_lowers_the_scale() -> None:
    model, stepper = scaled_stepper()
    steps_of(stepper, SGD)
    before, scale = weights_of(model), stepper.scaler.get_scale()
    stepper.backward(*batch(SGD, 1), seeds(1))
    stepper.exchange()
    last = list(model.parameters())[-1]
    assert last.grad is not None
    last.grad[1] = float("inf")
    norm = stepper.update(0.05)
    assert not norm.isfinite()
    assert all(map(torch.equal, weights_of(model), before))
    assert stepper.scaler.get_scale() == scale / 2
    steps_of(stepper, SGD, first=2)
    assert not all(map(torch.equal, weights_of(model), before))
    assert all(value.isfinite().all() for value in weights_of(model))


def test_the_scale_leaves_the_update_as_it_is() -> None:
    model, stepper = scaled_stepper()
    plain = classifier("bare")
    steps_of(stepper, SGD, 2)
    steps_of(stepper_of(plain, SGD), SGD, 2)
    for one, other in zip(weights_of(model), weights_of(plain), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)  # half precision


def test_the_scale_is_a_part_of_the_state() -> None:
    config = replace(SGD, precision="fp16")
    runs = [_Run(classifier("bare"), config, Worker(), Ledger(SYSTEM_CLOCK), 9) for _ in range(2)]
    one, other = runs
    steps_of(one.stepper, config)
    one.stepper.scaler.update(new_scale=512.0)
    assert other.restore(copied(one.state(1))) == 1
    assert other.stepper.scaler.get_scale() == 512.0
    assert other.stepper.scaler.state_dict() == one.stepper.scaler.state_dict()
    for each in runs:
        steps_of(each.stepper, config, 2, first=1)
    assert checkpoint_digest(one.outcome.model) == checkpoint_digest(other.outcome.model)


# --- memory


@pytest.mark.parametrize(("limit", "fits"), [(30, 30), (29, 16), (16, 16), (15, 8), (7, 4), (4, 4)])
def test_too_little_memory_halves_the_micro_batch_and_updates_alike(limit: int, fits: int) -> None:
    squeezed, roomy = narrow(limit), narrow(30)
    one = stepper_of(squeezed, DDP)
    other = stepper_of(roomy, DDP)
    other.micro_batch_size = fits
    for stepper in (one, other):
        steps_of(stepper, DDP, 2)
    assert one.micro_batch_size == other.micro_batch_size == fits
    assert fits % DDP.norm_group_rows == 0 or fits == 30
    assert checkpoint_digest(squeezed) == checkpoint_digest(roomy)


def test_memory_that_gets_scarce_later_changes_no_update_either() -> None:
    squeezed, roomy = narrow(30), narrow(30)
    one, other = stepper_of(squeezed, DDP), stepper_of(roomy, DDP)
    for stepper in (one, other):
        steps_of(stepper, DDP)
    squeezed.limit = 16
    other.micro_batch_size = 16
    for stepper in (one, other):
        steps_of(stepper, DDP, 2, first=1)
    assert checkpoint_digest(squeezed) == checkpoint_digest(roomy)


@pytest.mark.parametrize("config", [DDP, CONFIG])
def test_memory_for_less_than_a_group_is_an_error_with_a_remedy(config: TrainConfig) -> None:
    stepper = stepper_of(narrow(3), config)
    with pytest.raises(WorkError, match=r"micro-batch of 4 rows .*Use a smaller network.*group_ro"):
        stepper.backward(*batch(config), seeds())


def test_other_errors_pass() -> None:
    model = narrow(3)
    model.error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        stepper_of(model, DDP).backward(*batch(DDP), seeds())


def test_what_counts_as_too_little_memory() -> None:
    no_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    assert is_out_of_memory(no_memory)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: misaligned address"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- the average of the weights


def test_the_average_follows_its_formula_and_copies_whole_numbers() -> None:
    model = with_ghost_norms(classifier(), 4)
    assert isinstance(model, ImageClassifier)
    average = WeightAverage(model, 0.6)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.ones_like(value) * (step + 1))
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
    state = average.model.state_dict()
    assert any(not value.is_floating_point() for value in state.values())
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_the_average_is_the_outcome_and_the_raw_weights_train_on() -> None:
    raw, model = classifier(), classifier()
    run(CONFIG, raw)
    kept: list[dict[str, Any]] = []
    outcome = run(
        replace(CONFIG, ema_decay=0.8), model,
        hooks=Hooks(save=lambda _, state: kept.append(copied(state))),
    )  # fmt: skip
    assert checkpoint_digest(model) == checkpoint_digest(raw)
    assert outcome.model is not model
    assert checkpoint_digest(outcome.model) != checkpoint_digest(model)
    for name, value in outcome.model.state_dict().items():
        assert torch.equal(kept[-1]["average"][name], value)


# --- resuming


@pytest.mark.parametrize(
    "config", [replace(CONFIG, ema_decay=0.8), replace(SGD, epochs=1.7), replace(DDP, epochs=1.2)]
)
def test_a_run_goes_on_in_the_middle_of_an_epoch_as_if_unbroken(config: TrainConfig) -> None:
    kept: dict[int, dict[str, Any]] = {}
    often = replace(config, checkpoint_every_epochs=0.27)  # every step
    whole = run(often, hooks=Hooks(save=lambda step, state: kept.update({step: copied(state)})))
    assert sorted(kept) == list(range(1, whole.num_steps + 1))
    assert ("average" in kept[1]) and (kept[1]["average"] is not None) == (config.ema_decay > 0)
    for step in (1, 2, whole.num_steps - 1):
        resumed = run(often, state=kept[step])
        assert resumed.steps_done_here == whole.num_steps - step
        assert checkpoint_digest(resumed.model) == checkpoint_digest(whole.model)
        for mine, theirs in zip(resumed.history, whole.history, strict=True):
            ignored = {"data_wait_share": 0.0}
            assert mine | ignored == theirs | ignored


# --- divergence


def watch(device: str = "cpu", trust_norms: bool = True) -> tuple[DivergenceWatch, SampleOrder]:
    """A watch over an order; any device but the CPU stands for a GPU."""
    order = SampleOrder(100, 10, 0)
    return DivergenceWatch(order, torch.device(device), trust_norms), order


FINE, BAD = torch.tensor(20.0, dtype=torch.float64), torch.tensor(float("nan"), dtype=torch.float64)
ONE, INFINITE = torch.tensor(1.0), torch.tensor(float("inf"))


def test_a_bad_loss_names_its_step_and_exactly_its_rows() -> None:
    watched, order = watch()
    assert watched.add(6, FINE, ONE) == [Loss(6, 2.0)]
    with pytest.raises(Diverged) as caught:
        watched.add(7, BAD, ONE)
    named = ", ".join(map(str, order.rows(7)[0][:8]))
    assert f"training loss became nan at step 7, on the batch of training rows {named} and 2 more" \
        in str(caught.value)  # fmt: skip
    assert caught.value.step == 7


def test_all_rows_of_a_small_batch_are_named() -> None:
    order = SampleOrder(100, 3, 0)
    watched = DivergenceWatch(order, CPU, trust_norms=True)
    with pytest.raises(Diverged, match=rf"rows {', '.join(map(str, order.rows(2)[0]))}\. The last"):
        watched.add(2, BAD, ONE)


def test_a_gpus_losses_are_read_seldom_and_the_first_bad_step_is_told() -> None:
    watched, order = watch("meta")
    told = [watched.add(step, FINE * (step + 1), ONE) for step in range(READ_EVERY_ON_CUDA)]
    assert told[:-1] == [[]] * (READ_EVERY_ON_CUDA - 1)
    assert told[-1] == [Loss(step, 2.0 * (step + 1)) for step in range(READ_EVERY_ON_CUDA)]
    for step in range(16, 31):
        assert watched.add(step, BAD if step >= 20 else FINE, ONE) == []
    with pytest.raises(
        Diverged, match=f"at step 20, on the batch of training rows {order.rows(20)[0][0]}, "
    ):
        watched.add(31, FINE, ONE)


def test_reading_ahead_of_a_checkpoint_finds_what_is_noted() -> None:
    watched, _ = watch("meta")
    assert watched.read() == []
    watched.add(0, FINE, ONE)
    assert watched.read() == [Loss(0, 2.0)]
    assert watched.read() == []
    watched.add(1, BAD, ONE)
    with pytest.raises(Diverged, match="at step 1,"):
        watched.read()


def test_an_infinite_gradient_stops_the_run_unless_a_scaler_skips_it() -> None:
    with pytest.raises(Diverged, match="gradient's norm became inf at step 3,"):
        watch()[0].add(3, FINE, INFINITE)
    assert watch(trust_norms=False)[0].add(3, FINE, INFINITE) == [Loss(3, 2.0)]
    with pytest.raises(Diverged, match="training loss became nan"):
        watch(trust_norms=False)[0].add(3, BAD, INFINITE)


class Poisoned(ImageClassifier):
    """A classifier whose answers are no numbers for one image."""

    def forward(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits = super().forward(images_NHWC)
        bad = (images_NHWC == 77).flatten(1).float().mean(dim=1) > 0.5
        return torch.where(bad[:, None], torch.nan, logits)


def test_a_run_stops_at_the_step_of_the_bad_row_and_saves_nothing_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, checkpoint_every_epochs=0.27)
    bad_row = int(order_of(config).rows(2)[0][5])
    images = TRAIN.images.copy()
    images[bad_row] = 77
    monkeypatch.setattr(train_cases, "TRAIN", replace(TRAIN, images=images))
    model = classifier()
    model.__class__ = Poisoned
    saved: list[int] = []
    losses: list[Loss] = []
    hooks = Hooks(save=lambda step, _: saved.append(step), on_losses=losses.extend)
    with pytest.raises(Diverged) as caught:
        run(config, model, hooks=hooks)
    assert caught.value.step == 2
    assert f" {bad_row}, " in str(caught.value)
    assert saved == [1, 2]
    assert [each.step for each in losses] == [0, 1]


def test_losses_that_a_gpu_keeps_are_read_at_the_end_and_checked_before_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seldom(order: SampleOrder, _: torch.device, trust_norms: bool) -> DivergenceWatch:
        return DivergenceWatch(order, torch.device("meta"), trust_norms)

    monkeypatch.setattr(loop, "DivergenceWatch", seldom)
    told: list[list[Loss]] = []
    saved: list[int] = []
    config = replace(CONFIG, checkpoint_every_epochs=0.54, epochs=1.7)  # every other step
    hooks = Hooks(save=lambda step, _: saved.append(step), on_losses=told.append)
    run(config, hooks=hooks)
    assert saved == [2, 4, 6]
    assert [[each.step for each in part] for part in told if part] == [[0, 1, 2, 3, 4, 5]]
    with torch.no_grad():
        (model := classifier()).network.get_submodule("head").weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    saved.clear()
    with pytest.raises(Diverged, match="at step 0,"):
        run(config, model, hooks=hooks)
    assert saved == []


# --- news of the loop


def test_phases_come_in_order() -> None:
    told: list[tuple[int, str]] = []
    run(replace(CONFIG, epochs=1, checkpoint_every_epochs=0.5),
        hooks=Hooks(on_phase=lambda step, phase: told.append((step, phase))))  # fmt: skip
    step = ["data_wait", "step", "prepare", "step", "exchange"]
    assert told == [
        *((0, phase) for phase in step),
        *((1, phase) for phase in [*step, "checkpoint"]),
        *((2, phase) for phase in step),
        *((3, phase) for phase in [*step, "evaluate", "checkpoint"]),
    ]


def test_a_checkpoint_that_is_asked_for_is_written() -> None:
    saved: list[int] = []
    asked = iter([False, True, True, False, False, True, False, False])
    config = replace(CONFIG, checkpoint_every_epochs=0)
    outcome = run(
        config,
        hooks=Hooks(is_checkpoint_due=lambda: next(asked), save=lambda at, _: saved.append(at)),
    )
    assert outcome.num_steps == 7
    assert saved == [2, 3, 6, 7]


def test_without_an_interval_only_the_end_is_saved() -> None:
    saved: list[int] = []
    run(
        replace(CONFIG, checkpoint_every_epochs=0),
        hooks=Hooks(save=lambda step, _: saved.append(step)),
    )
    assert saved == [7]


def test_losses_are_the_means_of_the_global_batches() -> None:
    losses: list[Loss] = []
    model, config = classifier("linear"), replace(
        CONFIG, augment=replace(CONFIG.augment, flip=False, translate_px=0, erase_share=0.0),
        learning_rate=1e-9, weight_decay=0.0, label_smoothing=0.0, epochs=1,
    )  # fmt: skip
    outcome = run(config, model, hooks=Hooks(on_losses=losses.extend))
    assert [each.step for each in losses] == [0, 1, 2, 3]
    with torch.no_grad():
        for step, each in enumerate(losses):
            images, labels = batch(config, step)
            expected = float(cross_entropy(model(images), labels))
            assert each.loss == pytest.approx(expected, rel=1e-4)
    assert outcome.history[0]["train_loss"] == pytest.approx(np.mean([e.loss for e in losses]))


# --- several workers


@pytest.mark.parametrize("case", ["adamw", "sgd", "dropout"])
def test_the_number_of_workers_changes_no_bit(gloo: Callable[[int], list[Any]], case: str) -> None:
    alone: Trained = gloo(0)[0][case]
    assert len(set(alone.losses)) == 7
    for index, world_size in enumerate(WORLDS[1:], 1):
        for rank, trained in enumerate(each[case] for each in gloo(index)):
            assert trained.digest == alone.digest, (world_size, rank)
            assert trained.losses == alone.losses
            for mine, theirs in zip(trained.history, alone.history, strict=True):
                assert mine["train_loss"] == theirs["train_loss"]
                assert mine["val_accuracy"] == theirs["val_accuracy"]
                assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
            assert trained.counted_rows == len(VAL)


def test_the_worker_that_is_alone_trains_as_without_gloo(
    gloo: Callable[[int], list[Any]],
) -> None:
    outcome = run(SGD)
    assert gloo(0)[0]["sgd"].digest == checkpoint_digest(outcome.model)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_with_float32_sums_workers_come_close_and_agree(
    gloo: Callable[[int], list[Any]], index: int
) -> None:
    alone: Trained = gloo(0)[0]["ddp"]
    ranks: list[Trained] = [each["ddp"] for each in gloo(index)]
    assert len({trained.digest for trained in ranks}) == 1
    for mine, theirs in zip(ranks[0].weights, alone.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-3)
    assert ranks[0].losses == pytest.approx(alone.losses, rel=1e-4)
    assert {trained.counted_rows for trained in ranks} == {len(VAL)}


def test_workers_agree_on_the_micro_batch_that_the_smallest_memory_bears(
    gloo: Callable[[int], list[Any]],
) -> None:
    (one_fits, one), (other_fits, other) = gloo(len(WORLDS))
    assert one_fits == other_fits == 8
    roomy = narrow(30)
    stepper = stepper_of(roomy, DDP)
    for step in range(3):
        stepper.backward(*batch(DDP, step), seeds(step))
        stepper.exchange()
        stepper.update(0.02)
    for mine, theirs, alone in zip(one, other, weights_of(roomy), strict=True):
        assert np.array_equal(mine, theirs)
        np.testing.assert_allclose(mine, alone.numpy(), atol=1e-3, rtol=1e-3)


# --- the learning rate and the size of the batch


@pytest.mark.parametrize(
    ("rule", "size", "factor"),
    [("constant", 1024, 1), ("linear", 1024, 4), ("sqrt", 1024, 2), ("linear", 64, 0.25),
     ("sqrt", 64, 0.5), ("linear", 256, 1), ("sqrt", 256, 1)],
)  # fmt: skip
def test_a_rule_scales_the_rate_with_the_batch(rule: Any, size: int, factor: float) -> None:
    config = TrainConfig(learning_rate=0.1, learning_rate_rule=rule, global_batch_size=size,
                         reference_batch_size=256, warmup_share=0.1)  # fmt: skip
    assert peak_learning_rate(config) == pytest.approx(0.1 * factor)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert max(rates) == rates[9] == pytest.approx(0.1 * factor)
    assert rates[0] == pytest.approx(0.1 * factor / 10)  # the warm-up climbs to the scaled peak


def test_the_loop_takes_the_scaled_rate() -> None:
    config = replace(SGD, learning_rate_rule="linear", reference_batch_size=60, epochs=1)
    half = replace(SGD, learning_rate=SGD.learning_rate / 2, epochs=1)
    scaled, plain = run(config), run(half)
    assert checkpoint_digest(scaled.model) == checkpoint_digest(plain.model)
    assert scaled.history[-1]["learning_rate"] == plain.history[-1]["learning_rate"]
