"""Settings and a dataset version -> what every kind of run begins with: model, order, manifest."""

import importlib.metadata
import math

import torch

from rayloop import __version__
from rayloop.config import Config, TrainConfig
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion
from rayloop.errors import ConfigError, RequestError
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import has_batch_norm
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.tracking import TrackedDataset


def initial_model(config: Config, dataset: DatasetVersion) -> ImageClassifier:
    """The configured network with its initial weights, made for the dataset's images."""
    return build_classifier(
        config.model,
        dataset.shape,
        len(dataset.class_names),
        dataset.pixel_mean,
        dataset.pixel_std,
        config.train.seed,
    )


def order_of(train: TrainConfig, dataset: DatasetVersion) -> SampleOrder:
    """The sample order of a run over a dataset's training split."""
    return SampleOrder(
        dataset.splits["train"],
        train.global_batch_size,
        train.seed,
        train.norm_group_rows,
        train.data_share,
    )


def refuse_useless(config: Config, dataset: DatasetVersion, model: ImageClassifier) -> None:
    """Refuse settings that cannot train on this dataset as they say.

    Raises:
        RequestError: A batch is larger than the training rows there are.
        ConfigError: Groups of the norms do not fit into a worker's part of the batch.
    """
    train, rows = config.train, order_of(config.train, dataset).num_rows
    if rows < train.global_batch_size:
        share = "" if train.data_share >= 1 else f", train.data_share={train.data_share} of all,"
        raise RequestError(
            f"train.global_batch_size={train.global_batch_size} is more than the {rows} "
            f"training rows of {dataset.name}:{dataset.version}{share}; lower it."
        )
    ghosts = has_batch_norm(model) and train.norm_group_rows > 0 and train.num_workers > 1
    if ghosts and train.batch_size_per_worker % train.norm_group_rows:
        raise ConfigError(
            f"train.norm_group_rows={train.norm_group_rows} does not divide the "
            f"{train.batch_size_per_worker} rows a worker has in a step, so training would depend "
            "on the number of workers. Use a divisor, as in --train.norm_group_rows "
            f"{math.gcd(train.norm_group_rows, train.batch_size_per_worker)}."
        )


def tracked(dataset: DatasetVersion, storage: Storage) -> TrackedDataset:
    """The dataset version as the tracking database has it."""
    folder = storage.path(dataset.folder)
    return TrackedDataset(dataset.name, dataset.version, dataset.digest, folder)


def manifest_about(config_digest: str, dataset: DatasetVersion) -> dict[str, str]:
    """What a checkpoint's manifest says of where it comes from."""
    return {
        "config_digest": config_digest,
        "dataset": f"{dataset.name}:{dataset.version}",
        "dataset_digest": dataset.digest,
        "rayloop": __version__,
        "torch": torch.__version__,
        "ray": _version_of("ray"),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
