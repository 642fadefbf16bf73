"""Feedback: what is understood becomes a label, and anything else a clear refusal."""

import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloop.serve.events.feedback import MAX_SOURCE_CHARACTERS, Feedback, parse_feedback, record
from rayloop.serve.events.labels import LabelStore
from rayloop.serve.protocol.error import ProtocolError
from rayloop.storage import Storage
from tests.unit.event_cases import DAY, HandClock, name_of

CLASSES = ("ant", "bee", "cat", "0")
GOOD = {"prediction_id": name_of(1), "label": "bee"}


def parse(**changes: object) -> Feedback:
    return parse_feedback(json.dumps({**GOOD, **changes}).encode(), CLASSES)


def refused(**changes: object) -> tuple[int, str]:
    with pytest.raises(ProtocolError) as caught:
        parse(**changes)
    return caught.value.status, caught.value.message


def test_a_label_by_name_or_index() -> None:
    assert parse() == Feedback(
        prediction_id=name_of(1), row=0, class_index=1, label="bee", source=""
    )
    assert parse(label=2, row=3, source="Zoë, nurse").label == "cat"
    assert parse(label="0").class_index == 3
    assert parse(label=0).class_index == 0


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"label": "dog"}, 422, "'dog' is no class of this model; use one of ant, bee, cat, 0"),
        ({"label": 4}, 422, "4 is out of range 0 to 3"),
        ({"label": -1}, 422, "-1 is out of range"),
        ({"label": 10**40}, 422, "out of range"),
        ({"label": True}, 400, "the name of a class or its index"),
        ({"label": 1.0}, 400, "the name of a class or its index"),
        ({"label": None}, 400, "the name of a class or its index"),
        ({"row": -1}, 422, "-1 is out of range"),
        ({"row": 2**31}, 422, "out of range"),
        ({"row": "0"}, 400, "`row` must be a whole number"),
        ({"row": False}, 400, "`row` must be a whole number"),
        ({"row": None}, 400, "`row` must be a whole number"),
        ({"prediction_id": 7}, 400, "`prediction_id` must be a string"),
        ({"prediction_id": "abc"}, 422, "'abc' is no prediction's"),
        ({"prediction_id": name_of(1) + "\n"}, 422, "32 hexadecimal digits"),
        ({"prediction_id": "../" * 10 + "ab"}, 422, "32 hexadecimal digits"),
        ({"source": 1}, 400, "`source` must be a string"),
        ({"source": "x" * (MAX_SOURCE_CHARACTERS + 1)}, 422, "201 characters; use at most 200"),
        ({"source": "\ud800"}, 422, "surrogate"),
        ({"lable": "bee"}, 400, "'lable' is unknown; feedback has prediction_id, label, row, so"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, object], status: int, says: str) -> None:
    got_status, message = refused(**changes)
    assert got_status == status
    assert says in message


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"bee"', b"{", b"\xff", b"[" * 5000, b"1" * 9000], ids=len
)
def test_what_is_no_object_is_malformed(body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_feedback(body, CLASSES)
    assert caught.value.status == 400


def test_what_is_missing_is_malformed() -> None:
    for name in GOOD:
        body = json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()
        with pytest.raises(ProtocolError, match=f"`{name}` must be") as caught:
            parse_feedback(body, CLASSES)
        assert caught.value.status == 400


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from(CLASSES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
NEARLY_GOOD = st.fixed_dictionaries(
    {},
    optional={
        "prediction_id": ANY_JSON | st.just(name_of(1)) | ANY_TEXT.map(lambda text: text * 8),
        "label": ANY_JSON,
        "row": ANY_JSON | st.integers(0, 3),
        "source": ANY_JSON | ANY_TEXT,
        "other": ANY_JSON,
    },
)


@settings(max_examples=400)
@given(document=ANY_JSON | NEARLY_GOOD)
def test_any_json_is_feedback_or_refused(document: object) -> None:
    body = json.dumps(document).encode()
    try:
        feedback = parse_feedback(body, CLASSES)
    except ProtocolError as error:
        assert error.status in (400, 413, 422)
        assert json.loads(error.body())["error"] == error.message
        assert error.message.encode()
        return
    assert CLASSES[feedback.class_index] == feedback.label
    assert 0 <= feedback.row < 2**31
    assert feedback.source.encode() is not None


@settings(max_examples=200)
@given(body=st.binary(max_size=60))
def test_any_bytes_are_feedback_or_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_feedback(body, CLASSES)


# --- recording


@pytest.fixture
def labels(tmp_path: Path) -> LabelStore:
    """An empty store."""
    return LabelStore(Storage(str(tmp_path)), HandClock())


def rows(count: int, when: datetime = datetime(2023, 11, 15, 12, tzinfo=UTC)) -> list[dict]:
    return [{"prediction_id": name_of(1), "row": row, "time": when} for row in range(count)]


def test_feedback_becomes_a_label_of_the_predictions_date(labels: LabelStore) -> None:
    east = timezone(timedelta(hours=9))
    when = datetime(2023, 11, 16, 3, tzinfo=east)  # 18:00 UTC of the day before
    assert record(parse(row=1), rows(2, when), labels) == "new"
    assert record(parse(row=1, source="again"), rows(2, when), labels) == "same"
    assert labels.read(DAY, DAY)["label"].to_pylist() == ["bee"]
    assert labels.read(date.min, DAY - timedelta(days=1)).num_rows == 0


def test_unknown_predictions_and_rows_are_404_and_another_label_409(labels: LabelStore) -> None:
    for found, row, says in (([], 0, "is unknown"), (rows(2), 2, r"no row 2; its rows are 0 to 1")):
        with pytest.raises(ProtocolError, match=says) as caught:
            record(parse(row=row), found, labels)
        assert caught.value.status == 404
    record(parse(), rows(1), labels)
    with pytest.raises(ProtocolError, match="labelled 'bee' already") as caught:
        record(parse(label="cat"), rows(1), labels)
    assert caught.value.status == 409
    assert labels.read(DAY, DAY)["label"].to_pylist() == ["bee"]
