"""A dataset version on disk: Arrow shards of uint8 images beside a manifest that tells all of it.

`datasets/NAME/VERSION/SPLIT/part-NNNNN.arrow` holds fixed-shape tensors that pyarrow reads without
Ray. `manifest.json` is written last: a folder without it is not a version. Rows stand in the order
of their content digests, so neither the source's order nor the number of shards can be seen in
what is trained.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayloop.errors import Corrupt, DataMissing
from rayloop.node_cache import drop, local_copy
from rayloop.storage import Storage

SPLITS = ("train", "val", "test")
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One stored file: where it is, how many rows, and the digest of its bytes."""

    path: str
    split: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetVersion:
    """What `prepare_data` gives and everything later reads.

    Attributes:
        name: The dataset's name.
        version: The first 12 hex digits of `digest`.
        digest: SHA-256 over the contents and labels of all rows with their splits, over the class
            names and the shape; not over file bytes.
        parent: The version that was newest before, or empty.
        created_at: ISO 8601, UTC.
        class_names: Label names in index order.
        shape: Height, width, channels.
        splits: Rows per split.
        class_counts: Rows per split and class name.
        profile: Histograms of simple image statistics of the training split, for drift.
        pixel_mean: Per-channel mean of the training split, pixels scaled to 0..1.
        pixel_std: Per-channel standard deviation, same scale.
        refused: Rows that broke the row contract, by kind of reason.
        notes: Counts of duplicates and of what was done about them.
        shards: The stored files, in row order within each split.
    """

    name: str
    version: str
    digest: str
    parent: str
    created_at: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    splits: dict[str, int]
    class_counts: dict[str, dict[str, int]]
    profile: dict[str, Any]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    refused: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    @property
    def folder(self) -> str:
        """The version's folder, relative to the storage root."""
        return version_folder(self.name, self.version)


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one split in memory.

    Attributes:
        images: uint8, shape (N, H, W, C).
        labels: int64, shape (N,).
        row_ids: int64, shape (N,): positions in the split's canonical order.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def version_folder(name: str, version: str) -> str:
    """Where a version lives, relative to the storage root."""
    return f"datasets/{name}/{version}"


def dataset_digest(
    digests: npt.NDArray[np.void],
    labels: npt.NDArray[np.int64],
    splits: npt.NDArray[np.int8],
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
) -> str:
    """SHA-256 over what a dataset says, whatever the order of its rows or their files.

    Args:
        digests: Content digest of each row, shape (N,), 32 bytes each.
        labels: Class index of each row, shape (N,).
        splits: Index into `SPLITS` of each row, shape (N,).
        class_names: Label names in index order.
        shape: Height, width, channels.
    """
    rows = np.empty(len(labels), dtype=[("split", "i1"), ("digest", "V32"), ("label", ">i8")])
    rows["split"], rows["digest"], rows["label"] = splits, digests, labels
    as_bytes = rows.view(f"V{rows.dtype.itemsize}")
    total = hashlib.sha256(json.dumps([FORMAT, list(class_names), list(shape)]).encode())
    total.update(np.array(sorted(as_bytes.tolist()), dtype=as_bytes.dtype).tobytes())
    return total.hexdigest()


def write_manifest(storage: Storage, dataset: DatasetVersion) -> None:
    """Make a version visible, and the newest, once all its shards are in place."""
    storage.write_json(f"{dataset.folder}/manifest.json", asdict(dataset))
    storage.write_json(f"datasets/{dataset.name}/latest.json", {"version": dataset.version})


def newest_version(storage: Storage, name: str) -> str:
    """The newest version of a dataset; empty when there is none."""
    path = f"datasets/{name}/latest.json"
    return str(storage.read_json(path)["version"]) if storage.exists(path) else ""


