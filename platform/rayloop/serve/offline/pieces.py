"""Neighbouring rows of a dataset, a folder or Parquet files -> chunks of pixels for the engine.

A piece is small: it names rows and is sent to the process that reads them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from rayloop.data.contract import RowContract, RowRefused, check_pixels
from rayloop.data.versions import Shard, read_shard
from rayloop.errors import DataMissing, RequestError
from rayloop.remote import open_files
from rayloop.serve.images import decode_image
from rayloop.serve.protocol.error import ProtocolError
from rayloop.storage import Storage, is_local

Images = npt.NDArray[np.uint8]
Source = TypeVar("Source")

OPEN_SHARDS = 2
"""Shards a process keeps open. Its pieces come in row order, so older ones are done with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some rows, at most as many as go through the engine at once.

    Attributes:
        row_ids: int64 positions in the input, or paths as text.
        images: Pixels of the rows that could be read, uint8 (G, H, W, C).
        errors: For each row why it could not be read, empty where it could; no entries at all
            when every row could.
        truth: The true label of each row as text, null where it is unknown; None where the input
            has no labels.
    """

    row_ids: pa.Array
    images: Images
    errors: tuple[str, ...] = ()
    truth: pa.Array | None = None


class Piece(Protocol):
    """Neighbouring rows of an input."""

    def read(self, contract: RowContract, batch_rows: int) -> Iterator[Chunk]:
        """The rows in order.

        Args:
            contract: The shape the model takes, and its labels.
            batch_rows: Most rows in one chunk.

        Raises:
            DataMissing: A file that holds many rows is gone.
            Corrupt: A file does not match its digest.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Span(Generic[Source]):
    """Rows `first` up to, not including, `stop` of one source; the first has the id `row_id`."""

    source: Source
    first: int
    stop: int
    row_id: int


def spans_of(
    sources: Iterable[tuple[Source, int]], start: int, stop: int
) -> tuple[Span[Source], ...]:
    """Where the rows from `start` up to `stop` lie in sources that stand one after the other.

    Args:
        sources: Each source with its number of rows.
        start: First row, counted over all sources.
        stop: The row after the last.
    """
    found, begin = [], 0
    for source, rows in sources:
        first, last = max(start - begin, 0), min(stop - begin, rows)
        if first < last:
            found.append(Span(source=source, first=first, stop=last, row_id=begin + first))
        begin += rows
    return tuple(found)


@dataclass(frozen=True, slots=True)
class DatasetPiece:
    """Rows of memory-mapped shards; each shard is verified when it is opened."""

    root: str
    spans: tuple[Span[Shard], ...]
    labels: tuple[str, ...]

    def read(self, _: RowContract, batch_rows: int) -> Iterator[Chunk]:
        """The rows in order; their pixels are not copied."""
        names = pa.array(self.labels, pa.string())
        for span in self.spans:
            images, labels = _open_shard(self.root, span.source)
            for first in range(span.first, span.stop, batch_rows):
                stop = min(first + batch_rows, span.stop)
                row_id = span.row_id + first - span.first
                yield Chunk(
                    row_ids=pa.array(np.arange(row_id, row_id + stop - first)),
                    images=images[first:stop],
                    truth=names.take(pa.array(labels[first:stop])),
                )


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(root: str, shard: Shard) -> tuple[Any, Any]:
    return read_shard(Storage(root), shard)


@dataclass(frozen=True, slots=True)
class FolderPiece:
    """Some image files of a folder, decoded as `POST /predict` decodes a body."""

    root: str
    paths: tuple[str, ...]
    has_truth: bool

    def read(self, contract: RowContract, batch_rows: int) -> Iterator[Chunk]:
        """The files in order; with `has_truth` a file's folder is its label."""
        storage, shape = Storage(self.root), contract.shape
        for start in range(0, len(self.paths), batch_rows):
            paths = self.paths[start : start + batch_rows]
            images, errors = decode_all(
                paths, lambda path: decode_image(storage.read(path), shape), shape
            )
            labels = [PurePosixPath(path).parent.name for path in paths]
            yield Chunk(
                row_ids=pa.array(paths, pa.string()),
                images=images,
                errors=errors,
                truth=pa.array(labels, pa.string()) if self.has_truth else None,
            )


