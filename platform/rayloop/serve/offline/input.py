"""An address -> the rows batch prediction reads, in a fixed order: a dataset, images or Parquet."""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs as pafs

from rayloop.config import BatchConfig, DataConfig, digest_of
from rayloop.data.contract import RowContract
from rayloop.data.versions import SPLITS, open_version
from rayloop.errors import DataMissing, RequestError
from rayloop.serve.offline.pieces import (
    DatasetPiece,
    FolderPiece,
    ParquetPiece,
    Piece,
    locate,
    open_parquet,
    spans_of,
)
from rayloop.storage import Storage

DATASET_PREFIX = "dataset:"
DEFAULT_SPLIT = "test"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files that are images by their names; those of a format that serving does not take become rows
with an error, so that nothing is left out in silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchInput:
    """All rows of one batch prediction.

    Attributes:
        kind: `dataset`, `folder` or `parquet`.
        where: The address in full.
        name: Short, and no input with other rows has the same.
        digest: Equal for two inputs with the same rows in the same order.
        rows: How many.
        has_truth: Whether rows have labels.
        piece: The rows from one position up to, not including, another.
    """

    kind: str
    where: str
    name: str
    digest: str
    rows: int
    has_truth: bool
    piece: Callable[[int, int], Piece]


def resolve_input(
    storage: Storage, data: DataConfig, batch: BatchConfig, contract: RowContract
) -> BatchInput:
    """What `batch.input` names.

    Args:
        storage: Holds the datasets.
        data: Names the dataset where `batch.input` is empty.
        batch: The batch section.
        contract: The shape the model takes, and its labels.

    Raises:
        DataMissing: There is nothing of that name, or it has no rows.
        RequestError: It is of no known kind, or its images do not suit the model.
    """
    address = batch.input
    if not address:
        version = f"/{data.version}" if data.version else ""
        address = f"{DATASET_PREFIX}{data.dataset_name}{version}/{DEFAULT_SPLIT}"
    if address.startswith(DATASET_PREFIX):
        return _dataset(storage, address, contract)
    root, files = list_files(storage, address)
    tables = [file for file in files if file.path.lower().endswith(".parquet")]
    images = [file for file in files if file.path.lower().endswith(IMAGE_SUFFIXES)]
    if tables and images:
        raise RequestError(
            f"batch.input={address} holds {len(tables)} Parquet files and {len(images)} images; "
            "name a folder that holds one kind."
        )
    if tables:
        return _parquet(root, tables)
    if images:
        return _folder(root, images, contract)
    raise DataMissing(
        f"batch.input={address} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet "
        f"files (.parquet) among its {len(files)} files."
    )