def open_version(storage: Storage, name: str, version: str = "") -> DatasetVersion:
    """Read a version's manifest.

    Args:
        storage: The root everything lives under.
        name: The dataset's name.
        version: Which one; empty means the newest.

    Raises:
        DataMissing: There is no such dataset or version.
        Corrupt: The manifest is damaged.
    """
    chosen = version or newest_version(storage, name)
    path = f"{version_folder(name, chosen)}/manifest.json"
    if not chosen or not storage.exists(path):
        known = storage.names(f"datasets/{name}")
        versions = [
            entry for entry in known if storage.exists(f"datasets/{name}/{entry}/manifest.json")
        ]
        what = f"version {chosen!r} of dataset {name!r}" if chosen else f"dataset {name!r}"
        have = f"there are {', '.join(versions)}" if versions else "there is none of that name"
        raise DataMissing(
            f"There is no {what} under {storage.root}; {have}. "
            "Prepare one: python jobs/prepare_data.py PRESET"
        )
    return _from_json(storage.read_json(path), storage.path(path))


def _from_json(fields: dict[str, Any], origin: str) -> DatasetVersion:
    try:
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        for name in ("class_names", "shape", "pixel_mean", "pixel_std"):
            fields[name] = tuple(fields[name])
        return DatasetVersion(**fields)
    except (KeyError, TypeError) as error:
        raise Corrupt(
            f"{origin} is not a manifest this rayloop can read ({error}); prepare the data again."
        ) from None


def shard_table(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    digests: npt.NDArray[np.void],
) -> pa.Table:
    """Rows as an Arrow table: `image` fixed-shape tensor, `label` int64, `digest` 32 bytes."""
    size = int(np.prod(images.shape[1:]))
    pixels = pa.array(np.ascontiguousarray(images).reshape(-1))
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.uint8(), images.shape[1:]),
        pa.FixedSizeListArray.from_arrays(pixels, size),
    )
    digest = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(digests), [None, pa.py_buffer(digests.tobytes())]
    )
    return pa.table({"image": tensor, "label": pa.array(labels, pa.int64()), "digest": digest})


def encode_table(table: pa.Table) -> bytes:
    """An Arrow IPC file, uncompressed so that it can be memory-mapped, in one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def decode_table(source: pa.NativeFile | pa.Buffer) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images (N, H, W, C) and labels (N,) of a stored shard, without copying the pixels."""
    table = pa.ipc.open_file(source).read_all()
    image = table.column("image").chunk(0)
    return image.to_numpy_ndarray(), table.column("label").to_numpy()


def read_shard(storage: Storage, shard: Shard, verify: bool = True) -> tuple[Any, Any]:
    """Images and labels of one shard, memory-mapped: where it lies, or as a copy on this node.

    Raises:
        DataMissing: The file is gone.
        Corrupt: The bytes do not match the manifest.
    """
    source = _bytes_of(storage, shard)
    is_good = not verify or hashlib.sha256(source).hexdigest() == shard.sha256
    if not is_good and not storage.is_local:  # the copy may be what is damaged
        drop(shard.sha256)
        source = pa.py_buffer(storage.read(shard.path))
        is_good = hashlib.sha256(source).hexdigest() == shard.sha256
    if not is_good:
        raise Corrupt(
            f"{storage.path(shard.path)} does not match the digest in its manifest: the file was "
            "truncated or changed. Remove its version folder and prepare the data again."
        )
    return decode_table(source)


def _bytes_of(storage: Storage, shard: Shard) -> pa.Buffer:
    local = storage.local_path(shard.path)
    if local is not None and not local.is_file():
        raise DataMissing(
            f"{local} is named in the manifest and is missing; remove its version folder and "
            "prepare the data again."
        )
    if local is None:
        local = local_copy(storage, shard.path, shard.sha256, shard.size_bytes)
    if local is None:
        return pa.py_buffer(storage.read(shard.path))
    return pa.memory_map(str(local)).read_buffer()


def read_split(storage: Storage, dataset: DatasetVersion, split: str) -> Split:
    """All rows of one split, verified against the manifest.

    Raises:
        DataMissing: The split is empty or a file is gone.
        Corrupt: A file's bytes do not match the manifest.
    """
    shards = [shard for shard in dataset.shards if shard.split == split]
    if not shards:
        raise DataMissing(f"Split {split!r} of {dataset.name}:{dataset.version} has no rows.")
    parts = [read_shard(storage, shard) for shard in shards]
    images = parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    return Split(images, labels, np.arange(len(labels)))
