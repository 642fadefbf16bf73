"""Turn truth that arrives after a prediction into small files, and join it onto events.

    labels/date=YYYY-MM-DD/PREDICTIONID-ROW.json

The date is that of the prediction, so that events and their labels are read and pruned together. A
label is made once and never changed: a second one that says the same is fine, another is refused.
"""

import json
from collections.abc import Collection, Iterator
from datetime import UTC, date, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rayloop.clock import Clock
from rayloop.errors import DataMissing, RequestError
from rayloop.serve.events.files import LABELS, day_folder, days
from rayloop.storage import Storage

KEY = ("prediction_id", "row")
SCHEMA = pa.schema(
    [
        pa.field("prediction_id", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("class_index", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""Which row of which prediction; its true class by index and name; who said so, and when."""

TRUTH = {
    "class_index": "true_index",
    "label": "true_label",
    "source": "label_source",
    "time": "labelled_at",
}
"""Columns of a label, and their names beside an event."""


class ConflictingLabel(RequestError):
    """A row has a label already, and it is another one."""


class LabelStore:
    """The labels under one root.

    Args:
        storage: Holds `labels/`.
        clock: For the time at which a label arrived.
    """

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock

    def add(
        self,
        *,
        day: date,
        prediction_id: str,
        row: int,
        class_index: int,
        label: str,
        source: str = "",
    ) -> Literal["new", "same"]:
        """Keep the truth about one row, also while other processes try the same.

        On an object store without conditional puts (see `Storage.create`) two different labels at
        the same moment may both be taken; then the last one stays.

        Args:
            day: UTC date of the prediction.
            prediction_id: Its name.
            row: Place of the image in the request, from 0.
            class_index: The true class.
            label: Its name.
            source: Who says so; empty when that was not told.

        Returns:
            `same` when the row has this class already, whoever said so; nothing is written then.

        Raises:
            ConflictingLabel: The row has another class already and keeps it.
            StorageFull: The disk has no room.
        """
        path = f"{day_folder(LABELS, day)}/{prediction_id}-{row}.json"
        record = {
            "prediction_id": prediction_id,
            "row": row,
            "class_index": class_index,
            "label": label,
            "source": source,
            "time": self._clock.now(),
        }
        content = json.dumps(record, sort_keys=True).encode()
        while not self._storage.create(path, content):
            there = self._load(path)
            if there is None:  # deleted since
                continue
            if there["class_index"] == class_index:
                return "same"
            raise ConflictingLabel(
                f"Row {row} of prediction {prediction_id} is labelled {there['label']!r} already "
                f"and can't become {label!r}: a label is final. Delete it first if it is wrong."
            )
        return "new"

    def read(self, first_date: date, last_date: date) -> pa.Table:
        """The labels of the predictions of some UTC dates, both ends included, as in `SCHEMA`.

        Raises:
            Corrupt: A file is damaged.
        """
        paths = (
            path
            for day in days(self._storage, LABELS)
            if first_date <= day <= last_date
            for path in _paths(self._storage, day)
        )
        found = [record for record in map(self._load, paths) if record is not None]
        for record in found:
            record["time"] = datetime.fromtimestamp(record["time"], UTC)
        return pa.Table.from_pylist(found, schema=SCHEMA)

    def delete(self, prediction_ids: Collection[str]) -> int:
        """Remove the labels of some predictions.

        Returns:
            How many were removed.
        """
        return delete_labels(self._storage, prediction_ids)

    def _load(self, path: str) -> dict[str, Any] | None:
        """A label; None when it has vanished."""
        try:
            return self._storage.read_json(path)
        except DataMissing:
            return None


def _paths(storage: Storage, day: date) -> Iterator[str]:
    """The label files of one date."""
    folder = day_folder(LABELS, day)
    return (f"{folder}/{name}" for name in storage.names(folder) if name.endswith(".json"))


def delete_labels(storage: Storage, prediction_ids: Collection[str]) -> int:
    """Remove the labels of some predictions, whatever their date.

    Returns:
        How many were removed.
    """
    wanted, removed = set(prediction_ids), 0
    for day in days(storage, LABELS):
        for path in _paths(storage, day):
            if path.rpartition("/")[2].rpartition("-")[0] in wanted:
                storage.remove(path)
                removed += 1
    return removed


def labelled(events: pa.Table, labels: pa.Table) -> pa.Table:
    """Events with the truth beside them: all of them in their order, nulls where it is not known.

    Args:
        events: With `prediction_id`, `row` and any other columns.
        labels: As `LabelStore.read` gives them.

    Returns:
        The events with `true_index`, `true_label`, `label_source` and `labelled_at`.
    """
    place = pc.index_in(_keys(events), value_set=_keys(labels).combine_chunks())
    truth = labels.select(list(TRUTH)).take(place)
    for name, shown in TRUTH.items():
        events = events.append_column(shown, truth[name])
    return events


def _keys(table: pa.Table) -> pa.ChunkedArray:
    """The name of each row among all rows of all predictions."""
    rows = pc.cast(table["row"], pa.string())
    return pc.binary_join_element_wise(table["prediction_id"], rows, "-")
