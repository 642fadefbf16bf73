"""A dataset version -> the accuracy of a linear model: the floor every gate compares with."""

from dataclasses import replace

import torch

from rayloop.config import AugmentConfig, ModelConfig, TrainConfig
from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, Split
from rayloop.models.zoo import build_classifier
from rayloop.train.evaluate import evaluate
from rayloop.train.loop import run_loop

MAX_ROWS = 100_000
"""Rows the floor is trained on at most; a linear model of small images needs no more."""
MIN_STEPS = 1000
"""Steps the floor is trained for at least, so that it is an honest one on a small dataset too."""


def linear_floor(
    config: TrainConfig, dataset: DatasetVersion, train: Split, rows: Split
) -> float | None:
    """Train a linear model in this process and test it; None when `floor_epochs` is 0.

    A run's record holds the floor on the test split; models that are compared on the validation
    split stand beside the floor on that split.

    Args:
        config: The train section; optimizer settings are the floor's own.
        dataset: The version, for shape and normalisation.
        train: Training rows.
        rows: Rows it is tested on.
    """
    if config.floor_epochs <= 0:
        return None
    taught = Split(train.images[:MAX_ROWS], train.labels[:MAX_ROWS], train.row_ids[:MAX_ROWS])
    batch_size = min(128, len(taught))
    settings = replace(
        config,
        epochs=max(config.floor_epochs, MIN_STEPS * batch_size / len(taught)),
        num_workers=1,
        global_batch_size=batch_size,
        min_workers=0,
        micro_batch_size=0,
        norm_group_rows=batch_size,
        learning_rate_rule="constant",
        ema_decay=0.0,
        optimizer="adamw",
        learning_rate=0.003,
        precision="fp32",
        compile=False,
        augment=AugmentConfig(flip=False, translate_px=0),
    )
    classes = len(dataset.class_names)
    model = build_classifier(
        ModelConfig(name="linear"), dataset.shape, classes, dataset.pixel_mean, dataset.pixel_std,
        config.seed,
    )  # fmt: skip
    order = SampleOrder(len(taught), settings.global_batch_size, config.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny net: several threads would mostly wait for each other
    try:
        outcome = run_loop(model, settings, order, ResidentFeed(taught, order, 0, 1), rows)
    finally:
        torch.set_num_threads(threads)
    metrics = evaluate(outcome.model, rows, classes, config.eval_batch_size, torch.device("cpu"))
    return metrics.accuracy
