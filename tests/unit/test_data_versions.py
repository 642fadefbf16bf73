"""Dataset versions: written and read back, named by content alone, damage told from absence."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.data.contract import row_digest
from rayloop.data.profile import NUM_BINS, histogram, image_statistics, merge
from rayloop.data.versions import (
    DatasetVersion,
    Shard,
    dataset_digest,
    encode_table,
    newest_version,
    open_version,
    read_split,
    shard_table,
    write_manifest,
)
from rayloop.errors import Corrupt, DataMissing
from rayloop.storage import Storage

NAMES = ("cat", "dog", "eel")
SHAPE = (4, 5, 3)
ROWS = 20


def make_rows(count: int = ROWS) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Images, labels and digests."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    digests = np.array([row_digest(image) for image in images], dtype="V32")
    return images, np.arange(count) % 3, digests


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def write_version(storage: Storage, version: str = "v1", rows_per_shard: int = 8) -> DatasetVersion:
    """A version with a training split in several shards and an empty test split."""
    images, labels, digests = make_rows()
    shards = []
    for start in range(0, ROWS, rows_per_shard):
        part = slice(start, start + rows_per_shard)
        content = encode_table(shard_table(images[part], labels[part], digests[part]))
        path = f"datasets/pets/{version}/train/part-{len(shards):05d}.arrow"
        storage.write(path, content)
        shards.append(
            Shard(
                path=path, split="train", rows=len(labels[part]), size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )  # fmt: skip
    dataset = DatasetVersion(
        name="pets", version=version, digest="d" * 64, parent="", created_at="2026-01-01T00:00:00Z",
        class_names=NAMES, shape=SHAPE, splits={"train": ROWS}, class_counts={"train": {"cat": 7}},
        profile=merge([histogram(images)]), pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.2, 0.2),
        refused={"undecodable": 1}, notes={"copies": 0}, shards=tuple(shards),
    )  # fmt: skip
    write_manifest(storage, dataset)
    return dataset


@pytest.mark.parametrize("rows_per_shard", [3, 8, 20])
def test_what_is_written_is_read_back(storage: Storage, rows_per_shard: int) -> None:
    written = write_version(storage, rows_per_shard=rows_per_shard)
    assert open_version(storage, "pets") == written
    assert open_version(storage, "pets", "v1") == written
    split = read_split(storage, written, "train")
    images, labels, _ = make_rows()
    assert np.array_equal(split.images, images)
    assert split.images.dtype == np.uint8
    assert np.array_equal(split.labels, labels)
    assert split.row_ids.tolist() == list(range(ROWS))
    assert len(split) == ROWS


def test_the_newest_version_is_the_last_one_written(storage: Storage) -> None:
    assert newest_version(storage, "pets") == ""
    write_version(storage, "v1")
    write_version(storage, "v2")
    assert newest_version(storage, "pets") == "v2"
    assert open_version(storage, "pets").version == "v2"
    assert open_version(storage, "pets", "v1").version == "v1"


def test_shards_are_readable_by_pyarrow_alone(storage: Storage) -> None:
    dataset = write_version(storage)
    path = storage.path(dataset.shards[0].path)
    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all()
    images, labels, digests = make_rows()
    tensors = table["image"].combine_chunks().to_numpy_ndarray()
    assert table.column_names == ["image", "label", "digest"]
    assert np.array_equal(tensors, images[:8])
    assert table["label"].to_pylist() == labels[:8].tolist()
    assert table["digest"].to_pylist() == digests[:8].tolist()


def digest_of(order: list[int], **changes: Any) -> str:
    """The dataset digest of the rows in this order."""
    _, labels, digests = make_rows()
    values: dict[str, Any] = {
        "digests": digests[order],
        "labels": labels[order],
        "splits": (np.arange(ROWS) % 2).astype(np.int8)[order],
        "class_names": NAMES,
        "shape": SHAPE,
    }
    return dataset_digest(**{**values, **changes})


@given(st.permutations(range(ROWS)))
def test_the_digest_does_not_see_the_order_of_rows(order: list[int]) -> None:
    assert digest_of(order) == digest_of(list(range(ROWS)))


def test_the_digest_sees_everything_a_dataset_says() -> None:
    order, (_, labels, _) = list(range(ROWS)), make_rows()
    other_label, other_split = labels.copy(), (np.arange(ROWS) % 2).astype(np.int8)
    other_label[0], other_split[0] = 2, 2
    found = [
        digest_of(order),
        digest_of(order, labels=other_label),
        digest_of(order, splits=other_split),
        digest_of(order, class_names=("cat", "dog", "elk")),
        digest_of(order, shape=(5, 4, 3)),
        digest_of(order[1:]),
        digest_of([0, *order]),
        digest_of(order, labels=labels[::-1].copy()),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_corrupt(storage: Storage, keep: float) -> None:
    dataset = write_version(storage)
    path = Path(storage.path(dataset.shards[1].path))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(Corrupt, match=r"part-00001.arrow does not match the digest"):
        read_split(storage, dataset, "train")


def test_a_changed_byte_is_corrupt(storage: Storage) -> None:
    dataset = write_version(storage)
    path = Path(storage.path(dataset.shards[0].path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        read_split(storage, dataset, "train")


def test_a_missing_shard_is_missing(storage: Storage) -> None:
    dataset = write_version(storage)
    Path(storage.path(dataset.shards[2].path)).unlink()
    with pytest.raises(DataMissing, match=r"part-00002.arrow is named in the manifest"):
        read_split(storage, dataset, "train")


def test_an_empty_split_is_missing(storage: Storage) -> None:
    with pytest.raises(DataMissing, match="Split 'test' of pets:v1 has no rows"):
        read_split(storage, write_version(storage), "test")


def test_a_missing_dataset_or_version_says_what_there_is(storage: Storage) -> None:
    with pytest.raises(DataMissing, match=r"no dataset 'pets' .* none of that name"):
        open_version(storage, "pets")
    write_version(storage, "v1")
    storage.write("datasets/pets/v0/train/part-00000.arrow", b"a version that was never finished")
    with pytest.raises(DataMissing, match=r"no version 'v9' of dataset 'pets' .* there are v1\."):
        open_version(storage, "pets", "v9")
    with pytest.raises(DataMissing, match="no version 'v0'"):
        open_version(storage, "pets", "v0")


def test_a_damaged_manifest_is_corrupt(storage: Storage) -> None:
    dataset = write_version(storage)
    path = f"{dataset.folder}/manifest.json"
    for content in (b'{"name": "pets"', b"[]", b'{"name": "pets"}'):
        storage.write(path, content)
        with pytest.raises(Corrupt):
            open_version(storage, "pets")
    storage.write_json(path, {**asdict(dataset), "surprise": 1})
    with pytest.raises(Corrupt, match="surprise"):
        open_version(storage, "pets")


@pytest.mark.parametrize("channels", [1, 3])
def test_profiles_of_parts_add_up_to_the_profile_of_the_whole(channels: int) -> None:
    random = np.random.default_rng(2)
    images = random.integers(0, 256, (30, 6, 6, channels), dtype=np.uint8)
    whole = merge([histogram(images)])
    assert merge([histogram(images[:7]), histogram(images[7:8]), histogram(images[8:])]) == whole
    assert ("saturation" in whole) == (channels == 3)
    for statistic in whole.values():
        assert sum(statistic["counts"]) == 30
        assert len(statistic["counts"]) == NUM_BINS == len(statistic["edges"]) - 1


def test_image_statistics_of_known_images() -> None:
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    red = white.copy()
    red[..., 1:] = 0
    stripes = np.zeros((1, 4, 4, 1), np.uint8)
    stripes[:, :, ::2] = 255
    values = {name: stat.tolist() for name, stat in image_statistics(white).items()}
    assert values == {
        "brightness": [1.0],
        "contrast": [0.0],
        "sharpness": [0.0],
        "saturation": [0.0],
    }
    assert image_statistics(red)["saturation"][0] == 1.0
    assert image_statistics(stripes)["contrast"][0] == 0.5
    assert image_statistics(stripes)["sharpness"][0] == 0.5
    assert histogram(white)["brightness"][-1] == 1


def test_a_version_knows_its_folder(storage: Storage) -> None:
    assert replace(write_version(storage), version="v7").folder == "datasets/pets/v7"
