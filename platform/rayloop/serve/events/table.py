"""Turn a list of prediction events into an Arrow table with one row an image, a column at a time.

The thread that does this shares the interpreter with the event loop, so the work is in few calls
over many rows: about two microseconds an event instead of dozens.
"""

import contextlib
import math
from collections.abc import Callable, Sequence, Sized
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayloop.config import EventsConfig
from rayloop.serve.events.event import PredictionEvent

Images = NDArray[np.uint8]
Embed = Callable[[str, Images], NDArray[np.float32] | None]
"""Embeddings float32 [N, D] by a version of images uint8 [N, H, W, C]; None where it cannot."""

FLOATS, INTS = pa.list_(pa.float32()), pa.list_(pa.int32())
COLUMNS: tuple[tuple[str, pa.DataType, bool, str], ...] = (
    ("prediction_id", pa.string(), False, "name of the request, 32 hexadecimal digits"),
    ("row", pa.int32(), False, "place of the image in its request, from 0"),
    ("time", pa.timestamp("us", tz="UTC"), False, "when the request was answered"),
    ("model", pa.string(), False, "name of the model"),
    ("plan", pa.int64(), False, "number of the traffic plan that assigned the variant"),
    ("unit", pa.string(), False, "who the request was for; empty when nobody was named"),
    ("variant", pa.string(), False, "variant assigned before inference"),
    ("assigned_version", pa.string(), False, "version of that variant"),
    ("version", pa.string(), False, "version that answered this row"),
    ("forced", pa.bool_(), False, "the client chose the variant or version; no statistics"),
    ("status", pa.int16(), False, "HTTP status of the answer"),
    ("class_index", pa.int32(), True, "most likely class; null when the request failed"),
    ("confidence", pa.float32(), True, "its probability, 0..1"),
    ("probabilities", FLOATS, True, "of all classes"),
    ("decision", pa.string(), True, "accept, fallback or review"),
    ("latency_ms", pa.float32(), False, "of the request; NaN where unknown"),
    ("queue_ms", pa.float32(), False, "part of it spent waiting; NaN where unknown"),
    ("engine_ms", pa.float32(), False, "part of it spent in the engine; NaN where unknown"),
    ("brightness", pa.float32(), False, "mean of the pixels, 0..1"),
    ("contrast", pa.float32(), False, "standard deviation of the grey pixels, 0..1"),
    ("embedding", FLOATS, True, "input of the version's last layer, for a share of the images"),
    ("image", pa.binary(), True, "the pixels, uint8 in C order, for a share of the images"),
    ("shape", INTS, True, "height, width and channels of `image`"),
)
"""Name, type, whether it may be null, and meaning of each column."""

SCHEMA = pa.schema([pa.field(name, kind, nullable) for name, kind, nullable, _ in COLUMNS])
REPEATED_NAMES = ("model", "plan", "variant", "assigned_version", "forced", "status")
REPEATED = attrgetter(*REPEATED_NAMES)

ROWS_PER_GROUP = 4096
"""Rows that are read together when one prediction is looked up."""

