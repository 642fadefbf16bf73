"""Chunks of pixels and an engine -> one whole Parquet file of answers, and what to count of it."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayloop.errors import Corrupt
from rayloop.serve.engine import Engine, Probabilities
from rayloop.serve.offline.pieces import Chunk
from rayloop.storage import Storage

COUNTS_KEY = b"rayloop"
"""Where a file's counts stand in its footer, so that a job that continues need not read rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What is counted of the rows of one file, or of several.

    Attributes:
        rows: All rows.
        errors: Rows without an answer.
        judged: Rows with an answer and a true label.
        correct: Those whose answer is the true label.
        first_error: The first row without an answer and why, or empty.
    """

    rows: int = 0
    errors: int = 0
    judged: int = 0
    correct: int = 0
    first_error: str = ""

    @property
    def accuracy(self) -> float | None:
        """Share (0..1) of the judged rows that are correct; None without any."""
        return self.correct / self.judged if self.judged else None

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            rows=self.rows + other.rows,
            errors=self.errors + other.errors,
            judged=self.judged + other.judged,
            correct=self.correct + other.correct,
            first_error=self.first_error or other.first_error,
        )


def answer_chunks(engine: Engine, chunks: Iterable[Chunk], class_names: Sequence[str]) -> pa.Table:
    """Put every row through the engine.

    Args:
        engine: Loaded and proven.
        chunks: At least one.
        class_names: The model's labels.

    Returns:
        `row_id`, `class_index` int32, `label`, `confidence` float32, `probabilities`
        list<float32>, `true_label` where the input has labels, and `error`. A row that could not
        be read has nulls and its error.
    """
    ids, truth = [], []
    errors: list[str] = []
    answers: list[Probabilities] = []
    for chunk in chunks:
        ids.append(chunk.row_ids)
        truth.append(chunk.truth)
        errors.extend(chunk.errors or [""] * len(chunk.row_ids))
        if len(chunk.images):
            answers.append(engine.predict(chunk.images))
    found = _columns(answers, class_names)
    good = np.array(errors) == ""
    if not good.all():
        places = pa.array(np.cumsum(good) - 1, mask=~good)
        found = {name: column.take(places) for name, column in found.items()}
    columns = {"row_id": pa.chunked_array(ids).combine_chunks(), **found}
    if truth[0] is not None:
        columns["true_label"] = pa.chunked_array(truth).combine_chunks()
    columns["error"] = pa.array(errors, pa.string(), mask=good)
    return pa.table(columns)


def _columns(answers: list[Probabilities], class_names: Sequence[str]) -> dict[str, pa.Array]:
    """The answers as columns, as `POST /predict` reads them out of the probabilities."""
    num_classes = len(class_names)
    values = np.concatenate(answers) if answers else np.empty((0, num_classes), np.float32)
    index = values.argmax(axis=1).astype(np.int32)
    ends = np.arange(len(values) + 1, dtype=np.int32) * num_classes
    return {
        "class_index": pa.array(index),
        "label": pa.array(class_names, pa.string()).take(pa.array(index)),
        "confidence": pa.array(values[np.arange(len(values)), index]),
        "probabilities": pa.ListArray.from_arrays(pa.array(ends), pa.array(values.ravel())),
    }


def count(table: pa.Table) -> Counts:
    """The counts of a table of answers."""
    errors = table["error"]
    num_errors = len(errors) - errors.null_count
    judged = correct = 0
    if "true_label" in table.column_names:
        matches = pc.equal(table["label"], table["true_label"])
        judged, correct = len(matches) - matches.null_count, pc.sum(matches).as_py() or 0
    first_error = ""
    if num_errors:
        row = pc.index(pc.is_valid(errors), True).as_py()
        first_error = f"{table['row_id'][row].as_py()}: {errors[row].as_py()}"
    return Counts(
        rows=len(table), errors=num_errors, judged=judged, correct=correct, first_error=first_error
    )


def write_answers(storage: Storage, path: str, table: pa.Table) -> Counts:
    """Put a table of answers in place in one step; equal tables give equal bytes.

    Raises:
        StorageFull: The local disk has no room.
    """
    counts = count(table)
    footer = {COUNTS_KEY: json.dumps(asdict(counts), sort_keys=True).encode()}
    content = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(footer),
        content,
        compression="zstd",
        use_dictionary=[name for name in ("label", "true_label") if name in table.column_names],
    )
    storage.write(path, content.getvalue())
    return counts


def read_counts(storage: Storage, path: str) -> Counts:
    """The counts of a file that is in place, out of its footer.

    Raises:
        Corrupt: It is not a file of this kind.
    """
    local = storage.local_path(path)
    source = local if local is not None else pa.BufferReader(storage.read(path))
    try:
        footer = pq.read_metadata(source).metadata
        return Counts(**json.loads(footer[COUNTS_KEY]))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            f"{storage.path(path)} is not a whole result file ({error}); it was damaged outside "
            "rayloop. Remove it and run the same command again."
        ) from None
