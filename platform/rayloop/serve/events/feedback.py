"""Turn the body of `POST /feedback` into a label of a prediction that was made here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Literal, NoReturn

from rayloop.serve.events.labels import ConflictingLabel, LabelStore
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.infer import load_object
from rayloop.serve.protocol.request import malformed

KNOWN = ("prediction_id", "label", "row", "source")
PREDICTION_ID = re.compile(r"[0-9a-f]{32}")
MAX_SOURCE_CHARACTERS = 200
MAX_ROW = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What a client says is true of one row of one prediction."""

    prediction_id: str
    """32 hexadecimal digits."""

    row: int
    """Place of the image in the request, from 0."""

    class_index: int
    label: str
    """Name of the class."""

    source: str
    """Who says so; may be empty."""


def parse_feedback(body: bytes, class_names: Sequence[str]) -> Feedback:
    """The feedback in a JSON body `{"prediction_id", "label", "row": 0, "source": ""}`.

    Args:
        body: As it was sent.
        class_names: Of the model, in index order; `label` is one of them or an index.

    Raises:
        ProtocolError: 400, it is no such JSON; 413, it has too many values; 422, a value has the
            right type and cannot be.
    """
    document = load_object(body)
    unknown = [name for name in document if name not in KNOWN]
    if unknown:
        malformed(f"{unknown[0][:40]!r} is unknown; feedback has {', '.join(KNOWN)}.")
    class_index = _class_index(document.get("label"), class_names)
    return Feedback(
        prediction_id=_prediction_id(document.get("prediction_id")),
        row=_row(document.get("row", 0)),
        class_index=class_index,
        label=class_names[class_index],
        source=_source(document.get("source", "")),
    )


def _prediction_id(value: object) -> str:
    if not isinstance(value, str):
        malformed("`prediction_id` must be a string: the id that came with the prediction.")
    if not PREDICTION_ID.fullmatch(value):
        _refuse(
            f"`prediction_id` {value[:40]!r} is no prediction's: those are 32 hexadecimal digits."
        )
    return value


def _class_index(value: object, class_names: Sequence[str]) -> int:
    if isinstance(value, str):
        if value not in class_names:
            shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            _refuse(f"`label` {value[:40]!r} is no class of this model; use one of {shown}.")
        return class_names.index(value)
    index = _whole(value)
    if index is None:
        malformed("`label` must be the name of a class or its index.")
    if not 0 <= index < len(class_names):
        _refuse(f"`label` {_short(index)} is out of range 0 to {len(class_names) - 1}.")
    return index


def _row(value: object) -> int:
    row = _whole(value)
    if row is None:
        malformed("`row` must be a whole number: the place of the image in the request, from 0.")
    if not 0 <= row <= MAX_ROW:
        _refuse(f"`row` {_short(row)} is out of range; rows count from 0.")
    return row


def _source(value: object) -> str:
    if not isinstance(value, str):
        malformed("`source` must be a string that names who says so.")
    if len(value) > MAX_SOURCE_CHARACTERS:
        _refuse(f"`source` has {len(value)} characters; use at most {MAX_SOURCE_CHARACTERS}.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        _refuse("`source` has half a surrogate pair, which is no character.")
    return value


def _whole(value: object) -> int | None:
    """A JSON integer, and None for anything else; `true` is not 1 here."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**12 else "with its many digits"


def _refuse(message: str) -> NoReturn:
    raise ProtocolError(422, message)


def record(
    feedback: Feedback, rows_of_prediction: Sequence[Mapping[str, Any]], labels: LabelStore
) -> Literal["new", "same"]:
    """Keep a client's feedback as a label.

    Args:
        feedback: What is said.
        rows_of_prediction: What `EventStore.find` gives for its prediction id.
        labels: Get it.

    Returns:
        `same` when that was known already.

    Raises:
        ProtocolError: 404, there is no such prediction or row; 409, the row has another label.
        StorageFull: The disk has no room.
    """
    if not rows_of_prediction:
        raise ProtocolError(
            404,
            f"Prediction {feedback.prediction_id} is unknown: it was never made here, was deleted, "
            "is older than events are kept, or so new that it is not stored yet; then try again in "
            "a few seconds.",
        )
    times = {row["row"]: row["time"] for row in rows_of_prediction}
    if feedback.row not in times:
        raise ProtocolError(
            404,
            f"Prediction {feedback.prediction_id} has no row {feedback.row}; its rows are 0 to "
            f"{max(times)}.",
        )
    try:
        return labels.add(
            day=times[feedback.row].astimezone(UTC).date(),
            prediction_id=feedback.prediction_id,
            row=feedback.row,
            class_index=feedback.class_index,
            label=feedback.label,
            source=feedback.source,
        )
    except ConflictingLabel as error:
        raise ProtocolError(409, str(error)) from None
