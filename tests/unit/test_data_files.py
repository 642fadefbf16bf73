"""Published datasets' own file formats: read when whole, refused when damaged or not there."""

import gzip
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from rayloop.config import DataConfig
from rayloop.data import fashion_mnist, sources
from rayloop.data.contract import RowContract, row_digest
from rayloop.data.prepare import digest_keys, write_shard
from rayloop.data.versions import Shard, read_shard
from rayloop.errors import Corrupt, DataMissing
from rayloop.storage import Storage


def idx(values: npt.NDArray[np.uint8]) -> bytes:
    """An array in the IDX format."""
    sizes = struct.pack(f">{values.ndim}i", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.arange(6, dtype=np.uint8)


def fetch_that_gives(folder: Path | None) -> Callable[[Path], Path | None]:
    """Stands for a way to fetch the files."""

    def fetch(staged: Path) -> Path | None:
        """a way to fetch."""
        assert staged.is_dir()
        return folder

    return fetch


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small dataset in Fashion-MNIST's files, and its digests."""
    digests = {}
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name in fashion_mnist.CONTENT_SHA256:
        content = idx(IMAGES if "images" in name else LABELS)
        digests[name] = hashlib.sha256(content).hexdigest()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(fashion_mnist, "CONTENT_SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-package")
    return tmp_path


def test_fashion_mnists_files_are_read(downloads: Path) -> None:
    splits = fashion_mnist.load(downloads)
    assert list(splits) == ["train", "test"]
    for images, labels in splits.values():
        assert np.array_equal(images[..., 0], IMAGES)
        assert images.shape == (6, 28, 28, 1)
        assert labels.tolist() == LABELS.tolist()
        assert labels.dtype == np.int64


def test_other_content_in_the_right_place_is_corrupt(downloads: Path) -> None:
    path = downloads / "fashion-mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(LABELS[::-1])))
    with pytest.raises(Corrupt, match="does not hold the published Fashion-MNIST"):
        fashion_mnist.load(downloads)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_download_is_corrupt(downloads: Path, keep: float) -> None:
    path = downloads / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(Corrupt, match="remove it and run again"):
        fashion_mnist.load(downloads)


def test_bytes_that_are_not_gzip_are_corrupt(downloads: Path) -> None:
    (downloads / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(
        b"<html>not found</html>"
    )
    with pytest.raises(Corrupt, match="cannot be unpacked"):
        fashion_mnist.load(downloads)


def test_files_that_are_nowhere_are_missing_with_the_places_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-package")
    for name in ("_fetch_with_torchvision", "_fetch_debian_package"):
        monkeypatch.setattr(fashion_mnist, name, fetch_that_gives(None))
    with pytest.raises(DataMissing, match=r"no-package.*apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_fetched_is_kept(downloads: Path, tmp_path_factory: pytest.TempPathFactory,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    fresh = tmp_path_factory.mktemp("fresh")
    monkeypatch.setattr(fashion_mnist, "_fetch_with_torchvision", fetch_that_gives(None))
    found = fetch_that_gives(downloads / "fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "_fetch_debian_package", found)
    assert fashion_mnist.find(fresh) == fresh / "fashion-mnist"
    assert not fashion_mnist._is_complete(downloads / "fashion-mnist")  # they were moved
    assert fashion_mnist.find(fresh) == fresh / "fashion-mnist"


def test_cifar10s_rows_are_a_label_and_three_planes(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    rows = np.concatenate([np.arange(5, dtype=np.uint8)[:, None],
                           images.transpose(0, 3, 1, 2).reshape(5, -1)], axis=1)  # fmt: skip
    files = [tmp_path / "one.bin", tmp_path / "two.bin"]
    files[0].write_bytes(rows[:3].tobytes())
    files[1].write_bytes(rows[3:].tobytes())
    read, labels = sources.read_cifar10(files)
    assert np.array_equal(read, images)
    assert labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 3072, 3074])
def test_a_cifar10_file_of_another_size_is_corrupt(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(Corrupt, match=f"has {size} bytes, not a multiple of 3073"):
        sources.read_cifar10([path])


def test_a_missing_cifar10_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="unpack cifar-10-binary"):
        sources.read_cifar10([tmp_path / "data_batch_1.bin"])


def test_a_shard_is_the_same_whatever_the_order_of_its_rows(tmp_path: Path) -> None:
    contract = RowContract(shape=(28, 28, 1), class_names=("a", "b", "c", "d", "e", "f"))
    storage = Storage(str(tmp_path))
    digests = [row_digest(image[..., None]) for image in IMAGES]
    entries = []
    for order in (range(6), [3, 1, 5, 0, 2, 4]):
        group = pa.table({
            "pixels": pa.array([IMAGES[i].tobytes() for i in order], pa.large_binary()),
            "label": [int(LABELS[i]) for i in order],
            "digest": pa.array([digests[i] for i in order], pa.binary(32)),
            "shard": ["train/00000"] * 6,
        })  # fmt: skip
        entries.append(write_shard(group, contract, storage, "datasets/d/v"))
    assert entries[0] == entries[1]
    assert entries[0]["class_counts"] == [1] * 6
    assert entries[0]["pixel_sum"][0] == pytest.approx((IMAGES / 255).sum())
    images, labels = read_shard(storage, Shard(**entries[0]["shard"]))
    expected = sorted(range(6), key=lambda i: digests[i])
    assert labels.tolist() == expected
    assert np.array_equal(images[..., 0], IMAGES[expected])


def test_keys_keep_the_order_of_digests() -> None:
    digests = sorted(row_digest(image[..., None]) for image in IMAGES)
    keys = digest_keys(np.array(digests, dtype="V32"))
    assert keys.tolist() == [int.from_bytes(digest[:8], "big") for digest in digests]
    assert digest_keys(np.array([], dtype="V32")).tolist() == []


@pytest.mark.parametrize(
    ("files", "set_by_user", "processes"),
    [(0, "", "1"), (1, "", "1"), (100, "", "1"), (101, "", "2"), (1, "7", "7")],
)
def test_parquet_footers_are_read_by_as_many_processes_as_there_is_work_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: int,
    set_by_user: str,
    processes: str,
) -> None:
    name = sources.FOOTER_READERS
    monkeypatch.delenv(name, raising=False)
    if set_by_user:
        monkeypatch.setenv(name, set_by_user)
    for number in range(files):
        (tmp_path / f"{number}.parquet").touch()
    path = tmp_path / "0.parquet" if files == 1 else tmp_path
    seen = []

    def read_parquet(*_: object, **__: object) -> None:
        seen.append(os.environ[name])
        raise DataMissing("enough")

    monkeypatch.setattr(sources.ray.data, "read_parquet", read_parquet)
    with pytest.raises(DataMissing, match="enough"):
        sources.open_source(DataConfig(source="parquet", path=str(path)))
    assert seen == [processes]
    assert os.environ.get(name, "") == set_by_user