BLOCK_PIXELS = 1 << 20
"""Pixels whose statistics are computed at the same time; bounds the memory for colour images."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIXERS = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def event_table(events: Sequence[PredictionEvent], config: EventsConfig, embed: Embed) -> pa.Table:
    """The rows of some events.

    Args:
        events: At least one. Rows of events with equally shaped images stand together, otherwise
            in the order given.
        config: Says which share of the images keeps its pixels and its embedding.
        embed: Computes embeddings, for each row by the version that answered it.

    Raises:
        ValueError: An event contradicts itself, e.g. has more images than probabilities.
    """
    alike: dict[object, list[PredictionEvent]] = {}
    for event in events:
        answer = event.probabilities
        key = (event.images.shape[1:], None if answer is None else answer.shape[1])
        alike.setdefault(key, []).append(event)
    tables = [_table(group, config, embed) for group in alike.values()]
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables)


def to_parquet(table: pa.Table) -> pa.Buffer:
    """The bytes of a Parquet file with these rows, which pyarrow reads without rayloop.

    Strings repeat and are stored as a dictionary, except prediction ids.
    """
    texts = {field.name for field in table.schema if pa.types.is_string(field.type)}
    stream = pa.BufferOutputStream()
    pq.write_table(
        table,
        stream,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        use_dictionary=sorted(texts - {"prediction_id"}),
        write_statistics=[name for name in ("prediction_id", "time") if name in table.column_names],
    )
    return stream.getvalue()


def _table(events: list[PredictionEvent], config: EventsConfig, embed: Embed) -> pa.Table:
    """The rows of events whose images have one shape and whose probabilities are as many."""
    counts = np.array([len(event.images) for event in events])
    images = _joined([event.images for event in events], np.uint8)
    columns, row = _of_requests(events), np.zeros(len(events), np.int32)
    if (counts != 1).any():
        row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        owner = pa.array(np.repeat(np.arange(len(events)), counts))
        columns = {name: column.take(owner) for name, column in columns.items()}
    columns["row"] = pa.array(row)
    columns["version"] = _versions(events, counts, columns["assigned_version"])
    columns |= _of_answers(events, counts)
    brightness, contrast = image_statistics(images)
    columns |= {"brightness": pa.array(brightness), "contrast": pa.array(contrast)}
    columns |= _samples(images, columns, config, embed)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _of_requests(events: list[PredictionEvent]) -> dict[str, pa.Array]:
    """The columns that have one value a request."""
    micros = np.array([event.time for event in events]) * 1e6
    return {
        "prediction_id": _text([event.prediction_id for event in events]),
        "time": pa.array(np.rint(micros).astype(np.int64)).cast(SCHEMA.field("time").type),
        "unit": _text([event.unit for event in events]),
        "latency_ms": pa.array([event.latency_ms for event in events], pa.float32()),
        "queue_ms": pa.array([event.queue_ms for event in events], pa.float32()),
        "engine_ms": pa.array([event.engine_ms for event in events], pa.float32()),
        **_repeated(events),
    }


def _repeated(events: list[PredictionEvent]) -> dict[str, pa.Array]:
    """The columns in which thousands of requests have a handful of combinations of values."""
    kinds = list(map(REPEATED, events))
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    place = pa.array([places[kind] for kind in kinds], pa.int32())
    return {
        name: pa.array(values, SCHEMA.field(name).type).take(place)
        for name, values in zip(REPEATED_NAMES, zip(*places, strict=True), strict=True)
    }


def _text(values: list[str]) -> pa.Array:
    """Strings, with a question mark where a client's text holds half a surrogate pair."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([value.encode(errors="replace").decode() for value in values], pa.string())


def _versions(
    events: list[PredictionEvent], counts: NDArray[np.int64], assigned: pa.Array
) -> pa.Array:
    """The version that answered each row."""
    found = [event.versions for event in events]
    if not any(found):
        return assigned
    spread = [
        versions or (event.assigned_version,) * len(event.images)
        for versions, event in zip(found, events, strict=True)
    ]
    return _text(_a_row_each("versions", spread, counts))


def _of_answers(events: list[PredictionEvent], counts: NDArray[np.int64]) -> dict[str, pa.Array]:
    """What was predicted for each row; nulls when the requests failed."""
    rows = int(counts.sum())
    found = [event.probabilities for event in events if event.probabilities is not None]
    if not found:
        names = ("class_index", "confidence", "probabilities", "decision")
        return {name: pa.nulls(rows, SCHEMA.field(name).type) for name in names}
    _check_counts("probabilities", found, counts)
    probabilities = _joined(found, np.float32)
    best = probabilities.argmax(axis=1)
    decisions = _a_row_each("decisions", [event.decisions for event in events], counts)
    return {
        "class_index": pa.array(best.astype(np.int32)),
        "confidence": pa.array(probabilities[np.arange(rows), best]),
        "probabilities": _lists(probabilities),
        "decision": pa.array(decisions, pa.string()),
    }


def _a_row_each(what: str, values: list[tuple[Any, ...]], counts: NDArray[np.int64]) -> list[Any]:
    """The values of all requests in one list, checked to be as many as their images."""
    _check_counts(what, values, counts)
    return list(chain.from_iterable(values))


def _check_counts(what: str, values: Sequence[Sized], counts: NDArray[np.int64]) -> None:
    found = list(map(len, values))
    if found != counts.tolist():
        raise ValueError(f"Requests with {counts.tolist()} images have {found} {what}.")


