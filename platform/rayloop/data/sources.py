"""A data source by name -> a Ray Dataset of raw rows, and the contract they must keep.

Every raw row has `label`, `origin` (where it came from, for the quarantine list), `given` (the
split the source names, or empty) and either `pixels` (raw bytes of an array of `raw_shape`) or
`content` (an encoded image file).
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from pyarrow import fs as pafs

from rayloop.config import DataConfig
from rayloop.data import fashion_mnist
from rayloop.data.contract import RowContract, RowRefused, decode
from rayloop.errors import Corrupt, DataMissing
from rayloop.logs import stage_logger
from rayloop.remote import open_files
from rayloop.storage import home, is_local

log = stage_logger("data")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ROWS_PER_BLOCK = 8192
FOOTER_READERS = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
FILES_PER_FOOTER_READER = 100
MOST_FOOTER_READERS = 32
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


@dataclass(frozen=True, slots=True)
class RawSource:
    """Raw rows and what they must be.

    Attributes:
        rows: The Ray Dataset described in the module's docstring.
        contract: Shape and labels every row must have.
        raw_shape: Shape of `pixels`; empty for rows with `content`.
    """

    rows: ray.data.Dataset
    contract: RowContract
    raw_shape: tuple[int, ...] = ()


def open_source(config: DataConfig) -> RawSource:
    """Open the configured source.

    Raises:
        DataMissing: It is not there; the message says where it was looked for.
        Corrupt: Its files are damaged.
    """
    return _SOURCES[config.source](config)


def _downloads() -> Path:
    root = home()
    return Path(root if is_local(root) else ".rayloop").resolve() / "downloads"


def _fashion_mnist(_: DataConfig) -> RawSource:
    splits = fashion_mnist.load(_downloads())
    return _from_arrays("fashion-mnist", splits, fashion_mnist.CLASS_NAMES)


def _digits(_: DataConfig) -> RawSource:
    from sklearn.datasets import load_digits  # noqa: PLC0415  slow to import, rarely needed

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    splits = {"": (images, bunch.target.astype(np.int64))}
    return _from_arrays("digits", splits, tuple(str(name) for name in bunch.target_names))


def _cifar10(_: DataConfig) -> RawSource:
    folder = _downloads() / CIFAR10_FOLDER
    if not folder.is_dir():
        _download_cifar10(folder.parent)
    files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    splits = {
        split: read_cifar10([folder / name for name in names]) for split, names in files.items()
    }
    return _from_arrays("cifar10", splits, CIFAR10_NAMES)


def _download_cifar10(downloads: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive  # noqa: PLC0415

    try:
        download_and_extract_archive(CIFAR10_URL, str(downloads), md5=CIFAR10_MD5)
    except (OSError, RuntimeError) as error:
        raise DataMissing(
            f"CIFAR-10 is not in {downloads / CIFAR10_FOLDER} and cannot be downloaded ({error}). "
            f"Unpack cifar-10-binary.tar.gz (MD5 {CIFAR10_MD5}) into {downloads}."
        ) from None


def read_cifar10(files: list[Path]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read CIFAR-10's binary files: per row one label byte and 3 x 32 x 32 pixel bytes.

    Raises:
        DataMissing: A file is not there.
        Corrupt: A file is not a whole number of rows.
    """
    parts = []
    for path in files:
        if not path.is_file():
            raise DataMissing(f"{path} is missing; unpack cifar-10-binary.tar.gz again.")
        content = np.fromfile(path, np.uint8)
        if len(content) == 0 or len(content) % 3073:
            raise Corrupt(f"{path} has {len(content)} bytes, not a multiple of 3073; replace it.")
        parts.append(content.reshape(-1, 3073))
    rows = np.concatenate(parts)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, 0].astype(np.int64)


