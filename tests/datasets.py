"""A small dataset version on disk without Ray: rows of three classes that a small net can learn."""

import hashlib

import numpy as np

from rayloop.data.contract import row_digest
from rayloop.data.profile import histogram, merge
from rayloop.data.versions import (
    DatasetVersion,
    Shard,
    Split,
    encode_table,
    shard_table,
    write_manifest,
)
from rayloop.storage import Storage

SHAPE = (6, 6, 2)
ROWS = {"train": 110, "val": 60, "test": 50}


def rows(count: int, seed: int = 0) -> Split:
    """Images of three classes, told apart by their brightest third."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.integers(0, 156, (count, *SHAPE), dtype=np.uint8)
    for label in range(3):
        images[labels == label, 2 * label : 2 * label + 2] += 100
    return Split(images, labels, np.arange(count))


def write_dataset(
    storage: Storage, name: str = "thirds", sizes: dict[str, int] | None = None, version: str = "v1"
) -> DatasetVersion:
    """Write a version with the three splits and its manifest."""
    sizes = sizes or ROWS
    shards = []
    for seed, (split, count) in enumerate(sizes.items()):
        part = rows(count, seed)
        digests = np.array([row_digest(image) for image in part.images], dtype="V32")
        content = encode_table(shard_table(part.images, part.labels, digests))
        path = f"datasets/{name}/{version}/{split}/part-00000.arrow"
        storage.write(path, content)
        shards.append(
            Shard(
                path=path, split=split, rows=count, size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )  # fmt: skip
    classes = ("top", "middle", "bottom")
    dataset = DatasetVersion(
        name=name, version=version, digest=hashlib.sha256(name.encode()).hexdigest(), parent="",
        created_at="2026-01-01T00:00:00Z", class_names=classes, shape=SHAPE, splits=dict(sizes),
        class_counts={}, profile=merge([histogram(rows(sizes["train"]).images)]),
        pixel_mean=(0.4, 0.4), pixel_std=(0.25, 0.25), shards=tuple(shards),
    )  # fmt: skip
    write_manifest(storage, dataset)
    return dataset
