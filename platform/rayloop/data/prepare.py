"""A raw source -> a published dataset version: decode, check, split by content, write shards.

Two passes of one Ray Data pipeline. The first checks every row and names it by its content; from
the names alone the driver knows the version's digest, and stops there when that version exists.
The second sorts rows into shards, a shard being a range of content digests, and each is written
by one task.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from rayloop.clock import SYSTEM_CLOCK, Clock, iso_utc
from rayloop.config import DataConfig
from rayloop.data.contract import (
    Pixels,
    RowContract,
    RowRefused,
    as_pixels,
    check_pixels,
    choose_split,
    row_digest,
)
from rayloop.data.profile import histogram, merge
from rayloop.data.sources import RawSource, open_source, read_content
from rayloop.data.versions import (
    SPLITS,
    DatasetVersion,
    Shard,
    dataset_digest,
    encode_table,
    newest_version,
    open_version,
    shard_table,
    version_folder,
    write_manifest,
)
from rayloop.errors import DataRefused, RequestError
from rayloop.logs import stage_logger
from rayloop.storage import Storage

log = stage_logger("data")

QUARANTINE_LIMIT = 10_000
"""Refused rows that are listed one by one; the counts go on."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dataset version, and whether this run wrote it or found it."""

    dataset: DatasetVersion
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Names:
    """What the first pass tells of every good row, shape (N,) each, and of the refused ones."""

    digests: npt.NDArray[np.void]
    labels: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int8]
    refused: list[dict[str, str]]
    refused_counts: dict[str, int]


def prepare(config: DataConfig, storage: Storage, clock: Clock = SYSTEM_CLOCK) -> Prepared:
    """Make the configured source a dataset version; the same content gives the same version.

    Args:
        config: The data section.
        storage: Where versions are kept.
        clock: Gives the creation time.

    Raises:
        DataMissing: The source is not there.
        DataRefused: More rows than `max_bad_share` break the contract.
        RequestError: A split is empty or there is only one class.
    """
    name = config.dataset_name
    source = open_source(config)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    checked = source.rows.map_batches(
        cast(Any, _check_batch),
        batch_format="pyarrow",
        batch_size=None,
        fn_kwargs={"source": replace(source, rows=None), "config": config},  # type: ignore[arg-type]
    ).materialize()
    names = _collect_names(checked)
    _refuse_bad_rows(names, config, storage)
    kept, notes = _drop_leaks(names)
    contract = source.contract
    _refuse_useless(kept, contract, config)
    digest = dataset_digest(
        kept.digests, kept.labels, kept.splits, contract.class_names, contract.shape
    )
    version = digest[:12]
    if storage.exists(f"{version_folder(name, version)}/manifest.json"):
        log.info("dataset %s:%s is there already; nothing was written", name, version)
        return Prepared(open_version(storage, name, version), is_new=False)
    written = _write_shards(checked, kept, contract, config, storage, version)
    dataset = _describe(config, contract, kept, written, digest)
    dataset = replace(
        dataset,
        parent=newest_version(storage, name),
        created_at=iso_utc(clock.now()),
        refused=names.refused_counts,
        notes=notes,
    )
    _write_quarantine(storage, f"{dataset.folder}/quarantine.jsonl", names.refused)
    write_manifest(storage, dataset)
    return Prepared(dataset, is_new=True)


def _check_batch(batch: pa.Table, source: RawSource, config: DataConfig) -> pa.Table:
    """Raw rows -> pixels, label, digest and split, or a reason."""
    encoded = "content" in batch.column_names
    raw = batch["content" if encoded else "pixels"].to_pylist()
    columns: dict[str, list[Any]] = {
        name: [] for name in ("pixels", "label", "digest", "split", "reason", "origin")
    }
    for content, label, origin, given in zip(
        raw,
        batch["label"].to_pylist(),
        batch["origin"].to_pylist(),
        batch["given"].to_pylist(),
        strict=True,
    ):
        row = _check_row(content, label, given, source, config)
        for name, value in zip(columns, (*row, origin), strict=True):
            columns[name].append(value)
    types = {
        "pixels": pa.large_binary(),
        "label": pa.int64(),
        "digest": pa.binary(32),
        "split": pa.int8(),
        "reason": pa.string(),
        "origin": pa.string(),
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})


def _check_row(
    content: bytes, label: Any, given: str, source: RawSource, config: DataConfig
) -> tuple[bytes, int, bytes, int, str]:
    try:
        pixels = _pixels_of(content, source)
        index = source.contract.label_index(label)
        if index is None:
            raise RowRefused(f"unknown label: {label!r}")
    except RowRefused as reason:
        return b"", -1, bytes(32), -1, str(reason)
    digest = row_digest(pixels)
    split = choose_split(digest, given, config.val_share, config.test_share)
    return pixels.tobytes(), index, digest, SPLITS.index(split), ""


