"""`rayloop events`: what is remembered of predictions, shown, deleted, pruned."""

import argparse
from datetime import UTC, datetime, timedelta
from typing import Any

from rayloop.clock import SYSTEM_CLOCK
from rayloop.errors import DataMissing, RequestError
from rayloop.serve.events.labels import LabelStore
from rayloop.serve.events.store import EventStore
from rayloop.storage import Storage, home

Rows = list[dict[str, Any]]


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    events = commands.add_parser("events", help="what is remembered of predictions")
    verbs = events.add_subparsers(dest="verb", required=True, metavar="show|delete|prune")
    show = verbs.add_parser("show", help="which model answered this request, and how")
    show.add_argument("prediction_id")
    delete = verbs.add_parser("delete", help="remove events and their labels for good")
    delete.add_argument("--id", action="append", default=[], metavar="PREDICTION_ID")
    delete.add_argument("--unit", action="append", default=[], help="everything of a user")
    prune = verbs.add_parser("prune", help="remove whole days")
    prune.add_argument("--keep-days", type=int, required=True, metavar="N")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS)


def run_events(chosen: argparse.Namespace, _: list[str]) -> Rows:
    """`rayloop events`."""
    storage = Storage(home())
    store = EventStore(storage)
    if chosen.verb == "show":
        return _show(storage, store, chosen.prediction_id)
    if chosen.verb == "delete":
        if not chosen.id and not chosen.unit:
            raise RequestError("Say what to delete: --id PREDICTION_ID or --unit UNIT.")
        return [{"deleted_rows": store.delete(prediction_ids=chosen.id, units=chosen.unit)}]
    if chosen.keep_days < 1:
        raise RequestError(f"--keep-days {chosen.keep_days} must be at least 1.")
    today = datetime.fromtimestamp(SYSTEM_CLOCK.now(), UTC).date()
    return [{"removed_days": store.prune(today - timedelta(days=chosen.keep_days))}]


def _show(storage: Storage, store: EventStore, prediction_id: str) -> Rows:
    rows = store.find(prediction_id)
    if not rows:
        raise DataMissing(
            f"There is no event of prediction {prediction_id[:60]!r} under "
            f"{storage.path('events')}; it was deleted, is older than events are kept, or is not "
            "in a file yet (events.flush_s)."
        )
    days = [row["time"].date() for row in rows]
    labels = {
        (label["prediction_id"], label["row"]): label["label"]
        for label in LabelStore(storage, SYSTEM_CLOCK).read(min(days), max(days)).to_pylist()
    }
    shown = ("prediction_id", "row", "time", "plan", "variant", "version", "unit", "status",
             "class_index", "confidence", "decision", "latency_ms")  # fmt: skip
    return [
        {name: _plain(row[name]) for name in shown}
        | {"truth": labels.get((row["prediction_id"], row["row"]))}
        for row in rows
    ]


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