def _from_arrays(
    origin: str,
    splits: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]],
    class_names: tuple[str, ...],
) -> RawSource:
    shape = next(iter(splits.values()))[0].shape[1:]
    tables = [
        _array_block(origin, split, start, images, labels)
        for split, (images, labels) in splits.items()
        for start in range(0, len(labels), ROWS_PER_BLOCK)
    ]
    contract = RowContract(shape=(shape[0], shape[1], shape[2]), class_names=class_names)
    return RawSource(ray.data.from_arrow(tables), contract, tuple(shape))


def _array_block(
    origin: str,
    split: str,
    start: int,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
) -> pa.Table:
    stop = min(start + ROWS_PER_BLOCK, len(labels))
    size = int(np.prod(images.shape[1:]))
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), stop - start, [None, pa.py_buffer(images[start:stop].tobytes())]
    )
    columns = {
        "pixels": pixels,
        "label": pa.array(labels[start:stop]),
        "origin": [f"{origin}/{split or 'all'}#{index}" for index in range(start, stop)],
        "given": [split] * (stop - start),
    }
    return pa.table(columns)


def _image_folder(config: DataConfig) -> RawSource:
    """PATH/CLASS/*.png, or PATH/train/CLASS/* beside PATH/test/CLASS/*."""
    files_system, root = _locate(config.path)
    selector = pafs.FileSelector(root, recursive=True)
    paths = sorted(
        info.path
        for info in files_system.get_file_info(selector)
        if info.type == pafs.FileType.File and info.path.lower().endswith(IMAGE_SUFFIXES)
    )
    parts = [Path(path).relative_to(root).parts for path in paths]
    has_splits = bool(parts) and all(
        len(part) > 2 and part[0] in ("train", "test") for part in parts
    )
    depth = 1 if has_splits else 0
    if not paths or any(len(part) != depth + 2 for part in parts):
        raise DataMissing(
            f"data.path={config.path} has no images as CLASS/FILE or as train/CLASS/FILE beside "
            f"test/CLASS/FILE ({len(paths)} files end in {', '.join(IMAGE_SUFFIXES)})."
        )
    table = pa.table(
        {
            "path": paths,
            "label": [part[depth] for part in parts],
            "origin": ["/".join(part) for part in parts],
            "given": [part[0] if has_splits else "" for part in parts],
        }
    )

    def read_files(batch: pa.Table) -> pa.Table:
        content = [_read_file(files_system, path) for path in batch["path"].to_pylist()]
        column = pa.array(content, pa.large_binary())
        return batch.drop_columns(["path"]).append_column("content", column)

    blocks = [table.slice(start, 512) for start in range(0, len(table), 512)]
    rows = ray.data.from_arrow(blocks).map_batches(read_files, batch_format="pyarrow")
    contents = (_read_file(files_system, path) for path in paths)
    names = tuple(sorted(set(table["label"].to_pylist())))
    return RawSource(rows, _contract_of_first(config, contents, names))


def _read_file(files_system: pafs.FileSystem, path: str) -> bytes:
    with files_system.open_input_stream(path) as stream:
        return bytes(stream.read())


def _parquet(config: DataConfig) -> RawSource:
    """Columns `image` (encoded bytes, a struct with `bytes`, or numbers) and `label`; `split`."""
    files_system, root = _locate(config.path)
    with _footer_readers(files_system, root):
        rows = ray.data.read_parquet(root, filesystem=files_system)
    names = rows.schema().names
    if not {"image", "label"} <= set(names):
        raise DataMissing(
            f"data.path={config.path} has columns {', '.join(names)}; it needs 'image' and 'label'."
        )
    labels = config.class_names or _labels_that_occur(rows)
    rows = rows.map_batches(_parquet_rows, batch_format="pyarrow")
    head: pa.Table = rows.take_batch(64, batch_format="pyarrow")
    first = head["content"].to_pylist()
    return RawSource(rows, _contract_of_first(config, iter(first), labels))