def _pixels_of(content: bytes, source: RawSource) -> Pixels:
    if source.raw_shape:
        raw = np.frombuffer(content, np.uint8).reshape(source.raw_shape)
        return check_pixels(raw, source.contract)
    image = read_content(content)
    if not isinstance(image, np.ndarray):
        image = as_pixels(image, source.contract)
    return check_pixels(image, source.contract)


def _collect_names(checked: ray.data.Dataset) -> _Names:
    columns = ["label", "digest", "split", "reason", "origin"]
    digests, labels, splits = [], [], []
    refused: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    named = checked.select_columns(columns)
    batches = cast(Iterable[pa.Table], named.iter_batches(batch_size=None, batch_format="pyarrow"))
    for batch in batches:
        good = np.array(batch["reason"].to_pylist()) == ""
        for row in batch.filter(pa.array(~good)).to_pylist():
            counts[row["reason"].split(":")[0]] += 1
            if len(refused) < QUARANTINE_LIMIT:
                refused.append({"origin": row["origin"], "reason": row["reason"]})
        rows = batch.filter(pa.array(good))
        digests.append(np.array(rows["digest"].to_pylist(), dtype="V32"))
        labels.append(rows["label"].to_numpy())
        splits.append(rows["split"].to_numpy())
    return _Names(
        np.concatenate(digests).astype("V32"),
        np.concatenate(labels),
        np.concatenate(splits),
        refused,
        dict(counts),
    )


def _refuse_bad_rows(names: _Names, config: DataConfig, storage: Storage) -> None:
    num_bad = sum(names.refused_counts.values())
    share = num_bad / max(1, num_bad + len(names.labels))
    if num_bad:
        log.warning("%d rows break the row contract: %s", num_bad, names.refused_counts)
    if share <= config.max_bad_share:
        return
    path = f"datasets/{config.dataset_name}/quarantine.jsonl"
    _write_quarantine(storage, path, names.refused)
    first = names.refused[0]
    raise DataRefused(
        f"{num_bad} of {num_bad + len(names.labels)} rows ({share:.1%}) break the row contract, "
        f"more than data.max_bad_share={config.max_bad_share:g}: {names.refused_counts}. "
        f"The first is {first['origin']} ({first['reason']}); all are listed in "
        f"{storage.path(path)}. Mend them, or raise --data.max_bad_share."
    )


def _drop_leaks(names: _Names) -> tuple[_Names, dict[str, int]]:
    """Leave out training and validation rows whose image also stands in the test split.

    A hash of the content cannot put equal images into two splits; a source that names its own
    test split can.
    """
    test = SPLITS.index("test")
    in_test = set(names.digests[names.splits == test].tolist())
    leaks = np.array(
        [
            split != test and digest in in_test
            for split, digest in zip(names.splits, names.digests.tolist(), strict=True)
        ],
        dtype=bool,
    )
    kept = replace(
        names,
        digests=names.digests[~leaks],
        labels=names.labels[~leaks],
        splits=names.splits[~leaks],
    )
    duplicates = len(kept.digests) - len(set(kept.digests.tolist()))
    notes = {
        "left_out_as_copies_of_test_rows": int(leaks.sum()),
        "copies_within_a_split": duplicates,
    }
    return kept, notes


def _refuse_useless(names: _Names, contract: RowContract, config: DataConfig) -> None:
    for index, split in enumerate(SPLITS):
        if not (names.splits == index).any():
            raise RequestError(
                f"The {split} split of {config.dataset_name} would be empty: {len(names.labels)} "
                f"good rows with data.val_share={config.val_share:g} and "
                f"data.test_share={config.test_share:g}. Add rows, or change the shares."
            )
    present = np.unique(names.labels[names.splits == SPLITS.index("train")])
    if len(present) < 2:
        only = contract.class_names[int(present[0])]
        raise RequestError(
            f"The training split of {config.dataset_name} has one class only ({only!r}); a "
            "classifier needs at least two. Add rows of another class."
        )


def _write_quarantine(storage: Storage, path: str, refused: list[dict[str, str]]) -> None:
    if refused:
        lines = "".join(json.dumps(row) + "\n" for row in refused)
        storage.write(path, lines.encode())