@dataclass(frozen=True, slots=True)
class ParquetPiece:
    """Some rows of Parquet files; only the row groups they lie in are read."""

    root: str
    spans: tuple[Span[str], ...]
    has_truth: bool

    def read(self, contract: RowContract, batch_rows: int) -> Iterator[Chunk]:
        """The rows in order; files are decoded as serving does, numbers as training does."""
        columns = ["image", "label"] if self.has_truth else ["image"]
        for span in self.spans:
            row_id = span.row_id
            for batch in _batches(self.root, span, columns, batch_rows):
                images, errors = decode_all(
                    cells_of(batch["image"]),
                    lambda value: pixels_of(value, contract),
                    contract.shape,
                )
                yield Chunk(
                    row_ids=pa.array(np.arange(row_id, row_id + len(batch))),
                    images=images,
                    errors=errors,
                    truth=labels_of(batch["label"], contract) if self.has_truth else None,
                )
                row_id += len(batch)


def decode_all(
    values: Iterable[Any], decode: Callable[[Any], Images], shape: tuple[int, int, int]
) -> tuple[Images, tuple[str, ...]]:
    """The pixels of what can be decoded, and what is wrong with the rest.

    Args:
        values: What `decode` takes, one for each row.
        decode: Gives an image of `shape`, or raises.
        shape: Height, width and channels.

    Returns:
        uint8 (G, H, W, C), and for each value a reason, empty where it was decoded; no reasons at
        all when every value was.
    """
    images: list[Images] = []
    errors: list[str] = []
    for value in values:
        try:
            images.append(decode(value))
            errors.append("")
        except (ProtocolError, RowRefused, DataMissing, OSError) as error:
            errors.append(str(error) or type(error).__name__)
    stacked = np.stack(images) if images else np.empty((0, *shape), np.uint8)
    return stacked, tuple(errors) if any(errors) else ()


def cells_of(column: pa.Array) -> list[Any]:
    """The cells of a column as Python values, tensors as arrays of their shape."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [cell.to_numpy() if cell.is_valid else None for cell in column]
    return column.to_pylist()  # type: ignore[no-any-return]


def pixels_of(value: Any, contract: RowContract) -> Images:
    """The pixels of one cell: an encoded file, a struct with its `bytes`, or numbers.

    Raises:
        ProtocolError: An encoded file that serving would refuse.
        RowRefused: Numbers that training would refuse, or nothing.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise RowRefused("undecodable: the cell is empty")
    if isinstance(value, bytes):
        return decode_image(value, contract.shape)
    try:
        pixels = np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise RowRefused(f"undecodable: {error}") from None
    return check_pixels(pixels, contract)


def labels_of(labels: pa.Array, contract: RowContract) -> pa.Array:
    """Labels as text: the model's name of a number; what the model does not know stays as it is."""
    names: list[str | None] = []
    for label in labels.to_pylist():
        index = contract.label_index(label)
        text = label.decode(errors="replace") if isinstance(label, bytes) else label
        unknown = None if text is None else str(text)
        names.append(unknown if index is None else contract.class_names[index])
    return pa.array(names, pa.string())


def _batches(
    root: str, span: Span[str], columns: list[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    with open_parquet(root, span.source) as file:
        groups, begin = row_groups(file.metadata, span.first, span.stop)
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns):
            first, stop = max(span.first - begin, 0), min(span.stop - begin, len(batch))
            begin += len(batch)
            if first < stop:
                yield batch.slice(first, stop - first)


def row_groups(metadata: Any, first: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold the rows from `first` up to `stop`, and the rows before them.

    Args:
        metadata: Of a Parquet file.
        first: First row in the file.
        stop: The row after the last.
    """
    groups, begin, before = [], 0, 0
    for index in range(metadata.num_row_groups):
        end = begin + metadata.row_group(index).num_rows
        if end <= first:
            before = end
        elif begin < stop:
            groups.append(index)
        begin = end
    return groups, before


@contextmanager
def open_parquet(root: str, path: str) -> Iterator[Any]:
    """A Parquet file under a folder or URI.

    Raises:
        DataMissing: It is gone.
        RequestError: It is no Parquet file.
    """
    files_system, base = locate(root)
    try:
        with files_system.open_input_file(f"{base}/{path}") as stream:
            yield pq.ParquetFile(stream)
    except FileNotFoundError:
        raise DataMissing(f"There is no file {root}/{path} any more.") from None
    except pa.ArrowInvalid as error:
        raise RequestError(
            f"{root}/{path} cannot be read as Parquet ({error}); replace it or move it away."
        ) from None


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of an absolute path or URI, and the path in it."""
    if not is_local(path):
        return open_files(path)
    return pafs.LocalFileSystem(), str(Path(path))