def parse_dataset(address: str) -> tuple[str, str, str]:
    """Name, version (empty for the newest) and split of `dataset:NAME[/VERSION][/SPLIT]`.

    Raises:
        RequestError: It is not of this form.
    """
    name, *rest = address.removeprefix(DATASET_PREFIX).split("/")
    split = rest.pop() if rest and (len(rest) == 2 or rest[-1] in SPLITS) else DEFAULT_SPLIT
    version = rest.pop() if rest else ""
    if name and not rest and split in SPLITS:
        return name, version, split
    close = difflib.get_close_matches(split, SPLITS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close and split not in SPLITS else ""
    raise RequestError(
        f"batch.input={address} is not dataset:NAME[/VERSION][/SPLIT] with a SPLIT out of "
        f"{', '.join(SPLITS)}.{hint}"
    )


def _dataset(storage: Storage, address: str, contract: RowContract) -> BatchInput:
    name, version, split = parse_dataset(address)
    dataset = open_version(storage, name, version)
    if dataset.shape != contract.shape:
        raise RequestError(
            f"{address} has images of {_size(dataset.shape)} and the model takes "
            f"{_size(contract.shape)} (height x width x channels). Name another input with "
            "--batch.input, or another model with --registry.model or --batch.version."
        )
    if not dataset.splits.get(split):
        raise DataMissing(f"{address}: split {split!r} of {name}:{dataset.version} has no rows.")
    shards = [(shard, shard.rows) for shard in dataset.shards if shard.split == split]
    return BatchInput(
        kind="dataset",
        where=f"{DATASET_PREFIX}{name}/{dataset.version}/{split}",
        name=f"{name}-{dataset.version}-{split}",
        digest=digest_of([dataset.digest, split]),
        rows=dataset.splits[split],
        has_truth=True,
        piece=lambda start, stop: DatasetPiece(
            storage.root, spans_of(shards, start, stop), dataset.class_names
        ),
    )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input: path relative to the root, bytes, and time of change in ns."""

    path: str
    size_bytes: int
    changed_ns: int


def list_files(storage: Storage, address: str) -> tuple[str, list[InputFile]]:
    """Every file at an address, by path, without hidden ones; and the root they are relative to.

    Args:
        storage: Its datasets are named in the hint where the address is none.
        address: A folder, a file or an URI.

    Raises:
        DataMissing: There is nothing.
        RequestError: It cannot be listed.
    """
    address = address if "://" in address else str(Path(address).resolve())
    try:
        files_system, base = locate(address)
        info = files_system.get_file_info(base)
        if info.type == pafs.FileType.File:
            found, address = [info], address.rpartition("/")[0]
            base = base.rpartition("/")[0]
        else:
            found = files_system.get_file_info(
                pafs.FileSelector(base, allow_not_found=True, recursive=True)
            )
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"batch.input={address} cannot be read: {error}") from None
    if info.type == pafs.FileType.NotFound:
        raise DataMissing(
            f"batch.input={address} does not exist; give an existing folder or file, or "
            f"{DATASET_PREFIX}NAME[/VERSION][/SPLIT] for a dataset"
            f" (there are {', '.join(storage.names('datasets')) or 'none'})."
        )
    files = [
        InputFile(entry.path[len(base) :].lstrip("/"), entry.size, entry.mtime_ns or 0)
        for entry in found
        if entry.type == pafs.FileType.File
    ]
    shown = (file for file in files if not any(p[0] == "." for p in file.path.split("/")))
    return address, sorted(shown, key=lambda file: file.path)


def listing_digest(files: Sequence[InputFile]) -> str:
    """SHA-256 over paths, sizes and times of change: another one may mean other rows."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path}\0{file.size_bytes}\0{file.changed_ns}\n".encode())
    return total.hexdigest()


def _folder(root: str, files: Sequence[InputFile], contract: RowContract) -> BatchInput:
    """Image files; where every file's folder is named like a class, that is its true label."""
    digest, paths = listing_digest(files), tuple(file.path for file in files)
    has_truth = {PurePosixPath(path).parent.name for path in paths} <= set(contract.class_names)
    return BatchInput(
        kind="folder",
        where=root,
        name=f"{PurePosixPath(root).name}-{digest[:8]}",
        digest=digest,
        rows=len(paths),
        has_truth=has_truth,
        piece=lambda start, stop: FolderPiece(root, paths[start:stop], has_truth),
    )


def _parquet(root: str, files: Sequence[InputFile]) -> BatchInput:
    """Parquet files with a column `image`, and `label` where all have it."""
    digest, sources, labelled = listing_digest(files), [], []
    for file in files:
        with open_parquet(root, file.path) as opened:
            names = opened.schema_arrow.names
            rows = opened.metadata.num_rows
        if "image" not in names:
            raise RequestError(
                f"{root}/{file.path} has columns {', '.join(names)}; batch prediction needs one "
                "called 'image' (encoded bytes, a struct with `bytes`, or numbers)."
            )
        sources.append((file.path, rows))
        labelled.append("label" in names)
    total, has_truth = sum(rows for _, rows in sources), all(labelled)
    where = f"{root}/{files[0].path}" if len(files) == 1 else root
    if not total:
        raise DataMissing(f"batch.input={where}: its Parquet files have no rows.")
    return BatchInput(
        kind="parquet",
        where=where,
        name=f"{PurePosixPath(where).stem}-{digest[:8]}",
        digest=digest,
        rows=total,
        has_truth=has_truth,
        piece=lambda start, stop: ParquetPiece(root, spans_of(sources, start, stop), has_truth),
    )
