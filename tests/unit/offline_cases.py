"""A small release, dataset and folder of images for the tests of batch prediction."""

import hashlib
import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayloop.clock import SYSTEM_CLOCK
from rayloop.data.versions import DatasetVersion, Shard, encode_table, shard_table, write_manifest
from rayloop.registry.release import ReleaseRecord
from rayloop.registry.store import Registry
from rayloop.serve.engine import OnnxEngine
from rayloop.serve.offline import plan as offline
from rayloop.storage import Storage
from tests.cluster.servers import LABELS, MODEL, SHAPE, images, model_bytes

ROWS = {"train": (40,), "val": (8,), "test": (50, 37)}
"""Rows of each shard of the dataset `pets`, by split."""


def publish(storage: Storage, version: str = "1", golden_error: float = 0.0) -> None:
    """A release as the registry leaves it; `golden_error` falsifies its recorded answers."""
    model, rows = model_bytes(int(version)), images(4, seed=99)
    buffer = io.BytesIO()
    answers = OnnxEngine(model).predict(rows) + np.float32(golden_error)
    np.savez(buffer, images=rows, probabilities=answers)
    golden = buffer.getvalue()
    record = ReleaseRecord(
        model=MODEL, version=version, created_at="2026-11-21T00:00:00Z", artifact="model.onnx",
        artifact_digest=hashlib.sha256(model).hexdigest(), method="fp32", class_names=LABELS,
        shape=SHAPE, run_id="run", checkpoint_digest="", dataset={}, config_digest="", config={},
        metrics={}, gates=(), profile={}, cpu_features=(), reduce_range=False, packages={},
        golden={"file": "golden.npz", "rows": 4, "digest": hashlib.sha256(golden).hexdigest()},
    )  # fmt: skip
    storage.write(f"{record.folder}/model.onnx", model)
    storage.write(f"{record.folder}/golden.npz", golden)
    storage.write_json(f"{record.folder}/release.json", record.to_json())


def labels_of(rows: int) -> np.ndarray:
    """True labels, of which some are what the model says and most are not."""
    return np.arange(rows) % len(LABELS)


def add_dataset(storage: Storage, shape: tuple[int, int, int] = SHAPE, name: str = "pets") -> None:
    """A dataset version `v1`; the rows of its test split are `images(87, seed=2)`."""
    shards = []
    for seed, (split, sizes) in enumerate(ROWS.items()):
        pixels = np.resize(images(sum(sizes), seed), (sum(sizes), *shape))
        starts = np.cumsum([0, *sizes])
        for part, (start, stop) in enumerate(pairwise(starts)):
            digests = np.zeros(stop - start, "V32")
            table = shard_table(pixels[start:stop], labels_of(sum(sizes))[start:stop], digests)
            content, path = encode_table(table), f"datasets/{name}/v1/{split}/part-{part:05d}.arrow"
            storage.write(path, content)
            sha256 = hashlib.sha256(content).hexdigest()
            shards.append(Shard(path=path, split=split, rows=int(stop - start),
                                size_bytes=len(content), sha256=sha256))  # fmt: skip
    dataset = DatasetVersion(
        name=name, version="v1", digest="d" * 64, parent="", created_at="2026-01-01T00:00:00Z",
        class_names=LABELS, shape=shape, splits={part: sum(rows) for part, rows in ROWS.items()},
        class_counts={}, profile={}, pixel_mean=(0.5,), pixel_std=(0.5,), shards=tuple(shards),
    )  # fmt: skip
    write_manifest(storage, dataset)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file of grey pixels (H, W, 1); JPEG and lossy WebP change them."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0])
    if kind == "WEBP":
        image.convert("RGB").save(buffer, kind, lossless=True)
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


def image_folder(root: Path, pixels: np.ndarray) -> Path:
    """Images as CLASS/NUMBER.png, .jpg or .webp in turns, at two depths."""
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
    for index, image in enumerate(pixels):
        suffix = list(kinds)[index % 3]
        folder = root / ("deep" if index % 2 else "") / LABELS[index % len(LABELS)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03d}.{suffix}").write_bytes(encoded(image, kinds[suffix]))
    return root


def parquet_file(path: Path, pixels: np.ndarray, row_group_size: int = 10) -> Path:
    """PNGs with labels given as numbers, in row groups."""
    columns = {
        "image": [encoded(image) for image in pixels],
        "label": labels_of(len(pixels)),
    }
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def without_database(patch: pytest.MonkeyPatch) -> None:
    """Let `:NUMBER` be resolved without setting up a database, which takes seconds."""
    patch.setattr(
        offline, "open_registry", lambda storage, *_: Registry(storage, None, SYSTEM_CLOCK)
    )


class DeadlyPiece:
    """Rows whose reading ends the process, as a decoder's crash or a lack of memory does."""

    def read(self, *_: object) -> None:
        """End the process."""
        os._exit(1)
