"""Rows of events: what the columns hold, whatever mixture of requests they come from."""

import io
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.config import EventsConfig
from rayloop.data import profile
from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.table import (
    SCHEMA,
    event_table,
    image_statistics,
    sample_points,
    to_parquet,
)
from tests.unit.event_cases import NOON, event, failed, name_of

NONE_KEPT = EventsConfig()


def no_embedding(version: str, images: np.ndarray) -> None:
    raise AssertionError("nothing was to be embedded")


def table_of(*events: PredictionEvent) -> pa.Table:
    return event_table(events, NONE_KEPT, no_embedding)


def test_one_image_is_one_row_with_all_that_is_known() -> None:
    made = event(5, time=NOON + 0.1234567, unit="ann", forced=True)
    (row,) = table_of(made).to_pylist()
    assert made.probabilities is not None
    index = int(made.probabilities[0].argmax())
    assert row["time"].isoformat() == "2023-11-15T12:00:00.123457+00:00"
    assert math.isnan(row.pop("engine_ms"))
    assert row["probabilities"] == made.probabilities[0].tolist()
    wanted = {
        "prediction_id": name_of(5), "row": 0, "model": "classifier", "plan": 3, "unit": "ann",
        "variant": "champion", "assigned_version": "4", "version": "4", "forced": True,
        "status": 200, "class_index": index, "confidence": float(made.probabilities[0, index]),
        "decision": "accept", "latency_ms": 2.5, "queue_ms": 1.0, "embedding": None, "image": None,
        "shape": None,
    }  # fmt: skip
    assert {name: row[name] for name in wanted} == wanted
    assert set(row) == {*wanted, "time", "probabilities", "brightness", "contrast"}


def test_rows_of_a_request_keep_their_order_and_share_its_columns() -> None:
    made = event(1, 3, decisions=("accept", "fallback", "review"), versions=("4", "9", "4"))
    table = table_of(event(0), made, event(2))
    assert table["prediction_id"].to_pylist() == [name_of(n) for n in (0, 1, 1, 1, 2)]
    assert table["row"].to_pylist() == [0, 0, 1, 2, 0]
    assert table["version"].to_pylist() == ["4", "4", "9", "4", "4"]
    assert table["decision"].to_pylist() == ["accept", "accept", "fallback", "review", "accept"]


def test_a_failed_request_has_nulls_where_no_answer_is() -> None:
    rows = table_of(event(0), failed(1, 2, 504), event(2)).to_pylist()
    by_name = {(row["prediction_id"], row["row"]): row for row in rows}
    assert len(by_name) == 4
    for place in (0, 1):
        lost = by_name[name_of(1), place]
        assert lost["status"] == 504
        assert [lost[n] for n in ("class_index", "confidence", "probabilities", "decision")] == [
            None
        ] * 4
        assert lost["version"] == "4"
        assert 0 < lost["brightness"] < 1
    assert by_name[name_of(2), 0]["class_index"] is not None


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["ok", "failed", "wide", "colour"])),
        min_size=1,
        max_size=8,
    )
)
def test_a_mixture_gives_the_rows_each_request_gives_alone(requests: list[tuple[int, str]]) -> None:
    events = []
    for number, (rows, kind) in enumerate(requests):
        made = failed(number, rows) if kind == "failed" else event(number, rows)
        if kind == "wide":
            made = replace(made, probabilities=np.full((rows, 9), 1 / 9, np.float32))
        if kind == "colour":
            made = replace(made, images=np.full((rows, 2, 2, 3), number, np.uint8))
        events.append(replace(made, engine_ms=1.0))

    def key(row: dict[str, object]) -> tuple[object, object]:
        return row["prediction_id"], row["row"]

    alone = [row for made in events for row in table_of(made).to_pylist()]
    assert sorted(table_of(*events).to_pylist(), key=key) == sorted(alone, key=key)


@given(
    rows=st.integers(1, 5),
    side=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    top=st.sampled_from([0, 1, 30, 255]),
    seed=st.integers(0, 99),
)
def test_statistics_are_those_of_the_reference_profile(
    rows: int, side: int, channels: int, top: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, top + 1, (rows, side + 1, side + 1, channels), dtype=np.uint8)
    wanted = profile.image_statistics(images)
    brightness, contrast = image_statistics(images)
    np.testing.assert_allclose(brightness, wanted["brightness"], atol=2e-6)
    np.testing.assert_allclose(contrast, wanted["contrast"], atol=2e-6)


def test_statistics_of_many_large_images_do_not_depend_on_the_block() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 200, 300, 3), dtype=np.uint8)
    alone = [image_statistics(image[None])[1][0] for image in images]
    np.testing.assert_allclose(image_statistics(images)[1], alone, rtol=1e-6)