def image_statistics(images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Brightness and contrast of each image, as the reference profile of a dataset has them.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        Mean and standard deviation of the grey pixels (mean over channels), float32 [N], scaled to
        0..1.
    """
    rows, pixels = len(images), images.shape[1] * images.shape[2]
    brightness, contrast = np.empty(rows, np.float32), np.empty(rows, np.float32)
    step = max(1, BLOCK_PIXELS // pixels)
    for at in range(0, rows, step):
        grey, top = _grey(images[at : at + step].reshape(-1, pixels, images.shape[3]))
        # Sums of whole numbers are exact, so a picture of one grey has a contrast of exactly 0.
        exact = np.uint32 if pixels * top**2 < 2**32 else np.uint64
        mean = grey.sum(axis=1, dtype=exact) / pixels
        mean_square = np.einsum("np,np->n", grey, grey, dtype=exact) / pixels
        brightness[at : at + step] = mean / top
        contrast[at : at + step] = np.sqrt(np.maximum(mean_square - mean**2, 0)) / top
    return brightness, contrast


def _grey(pixels: Images) -> tuple[NDArray[Any], int]:
    """Sums over the channels of pixels [N, P, C], and the largest value such a sum can have."""
    channels = pixels.shape[2]
    if channels == 1:
        return pixels[..., 0], 255
    total = pixels[..., 0].astype(np.uint16)
    for channel in range(1, channels):
        total += pixels[..., channel]
    return total, 255 * channels


def sample_points(prediction_ids: Sequence[str], rows: NDArray[np.int32]) -> NDArray[np.float64]:
    """A number from 0 to below 1 for each image, by a hash of its name alone.

    An image is in a sample of share s when its number is below s. So every replica and every later
    reader agrees, and the smaller of two samples lies within the larger.

    Args:
        prediction_ids: 32 hexadecimal digits each.
        rows: Place of each image in its request.
    """
    halves = np.frombuffer(bytes.fromhex("".join(prediction_ids)), ">u8").astype(np.uint64)
    replica, counter = halves.reshape(-1, 2).T
    request = _mixed(replica ^ _mixed(counter + GOLDEN))
    words = _mixed(request + rows.astype(np.uint64) * GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Words in which every bit depends on every bit (the finalizer of splitmix64)."""
    for shift, factor in MIXERS:
        words = (words ^ (words >> np.uint64(shift))) * factor
    return words ^ (words >> np.uint64(31))


def _samples(
    images: Images, columns: dict[str, pa.Array], config: EventsConfig, embed: Embed
) -> dict[str, pa.Array]:
    """Pixels and embeddings of the images that are in the samples."""
    rows, share = len(images), max(config.payload_share, config.embedding_share)
    found = {name: pa.nulls(rows, SCHEMA.field(name).type) for name in SCHEMA.names[-3:]}
    if share == 0:
        return found
    ids = columns["prediction_id"].to_pylist()
    points = sample_points(ids, columns["row"].to_numpy())
    kept, embedded = points < config.payload_share, points < config.embedding_share
    if kept.any():
        pixels = [
            image.tobytes() if keep else None for image, keep in zip(images, kept, strict=True)
        ]
        shapes = [images.shape[1:] if keep else None for keep in kept]
        found |= {"image": pa.array(pixels, pa.binary()), "shape": pa.array(shapes, INTS)}
    if embedded.any():
        versions = columns["version"].to_pylist()
        found["embedding"] = _embeddings(images, versions, np.flatnonzero(embedded), embed)
    return found


def _embeddings(
    images: Images, versions: list[str], chosen: NDArray[np.intp], embed: Embed
) -> pa.Array:
    """Embeddings of some images, each by the version that answered it."""
    vectors: list[NDArray[np.float32] | None] = [None] * len(images)
    for version in sorted({versions[place] for place in chosen}):
        places = [place for place in chosen if versions[place] == version]
        computed = embed(version, images[places])
        if computed is not None:
            for place, vector in zip(places, computed, strict=True):
                vectors[place] = vector
    return pa.array(vectors, FLOATS)


def _lists(values: NDArray[Any]) -> pa.Array:
    """A list for each row of a matrix."""
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(ends, values.ravel())


def _joined(arrays: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    """The arrays one after the other; all have the same shape but for their number of rows.

    Joining bytes takes a fifth of the time that `np.concatenate` takes for many small arrays.
    """
    if len(arrays) == 1:
        return arrays[0].astype(dtype, copy=False)
    rows, shape = sum(map(len, arrays)), arrays[0].shape[1:]
    parts: list[Any] = arrays
    with contextlib.suppress(TypeError, ValueError):  # of arrays that are not contiguous
        flat = np.frombuffer(b"".join(parts), dtype)
        if flat.size == rows * math.prod(shape):
            return flat.reshape(rows, *shape)
    return np.concatenate(arrays).astype(dtype, copy=False)