def _write_shards(
    checked: ray.data.Dataset,
    kept: _Names,
    contract: RowContract,
    config: DataConfig,
    storage: Storage,
    version: str,
) -> list[dict[str, Any]]:
    """Send every kept row to its shard's task; a shard is a split and a range of digests."""
    bounds: list[npt.NDArray[np.uint64]] = []
    for index in range(len(SPLITS)):
        keys = np.sort(digest_keys(kept.digests[kept.splits == index]))
        num_shards = -(-len(keys) // config.rows_per_shard)
        bounds.append(keys[[i * len(keys) // num_shards for i in range(1, num_shards)]])
    in_test = set(kept.digests[kept.splits == SPLITS.index("test")].tolist())

    def assign(batch: pa.Table) -> pa.Table:
        digests = batch["digest"].to_pylist()
        splits = batch["split"].to_pylist()
        keys = digest_keys(np.array(digests, dtype="V32"))
        shards = [
            ""
            if split < 0 or (SPLITS[split] != "test" and digest in in_test)
            else f"{SPLITS[split]}/{int(np.searchsorted(bounds[split], key, 'right')):05d}"
            for split, digest, key in zip(splits, digests, keys, strict=True)
        ]
        table = batch.select(["pixels", "label", "digest"]).append_column("shard", pa.array(shards))
        return table.filter(pa.array([bool(shard) for shard in shards]))

    def write(group: pa.Table) -> pa.Table:
        entry = write_shard(group, contract, storage, version_folder(config.dataset_name, version))
        return pa.table({"entry": [json.dumps(entry)]})

    num_groups = sum(len(inner) + 1 for inner in bounds)
    written = (
        checked.map_batches(assign, batch_format="pyarrow", batch_size=None)
        .groupby("shard", num_partitions=min(num_groups, 64))
        .map_groups(write, batch_format="pyarrow")
    )
    entries = [json.loads(row["entry"]) for row in written.take_all()]
    return sorted(entries, key=lambda entry: str(entry["shard"]["path"]))


def digest_keys(digests: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each digest as a number, in the digests' own order."""
    heads = np.frombuffer(digests.tobytes(), dtype=">u8").reshape(-1, 4)[:, 0]
    return heads.astype(np.uint64)


def write_shard(
    group: pa.Table, contract: RowContract, storage: Storage, folder: str
) -> dict[str, Any]:
    """Write one shard sorted by digest, and tell what the manifest needs to know of it."""
    group = group.sort_by([("digest", "ascending"), ("label", "ascending")])
    split, part = group["shard"][0].as_py().split("/")
    images = np.frombuffer(b"".join(group["pixels"].to_pylist()), np.uint8)
    images = images.reshape(-1, *contract.shape)
    labels = group["label"].to_numpy()
    digests = np.array(group["digest"].to_pylist(), dtype="V32")
    content = encode_table(shard_table(images, labels, digests))
    path = f"{folder}/{split}/part-{part}.arrow"
    storage.write(path, content)
    scaled = images.astype(np.float64) / 255
    return {
        "shard": {
            "path": path,
            "split": split,
            "rows": len(labels),
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "class_counts": np.bincount(labels, minlength=len(contract.class_names)).tolist(),
        "histogram": histogram(images),
        "pixel_sum": scaled.sum(axis=(0, 1, 2)).tolist(),
        "pixel_square_sum": (scaled**2).sum(axis=(0, 1, 2)).tolist(),
    }


def _describe(
    config: DataConfig,
    contract: RowContract,
    kept: _Names,
    written: list[dict[str, Any]],
    digest: str,
) -> DatasetVersion:
    by_split = {
        split: [entry for entry in written if entry["shard"]["split"] == split] for split in SPLITS
    }
    rows = {split: sum(e["shard"]["rows"] for e in entries) for split, entries in by_split.items()}
    assert sum(rows.values()) == len(kept.labels), (rows, len(kept.labels))
    counts = {
        split: np.sum([entry["class_counts"] for entry in entries], axis=0).tolist()
        for split, entries in by_split.items()
    }
    num_pixels = rows["train"] * contract.shape[0] * contract.shape[1]
    train = by_split["train"]
    mean = np.sum([entry["pixel_sum"] for entry in train], axis=0) / num_pixels
    square = np.sum([entry["pixel_square_sum"] for entry in train], axis=0) / num_pixels
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    return DatasetVersion(
        name=config.dataset_name,
        version=digest[:12],
        digest=digest,
        parent="",
        created_at="",
        class_names=contract.class_names,
        shape=contract.shape,
        splits=rows,
        class_counts={
            split: dict(zip(contract.class_names, counts[split], strict=True)) for split in SPLITS
        },
        profile=merge([entry["histogram"] for entry in train]),
        pixel_mean=tuple(round(float(value), 6) for value in mean),
        pixel_std=tuple(round(float(value), 6) for value in std),
        shards=tuple(Shard(**entry["shard"]) for entry in written),
    )