@contextmanager
def _footer_readers(files_system: pafs.FileSystem, root: str) -> Iterator[None]:
    """As many processes that read files' footers as there is work for; a user's number stays.

    Ray starts 32 for every pass over the data, each of which costs two seconds of CPU time before
    it reads anything, even where there is a single file.
    """
    if FOOTER_READERS in os.environ:
        yield
        return
    is_file = files_system.get_file_info(root).type == pafs.FileType.File
    inside = pafs.FileSelector(root, recursive=True)
    num_files = 1 if is_file else len(files_system.get_file_info(inside))
    wanted = max(1, min(MOST_FOOTER_READERS, math.ceil(num_files / FILES_PER_FOOTER_READER)))
    os.environ[FOOTER_READERS] = str(wanted)
    try:
        yield
    finally:
        del os.environ[FOOTER_READERS]


def _labels_that_occur(rows: ray.data.Dataset) -> tuple[str, ...]:
    found = [
        label
        for label in rows.unique("label")
        if isinstance(label, (str, bytes)) or (label is not None and np.isfinite(label))
    ]
    if all(isinstance(label, (int, float)) for label in found):
        return tuple(str(index) for index in range(int(max(found, default=-1)) + 1))
    return tuple(
        sorted(
            label.decode(errors="replace") if isinstance(label, bytes) else str(label)
            for label in found
        )
    )


def _parquet_rows(batch: pa.Table) -> pa.Table:
    """Bring a Parquet batch to raw rows; numbers become `.npy` content, so that shape survives."""
    contents = [_content_of(value) for value in batch["image"].to_pylist()]
    given = batch["split"].to_pylist() if "split" in batch.column_names else [""] * len(batch)
    return pa.table(
        {
            "content": pa.array(contents, pa.large_binary()),
            "label": batch["label"],
            "origin": [f"parquet:{hash_of(content)}" for content in contents],
            "given": [split if split in ("train", "test") else "" for split in given],
        }
    )


def hash_of(content: bytes | None) -> str:
    """A short name for a row without a name of its own: the start of its content's SHA-256."""
    return hashlib.sha256(content or b"").hexdigest()[:12]


def _content_of(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value
    buffer = io.BytesIO()
    try:
        np.save(buffer, np.asarray(value), allow_pickle=False)
    except ValueError:  # rows of unequal length, or a missing number: no image
        return None
    return buffer.getvalue()


def read_content(content: bytes | None) -> Any:
    """An encoded image as a PIL image, or `.npy` bytes as an array.

    Raises:
        RowRefused: It is neither.
    """
    if not content:
        raise RowRefused("undecodable: empty, or not an array of numbers")
    if not content.startswith(b"\x93NUMPY"):
        return decode(content)
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise RowRefused(f"undecodable: {error}") from None


def _contract_of_first(
    config: DataConfig, contents: Iterator[bytes | None], class_names: tuple[str, ...]
) -> RowContract:
    """Shape from the settings, and where they leave it open from the first good row."""
    for content in contents:
        try:
            first = read_content(content)
        except RowRefused:
            continue
        shape = first.shape if isinstance(first, np.ndarray) else (first.height, first.width)
        grey = shape[2:] == (1,) or (
            len(shape) == 2 and getattr(first, "mode", "L") in ("L", "1", "I;16")
        )
        side = config.image_size
        height, width = (side, side) if side else (int(shape[0]), int(shape[1]))
        channels = config.channels or (1 if grey else 3)
        return RowContract(
            shape=(height, width, channels),
            class_names=class_names,
            resize=bool(side),
            convert=bool(config.channels),
        )
    raise DataMissing(f"data.path={config.path} has no image that can be decoded.")


def _locate(path: str) -> tuple[pafs.FileSystem, str]:
    if not is_local(path):
        return open_files(path)
    if not Path(path).exists():
        raise DataMissing(f"data.path={path} does not exist; give an existing folder or file.")
    return pafs.LocalFileSystem(), str(Path(path).resolve())


_SOURCES: dict[str, Callable[[DataConfig], RawSource]] = {
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    "cifar10": _cifar10,
    "image-folder": _image_folder,
    "parquet": _parquet,
}
