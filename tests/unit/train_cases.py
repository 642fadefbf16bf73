"""Small networks, rows and runs that the tests of the training core and its gloo workers share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rayloop.config import AugmentConfig, ModelConfig, TrainConfig
from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import with_ghost_norms
from rayloop.models.zoo import build_classifier
from rayloop.train.checkpoint import checkpoint_digest
from rayloop.train.evaluate import evaluate
from rayloop.train.loop import Hooks, Outcome, Worker, run_loop
from rayloop.train.optim import build_optimizer
from rayloop.train.step import Stepper
from tests.datasets import SHAPE, rows

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    epochs=2,
    global_batch_size=30,  # seven groups and two rows: no number of workers divides it
    norm_group_rows=4,
    num_workers=1,
    learning_rate=0.02,
    precision="fp32",
    eval_batch_size=8,
    augment=AugmentConfig(translate_px=1, erase_share=0.2),
)
DDP = replace(CONFIG, worker_invariant=False)


TRAIN, VAL = rows(110), rows(23, seed=1)


def classifier(name: str = "fastnet", seed: int = 0) -> ImageClassifier:
    """A small model; `dropout` draws random numbers in its forward pass, `bare` has no norms."""
    if name in ("fastnet", "linear", "tiny_resnet"):
        # Below 8 channels a strided 1x1 convolution corrupts memory (uxlfoundation/oneDNN#6035).
        model = ModelConfig(name=name, widths=(8, 12) if name == "tiny_resnet" else (4, 8))
        return build_classifier(model, SHAPE, 3, (0.3, 0.4), (0.2, 0.3), seed)
    middle = {"dropout": [nn.BatchNorm2d(6), nn.Dropout(0.4)], "bare": []}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(2, 6, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)
        )
    return ImageClassifier(network, SHAPE, 3, (0.3, 0.4), (0.2, 0.3))


def order_of(config: TrainConfig) -> SampleOrder:
    """The order a run of these settings has."""
    rows_at_all = len(TRAIN)
    return SampleOrder(rows_at_all, config.global_batch_size, config.seed, config.norm_group_rows)


def run(
    config: TrainConfig = CONFIG,
    model: ImageClassifier | None = None,
    state: dict[str, Any] | None = None,
    hooks: Hooks | None = None,
    worker: Worker | None = None,
) -> Outcome:
    """Train a fresh model, or go on from a state."""
    order, worker = order_of(config), worker or Worker()
    feed = ResidentFeed(TRAIN, order, worker.rank, worker.world_size)
    return run_loop(
        model or classifier(seed=config.seed), config, order, feed, VAL, worker, state, hooks
    )


class Narrow(ImageClassifier):
    """A classifier whose memory is too small for more than so many rows at once."""

    limit = 1_000_000
    error: Exception = torch.OutOfMemoryError("out of memory (a test's)")

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """Logits, if they fit; the error comes after the norms have seen the rows."""
        logits = super().forward(images_NHWC)
        if len(images_NHWC) > self.limit:
            raise self.error
        return logits


def narrow(limit: int, name: str = "fastnet") -> Narrow:
    """A small model that bears `limit` rows."""
    model = classifier(name)
    model.__class__ = Narrow
    assert isinstance(model, Narrow)
    model.limit = limit
    return model


def stepper_of(
    model: ImageClassifier, config: TrainConfig, precision: str = "fp32", world_size: int = 1
) -> Stepper:
    """A stepper as the loop makes it."""
    with_ghost_norms(model, config.norm_group_rows)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout).train()  # type: ignore[call-overload]
    return Stepper(model, build_optimizer(model, config), config, precision, CPU, world_size)


def seeds(step: int = 0) -> Callable[[int], int]:
    """Seeds of a step's micro-batches."""
    return lambda place: 1000 * step + place


def batch(config: TrainConfig, step: int = 0, rank: int = 0, world_size: int = 1) -> Any:
    """A rank's images and labels."""
    order = order_of(config)
    mine = order.rows(step)[0][order.stripe(step, rank, world_size)]
    return torch.from_numpy(TRAIN.images[mine]), torch.from_numpy(TRAIN.labels[mine])


# --- what gloo workers do


@dataclass(frozen=True)
class Trained:
    """What a rank knows at the end of its run."""

    digest: str
    losses: list[float]
    history: list[dict[str, float]]
    counted_rows: int
    weights: list[Any]


def train_each(
    rank: int, world_size: int, cases: dict[str, tuple[str, TrainConfig]]
) -> dict[str, Trained]:
    """Train one model after the other, each named by its case."""
    worker = Worker(rank=rank, world_size=world_size)
    trained = {}
    for case, (name, config) in cases.items():
        told: list[float] = []
        hooks = Hooks(on_losses=lambda read, told=told: told.extend(each.loss for each in read))  # type: ignore[misc]
        outcome = run(config, classifier(name), hooks=hooks, worker=worker)
        model = outcome.model
        metrics = evaluate(model, VAL, 3, 8, CPU, rank, world_size)
        weights = [value.detach().numpy() for value in model.state_dict().values()]
        trained[case] = Trained(
            checkpoint_digest(model), told, outcome.history, metrics.count, weights
        )
    return trained


def step_with_little_memory(
    rank: int, world_size: int, config: TrainConfig, limits: list[int]
) -> tuple[int, list[Any]]:
    """Three steps of workers of which each bears another number of rows."""
    model = narrow(limits[rank])
    stepper = stepper_of(model, config, world_size=world_size)
    for step in range(3):
        stepper.backward(*batch(config, step, rank, world_size), seeds(step))
        stepper.exchange()
        stepper.update(0.02)
    return stepper.micro_batch_size, [p.detach().numpy() for p in model.state_dict().values()]
