"""Turn the event files of all replicas into rows: by prediction id, by dates; and remove rows."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayloop.errors import Corrupt, DataMissing, RequestError
from rayloop.serve.events import files as event_files
from rayloop.serve.events.files import EVENTS, SHADOWS, EventFile
from rayloop.serve.events.labels import delete_labels
from rayloop.serve.events.table import SCHEMA, to_parquet
from rayloop.storage import Storage

EVER = (date.min, date.max)
_GONE = (FileNotFoundError, DataMissing)
"""What is raised when a file has vanished since its folder was listed."""


class EventStore:
    """The events under one root, as far as they are in files.

    Replicas may write, and another store may prune, while this one reads: a file that vanishes is
    as if it had never been there, and one that is replaced is read in its old or its new form.

    Args:
        storage: Holds `events/`, `labels/` and `shadows/`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def find(self, prediction_id: str) -> list[dict[str, Any]]:
        """The rows of one prediction in order; empty when there are none.

        Only files whose names say that they may hold it are opened, the newest date first.
        """
        for day in reversed(event_files.days(self._storage, EVENTS)):
            for file in event_files.files_of_day(self._storage, day):
                if file.may_hold(prediction_id):
                    rows = self._rows_of(file, prediction_id)
                    if rows:
                        return rows
        return []

    def _rows_of(self, file: EventFile, prediction_id: str) -> list[dict[str, Any]]:
        """The rows of a prediction in one file; only the row groups that have any are decoded."""
        found: list[dict[str, Any]] = []
        with suppress(*_GONE), self._opened(file.path) as parquet:
            for group in range(parquet.num_row_groups):
                ids = parquet.read_row_group(group, ["prediction_id"], use_threads=False)
                match = pc.equal(ids["prediction_id"], prediction_id)
                if pc.any(match).as_py():
                    rows = parquet.read_row_group(group, use_threads=False).filter(match)
                    found += rows.to_pylist()
        return sorted(found, key=lambda row: int(row["row"]))

    def read(
        self, first_date: date, last_date: date, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """All rows of some UTC dates, both ends included; no rows when there are none.

        Args:
            first_date: The earliest.
            last_date: The latest.
            columns: Which of `event_table.SCHEMA`, in the order wanted; None means all.

        Raises:
            RequestError: There is no such column.
            Corrupt: A file is damaged.
        """
        names = list(SCHEMA.names) if columns is None else list(dict.fromkeys(columns))
        unknown = sorted(set(names) - set(SCHEMA.names))
        if unknown:
            raise RequestError(
                f"Events have no column {', '.join(unknown)}; there are {', '.join(SCHEMA.names)}."
            )
        tables = [pa.schema([SCHEMA.field(name) for name in names]).empty_table()]
        for file in event_files.event_files(self._storage, first_date, last_date):
            table = self._load(file.path, names)
            if table is not None:
                tables.append(table)
        return pa.concat_tables(tables, promote_options="default")

    def delete(self, *, prediction_ids: Collection[str] = (), units: Collection[str] = ()) -> int:
        """Remove the rows of predictions, and of all predictions for some units, for good.

        Their labels and shadow rows go too. Each file is replaced in one step, events last: when
        this is stopped half-way, the same call finishes it. Rows that a replica has not written
        yet are not seen; flush it first, or delete again. One deletion at a time.

        Args:
            prediction_ids: Names of requests.
            units: Whom the requests were for.

        Returns:
            How many rows of events were removed.

        Raises:
            RequestError: A unit is empty: requests for nobody in particular have no owner.
        """
        if "" in units:
            raise RequestError(
                "An empty unit names nobody, so its events cannot be deleted by unit; give "
                "prediction ids, or let `events.retention_days` remove them."
            )
        ids = {*prediction_ids, *self._ids_of(units)}
        if not ids:
            return 0
        delete_labels(self._storage, ids)
        wanted = pa.array(sorted(ids), pa.string())
        for path in self._shadow_paths():
            self._rewrite(path, wanted)
        files = event_files.event_files(self._storage, *EVER)
        return sum(self._rewrite(path, wanted) for path in _may_hold_any(files, ids))

    def prune(self, before_date: date) -> int:
        """Remove the events, shadow rows and labels of all dates before one.

        Returns:
            How many date folders were removed.
        """
        return event_files.prune(self._storage, before_date)

    def _ids_of(self, units: Collection[str]) -> set[str]:
        """All predictions for some units."""
        if not units:
            return set()
        wanted, found = pa.array(sorted(units), pa.string()), set[str]()
        for file in event_files.event_files(self._storage, *EVER):
            table = self._load(file.path, ["prediction_id", "unit"])
            if table is not None:
                match = pc.is_in(table["unit"], value_set=wanted)
                found.update(table["prediction_id"].filter(match).to_pylist())
        return found

    def _shadow_paths(self) -> Iterator[str]:
        for day in event_files.days(self._storage, SHADOWS):
            folder = event_files.day_folder(SHADOWS, day)
            for name in self._storage.names(folder):
                if name.endswith(".parquet"):
                    yield f"{folder}/{name}"

    def _rewrite(self, path: str, wanted: pa.Array) -> int:
        """Replace a file by one without the rows of some predictions, or remove it when all go.

        Returns:
            How many rows went.
        """
        table = self._load(path, None)
        if table is None or "prediction_id" not in table.column_names:
            return 0
        kept = table.filter(pc.invert(pc.is_in(table["prediction_id"], value_set=wanted)))
        gone = int(table.num_rows - kept.num_rows)
        if gone and kept.num_rows:
            self._storage.write(path, to_parquet(kept).to_pybytes())
        elif gone:
            self._storage.remove(path)
        return gone

    def _load(self, path: str, names: list[str] | None) -> pa.Table | None:
        """A file's rows, those of the columns that it has; None when it has vanished."""
        try:
            with self._opened(path) as parquet:
                return parquet.read(columns=names)
        except _GONE:
            return None

    @contextmanager
    def _opened(self, path: str) -> Iterator[pq.ParquetFile]:
        """A file for reading; what pyarrow says of damaged bytes is put into a sentence."""
        local = self._storage.local_path(path)
        try:
            with pq.ParquetFile(local or pa.BufferReader(self._storage.read(path))) as parquet:
                yield parquet
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file is gone or the disk failed
            raise Corrupt(
                f"{self._storage.path(path)} is not a whole Parquet file ({error}); it was damaged "
                "outside rayloop, which writes files in one step. Remove it; its rows are lost."
            ) from error


def _may_hold_any(files: Iterable[EventFile], ids: Collection[str]) -> Iterator[str]:
    """The paths of the files whose names say that they may hold one of many predictions."""
    numbers: dict[str, list[str]] = {}
    for prediction_id in sorted(ids):
        numbers.setdefault(prediction_id[:16], []).append(prediction_id[16:])
    for file in files:
        wanted = numbers.get(file.writer, [])
        at = bisect_left(wanted, file.first)
        if at < len(wanted) and wanted[at] <= file.last:
            yield file.path