def test_arrays_that_are_not_contiguous_or_of_another_precision_are_taken_as_they_are() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (1, 6, 10, 1), dtype=np.uint8)
    sliced, plain = wide[:, :, ::2], np.ascontiguousarray(wide[:, :, ::2])
    double = np.array([[0.1, 0.2, 0.3, 0.4]])
    odd = [event(0, images=sliced, probabilities=double), event(1, images=sliced)]
    same = [event(0, images=plain, probabilities=double.astype(np.float32)),
            event(1, images=plain)]  # fmt: skip
    table = table_of(*odd)
    assert table.drop_columns(["engine_ms"]) == table_of(*same).drop_columns(["engine_ms"])
    assert table["class_index"][0].as_py() == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"decisions": ("accept",)},
        {"versions": ("1", "2", "3")},
        {"probabilities": np.ones((3, 4), np.float32)},
    ],
    ids=str,
)
def test_an_event_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        table_of(event(0), event(1, 2, **wrong))


def test_a_unit_that_is_no_text_costs_only_itself() -> None:
    table = table_of(event(0, unit="a\ud800b"), event(1, unit="ü"))
    assert table["unit"].to_pylist() == ["a?b", "ü"]


# --- samples


def sampled(payload: float, embedding: float, count: int = 400) -> pa.Table:
    events = [event(number, 2) for number in range(count // 2)]
    config = EventsConfig(payload_share=payload, embedding_share=embedding)
    return event_table(events, config, lambda _, images: images.reshape(len(images), -1)[:, :3] / 2)


def test_a_share_of_the_images_keeps_its_pixels_and_another_its_embedding() -> None:
    table = sampled(0.5, 0.2)
    images = {(name_of(n), row): event(n, 2).images[row] for n in range(200) for row in range(2)}
    kept = [row for row in table.to_pylist() if row["image"] is not None]
    assert 150 < len(kept) < 250
    for row in kept:
        pixels = np.frombuffer(row["image"], np.uint8).reshape(row["shape"])
        assert np.array_equal(pixels, images[row["prediction_id"], row["row"]])
    assert table["shape"].null_count == table["image"].null_count == 400 - len(kept)
    embedded = [row for row in table.to_pylist() if row["embedding"] is not None]
    assert 50 < len(embedded) < 110
    for row in embedded:
        assert row["image"] is not None  # the smaller sample lies within the larger
        pixels = images[row["prediction_id"], row["row"]].ravel()[:3]
        assert row["embedding"] == (pixels / np.float32(2)).tolist()


def test_the_sample_is_the_same_however_rows_are_put_together() -> None:
    config = EventsConfig(payload_share=0.3)
    together = event_table([event(n, 2) for n in range(50)], config, no_embedding)
    alone = [event_table([event(n, 2)], config, no_embedding) for n in range(50)]
    assert together["image"].to_pylist() == pa.concat_tables(alone)["image"].to_pylist()
    assert sampled(1.0, 1.0)["image"].null_count == 0
    assert sampled(1.0, 1.0)["embedding"].null_count == 0
    assert sampled(0.0, 0.0)["image"].null_count == 400


def test_sample_points_are_spread_evenly_over_counters_rows_and_replicas() -> None:
    ids = [name_of(n, writer) for writer in ("0" * 16, "f" * 16) for n in range(4000)]
    for rows in (np.zeros(8000, np.int32), np.arange(8000, dtype=np.int32) % 5):
        points = sample_points(ids, rows)
        assert points.min() >= 0
        assert points.max() < 1
        counts = np.histogram(points, 20, (0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 50  # chi-squared, 19 degrees of freedom
        assert len(set(points.tolist())) == 8000
    of_one_request = sample_points(ids[:1] * 9, np.arange(9, dtype=np.int32))
    assert len(set(of_one_request.tolist())) == 9
    assert abs(np.corrcoef(sample_points(ids[:4000], rows[:4000]), np.arange(4000))[0, 1]) < 0.06


def test_no_embedding_where_the_embedder_has_none() -> None:
    table = event_table([event(0)], EventsConfig(embedding_share=1.0), lambda *_: None)
    assert table["embedding"].null_count == 1


def test_each_row_is_embedded_by_the_version_that_answered_it() -> None:
    asked = []

    def embed(version: str, images: np.ndarray) -> np.ndarray | None:
        asked.append((version, len(images)))
        return None if version == "8" else np.full((len(images), int(version)), images.mean())

    events = [event(0, 3, versions=("4", "2", "4")), failed(1), event(2, 2, versions=("8", "2"))]
    table = event_table(events, EventsConfig(embedding_share=1.0), embed)
    lengths = {
        (row["prediction_id"], row["row"]): row["embedding"] and len(row["embedding"])
        for row in table.to_pylist()
    }
    assert list(lengths.values()) == [4, 2, 4, None, 2, 4]
    assert lengths[name_of(1), 0] == 4  # its assigned version, as none answered
    assert sorted(asked) == [("2", 2), ("4", 1), ("4", 2), ("8", 1)]


def test_a_file_is_read_by_pyarrow_alone_and_has_dictionaries() -> None:
    table = sampled(0.5, 0.5)
    content = to_parquet(table).to_pybytes()
    there = pq.read_table(io.BytesIO(content))
    assert there.schema.equals(SCHEMA)
    unequal = {"engine_ms"}  # NaN
    assert [n for n in SCHEMA.names if there[n] != table[n]] == list(unequal)
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    columns = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}
    assert "RLE_DICTIONARY" in columns["variant"].encodings
    assert "RLE_DICTIONARY" not in columns["prediction_id"].encodings
    assert columns["unit"].compression == "ZSTD"
