"""Turn what is in an event file into its name, and names back into what may be in the files.

    events/date=YYYY-MM-DD/HHMMSS-WRITER-FIRST-LAST.parquet

HHMMSS is the UTC time of the file's earliest event. WRITER is the first half of all its prediction
ids, FIRST and LAST are the smallest and largest second half. So an id is found by names alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime

from rayloop.storage import Storage

EVENTS, SHADOWS, LABELS = "events", "shadows", "labels"
DATED = (EVENTS, SHADOWS, LABELS)
"""The folders that are divided by date, and what is in them is known by prediction id."""

DAY_S = 86_400
DAY = re.compile(r"date=(\d{4}-\d{2}-\d{2})")
NAME = re.compile(r"\d{6}-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class EventFile:
    """One file of events, as far as its name tells."""

    path: str
    """Relative to the storage root."""

    writer: str
    first: str
    last: str

    def may_hold(self, prediction_id: str) -> bool:
        """Whether the rows of a prediction can be in it."""
        writer, number = prediction_id[:16], prediction_id[16:]
        return self.writer == writer and self.first <= number <= self.last


def day_of(seconds: float) -> date:
    """The UTC date of a time in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).date()


def day_folder(root: str, day: date) -> str:
    """The folder of one date under `events`, `shadows` or `labels`."""
    return f"{root}/date={day.isoformat()}"


def event_path(seconds: float, writer: str, first: str, last: str) -> str:
    """Where events go.

    Args:
        seconds: Time of the earliest, seconds since the epoch.
        writer: First half of their ids.
        first: Smallest second half.
        last: Largest second half.
    """
    name = f"{datetime.fromtimestamp(seconds, UTC):%H%M%S}-{writer}-{first}-{last}.parquet"
    return f"{day_folder(EVENTS, day_of(seconds))}/{name}"


def days(storage: Storage, root: str) -> list[date]:
    """The dates that have a folder, earliest first; other names are passed over."""
    found = (_day(name) for name in storage.names(root))
    return [day for day in found if day is not None]


def _day(name: str) -> date | None:
    match = DAY.fullmatch(name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:  # no date of the calendar
        return None


def event_files(storage: Storage, first_date: date, last_date: date) -> Iterator[EventFile]:
    """The files of some dates, both ends included, earliest first; other names are passed over."""
    for day in days(storage, EVENTS):
        if first_date <= day <= last_date:
            yield from files_of_day(storage, day)


def files_of_day(storage: Storage, day: date) -> Iterator[EventFile]:
    """The files of one date, earliest first."""
    folder = day_folder(EVENTS, day)
    for name in storage.names(folder):
        match = NAME.fullmatch(name)
        if match is not None:
            yield EventFile(path=f"{folder}/{name}", writer=match[1], first=match[2], last=match[3])


def prune(storage: Storage, before_date: date) -> int:
    """Remove the events, shadow rows and labels of all dates before one.

    Several replicas may do this at the same time.

    Returns:
        How many date folders were removed.
    """
    old = [(root, day) for root in DATED for day in days(storage, root) if day < before_date]
    removed = 0
    for root, day in old:
        try:
            storage.remove(day_folder(root, day))
            removed += 1
        except FileNotFoundError:  # another replica was faster
            continue
    return removed
