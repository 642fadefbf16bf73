"""Batch prediction without Ray: what is read, what is left to do, what is refused, what is told."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayloop.config import BatchConfig, Config, DataConfig, RegistryConfig, ServeConfig
from rayloop.data.contract import RowContract
from rayloop.errors import ConfigError, Corrupt, DataMissing, DoesNotFit, RequestError, WorkError
from rayloop.serve.engine import OnnxEngine
from rayloop.serve.offline.answers import (
    Counts,
    answer_chunks,
    count,
    read_counts,
    write_answers,
)
from rayloop.serve.offline.input import BatchInput, parse_dataset, resolve_input
from rayloop.serve.offline.pieces import Chunk, spans_of
from rayloop.serve.offline.plan import BatchWork, choose_workers, open_work
from rayloop.serve.offline.result import FileReport, finish, images_per_second
from rayloop.storage import Storage
from tests.cluster.servers import LABELS, SHAPE, images, model_bytes
from tests.unit.offline_cases import (
    add_dataset,
    encoded,
    image_folder,
    labels_of,
    parquet_file,
    publish,
    without_database,
)

CONTRACT = RowContract(shape=SHAPE, class_names=LABELS)


class StoppedClock:
    """It is always the same second."""

    def now(self) -> float:
        return 1_000_000.0

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A root with versions 1 and 2 of the model and the dataset `pets`."""
    without_database(monkeypatch)
    root = Storage(str(tmp_path / "root"))
    publish(root)
    publish(root, "2")
    add_dataset(root)
    return root


def settings(**changes: Any) -> Config:
    """Version 1 over the test split of `pets`, in files of 30 rows."""
    batch = BatchConfig(**{"version": ":1", "batch_rows": 8, "rows_per_file": 30, **changes})
    return Config(data=DataConfig(source="digits", name="pets"), batch=batch)


def source_of(storage: Storage, address: str) -> BatchInput:
    """What an address names."""
    config = settings(input=address)
    return resolve_input(storage, config.data, config.batch, CONTRACT)


def chunks_of(source: BatchInput, batch_rows: int = 8) -> list[Chunk]:
    """All rows of an input, read in two pieces."""
    middle = source.rows // 2
    pieces = (source.piece(0, middle), source.piece(middle, source.rows))
    return [chunk for piece in pieces for chunk in piece.read(CONTRACT, batch_rows)]


def run(work: BatchWork, engine: OnnxEngine, stop_after: int = 1000) -> list[FileReport]:
    """What the actors do, one file after the other."""
    reports = []
    for file in work.missing()[:stop_after]:
        table = answer_chunks(engine, file.piece.read(work.contract, work.batch_rows), LABELS)
        counts = write_answers(work.storage, file.path, table)
        reports.append(FileReport(index=file.index, counts=counts, began_at=0.0, ended_at=2.0))
    return reports


def answers_of(storage: Storage, work: BatchWork) -> pa.Table:
    """All rows of the result, as any reader of Parquet gets them."""
    return pq.read_table(storage.path(work.folder, "rows"))


@pytest.fixture
def engine() -> OnnxEngine:
    return OnnxEngine(model_bytes(1))


# --- the input


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("dataset:pets", ("pets", "", "test")),
        ("dataset:pets/train", ("pets", "", "train")),
        ("dataset:pets/v1", ("pets", "v1", "test")),
        ("dataset:pets/v1/val", ("pets", "v1", "val")),
    ],
)
def test_an_address_names_dataset_version_and_split(address: str, expected: tuple) -> None:
    assert parse_dataset(address) == expected


@pytest.mark.parametrize("address", ["dataset:", "dataset:pets/v1/tset", "dataset:a/b/c/test"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="NAME") as refused:
        parse_dataset(address)
    assert ("Did you mean 'test'?" in str(refused.value)) == ("tset" in address)


def test_spans_cover_every_row_once() -> None:
    sources = [("a", 5), ("b", 1), ("c", 4)]
    for start in range(10):
        for stop in range(start + 1, 11):
            spans = spans_of(sources, start, stop)
            ids = [s.row_id + k for s in spans for k in range(s.stop - s.first)]
            assert ids == list(range(start, stop))
    (span,) = spans_of(sources, 7, 9)
    assert (span.source, span.first, span.stop, span.row_id) == ("c", 1, 3, 7)


def test_the_default_is_the_test_split_in_its_order(storage: Storage) -> None:
    source = source_of(storage, "")
    assert source.where == "dataset:pets/v1/test"
    assert (source.rows, source.has_truth) == (87, True)
    chunks = chunks_of(source)
    assert max(len(chunk.images) for chunk in chunks) == 8
    np.testing.assert_array_equal(np.concatenate([c.images for c in chunks]), images(87, 2))
    assert pa.chunked_array([c.row_ids for c in chunks]).to_pylist() == list(range(87))
    truth = pa.chunked_array([c.truth for c in chunks]).to_pylist()
    assert truth == [LABELS[index] for index in labels_of(87)]
    assert source_of(storage, "dataset:pets/train").digest != source.digest


def test_a_damaged_shard_is_not_predicted(storage: Storage) -> None:
    path = Path(storage.path("datasets/pets/v1/test/part-00001.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Corrupt, match="part-00001"):
        chunks_of(source_of(storage, ""))


def test_a_folder_is_read_by_path_with_its_labels(storage: Storage, tmp_path: Path) -> None:
    pixels = images(12)
    folder = image_folder(tmp_path / "photos", pixels)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    source = source_of(storage, str(folder))
    assert (source.kind, source.rows, source.has_truth) == ("folder", 12, True)
    found = {}
    for chunk in chunks_of(source):
        assert chunk.errors == ()
        paths, labels = chunk.row_ids.to_pylist(), chunk.truth.to_pylist()
        assert labels == [Path(path).parent.name for path in paths]
        found.update(zip(paths, chunk.images, strict=True))
    assert list(found) == sorted(found)
    for path, image in found.items():
        if not path.endswith(".jpg"):
            np.testing.assert_array_equal(image, pixels[int(Path(path).stem)])
    (folder / "loose.png").write_bytes(encoded(pixels[0]))
    changed = source_of(storage, str(folder))
    assert not changed.has_truth and changed.digest != source.digest


def test_what_cannot_be_read_is_an_error_of_its_row(storage: Storage, tmp_path: Path) -> None:
    good, wide = images(1)[0], np.zeros((3, 4, 1), np.uint8)
    contents = {
        "a.png": encoded(good),
        "b.png": encoded(good)[:50],
        "c.png": b"",
        "d.png": encoded(wide),
        "e.bmp": encoded(good, "BMP"),
        "f.png": encoded(good),
        "g.png": encoded(good),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    source = source_of(storage, str(tmp_path))
    (tmp_path / "g.png").unlink()
    (chunk,) = source.piece(0, 7).read(CONTRACT, 100)
    assert len(chunk.images) == 2
    for error, part in zip(
        chunk.errors, ["", "cut short", "empty", "4x3", "neither PNG", "", "no file"], strict=True
    ):
        assert part in error and bool(part) == bool(error)


def test_parquet_is_read_across_files_and_row_groups(storage: Storage, tmp_path: Path) -> None:
    pixels = images(64)
    parquet_file(tmp_path / "a.parquet", pixels[:37])
    parquet_file(tmp_path / "b.parquet", pixels[37:])
    source = source_of(storage, str(tmp_path))
    assert (source.kind, source.rows, source.has_truth) == ("parquet", 64, True)
    chunks = list(source.piece(5, 61).read(CONTRACT, 8))
    np.testing.assert_array_equal(np.concatenate([c.images for c in chunks]), pixels[5:61])
    assert pa.chunked_array([c.row_ids for c in chunks]).to_pylist() == list(range(5, 61))
    assert chunks[0].truth.to_pylist()[0] == LABELS[labels_of(37)[5]]
    one = source_of(storage, str(tmp_path / "b.parquet"))
    assert (one.rows, one.where) == (27, str(tmp_path / "b.parquet"))


def test_parquet_holds_images_as_files_structs_or_numbers(storage: Storage, tmp_path: Path) -> None:
    pixels = images(3)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), pixels[0].size)
    tensor = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), SHAPE), flat)
    columns = {
        "struct": [{"bytes": encoded(image), "path": None} for image in pixels],
        "numbers": pixels[..., 0].tolist(),
        "floats": pixels.astype(float).tolist(),
        "tensor": tensor,
    }
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": column}), path)
        source = source_of(storage, str(path))
        assert not source.has_truth
        (chunk,) = source.piece(0, 3).read(CONTRACT, 10)
        assert chunk.errors == () and chunk.truth is None, name
        np.testing.assert_array_equal(chunk.images, pixels)


def test_cells_that_are_no_image_are_errors_and_labels_keep_their_names(
    storage: Storage, tmp_path: Path
) -> None:
    image = images(1)[0][..., 0].tolist()
    ragged, odd = [[1], [2, 3]], [[1.5, float("nan")]]
    labels = ["dog", "wolf", None, "1", "ant"]
    path = tmp_path / "rows.parquet"
    table = pa.table({"image": [image, None, ragged, odd, image], "label": labels})
    pq.write_table(table, path)
    (chunk,) = source_of(storage, str(path)).piece(0, 5).read(CONTRACT, 10)
    assert [bool(error) for error in chunk.errors] == [False, True, True, True, False]
    assert chunk.truth.to_pylist() == labels


def test_what_is_no_input_is_refused_with_the_remedy(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"does not exist.*dataset:NAME.*there are pets"):
        source_of(storage, str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissing, match="holds no images"):
        source_of(storage, str(tmp_path / "empty"))
    with pytest.raises(DataMissing, match="There is no dataset 'cars'"):
        source_of(storage, "dataset:cars")
    add_dataset(storage, (5, 5, 1), "small")
    with pytest.raises(RequestError, match=r"images of 5x5x1 and the model takes 12x10x1"):
        source_of(storage, "dataset:small")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.png").write_bytes(b"x")
    pq.write_table(pa.table({"picture": [b"x"]}), mixed / "b.parquet")
    with pytest.raises(RequestError, match="1 Parquet files and 1 images"):
        source_of(storage, str(mixed))
    with pytest.raises(RequestError, match=r"has columns picture; .*'image'"):
        source_of(storage, str(mixed / "b.parquet"))
    (mixed / "b.parquet").write_bytes(b"cut")
    with pytest.raises(RequestError, match="cannot be read as Parquet"):
        source_of(storage, str(mixed / "b.parquet"))
    with pytest.raises(RequestError, match="cannot be read"):
        source_of(storage, "htp://somewhere/rows")


# --- answers


def test_answers_are_the_engines_own_with_nulls_for_errors(engine: OnnxEngine) -> None:
    rows = images(3)
    chunks = [
        Chunk(row_ids=pa.array(["a", "b", "c"]), images=rows[:2], errors=("", "broken", ""),
              truth=pa.array(["ant", "bee", None])),
        Chunk(row_ids=pa.array(["d"]), images=rows[:0], errors=("cut",), truth=pa.array(["cat"])),
        Chunk(row_ids=pa.array(["e"]), images=rows[2:], truth=pa.array(["wolf"])),
    ]  # fmt: skip
    table = answer_chunks(engine, chunks, LABELS)
    expected = [engine.predict(row[None])[0] for row in rows]
    assert table["row_id"].to_pylist() == list("abcde")
    answered = [row for row in table.to_pylist() if row["error"] is None]
    for row, probabilities in zip(answered, expected, strict=True):
        assert row["probabilities"] == probabilities.tolist()
        assert row["class_index"] == probabilities.argmax()
        assert row["label"] == LABELS[probabilities.argmax()]
        assert row["confidence"] == probabilities.max()
    for row in table.slice(1, 1).to_pylist() + table.slice(3, 1).to_pylist():
        assert [row[name] for name in ("class_index", "label", "confidence", "probabilities")] == [
            None
        ] * 4
        assert row["error"]
    types = {field.name: str(field.type) for field in table.schema}
    assert types["class_index"] == "int32" and types["confidence"] == "float"
    assert types["probabilities"].startswith("list<") and "float" in types["probabilities"]
    counts = count(table)
    assert (counts.rows, counts.errors, counts.judged) == (5, 2, 2)
    assert counts.correct == (table["label"][0].as_py() == "ant")
    assert counts.first_error == "b: broken"


def test_counts_stand_in_the_file_and_equal_tables_give_equal_bytes(
    storage: Storage, engine: OnnxEngine
) -> None:
    chunk = Chunk(row_ids=pa.array([0, 1]), images=images(1), errors=("", "cut"))
    for path in ("x/a.parquet", "x/b.parquet"):
        counts = write_answers(storage, path, answer_chunks(engine, [chunk], LABELS))
        assert read_counts(storage, path) == counts
        assert counts == Counts(rows=2, errors=1, first_error="1: cut")
    assert counts.accuracy is None
    assert storage.read("x/a.parquet") == storage.read("x/b.parquet")
    storage.write("x/a.parquet", storage.read("x/a.parquet")[:-9])
    with pytest.raises(Corrupt, match=r"not a whole result file.*same command again"):
        read_counts(storage, "x/a.parquet")


def test_input_without_one_good_row_still_makes_a_table(engine: OnnxEngine) -> None:
    chunk = Chunk(row_ids=pa.array(["a"]), images=images(0), errors=("cut",))
    table = answer_chunks(engine, [chunk], LABELS)
    assert table["label"].to_pylist() == [None] and "true_label" not in table.column_names


# --- plan, resume, result


def test_files_have_their_rows_and_the_plan_says_whose_they_are(storage: Storage) -> None:
    work = open_work(storage, settings())
    assert work.folder == "predictions/classifier-1-pets-v1-test"
    assert [(file.index, file.rows) for file in work.missing()] == [(0, 30), (1, 30), (2, 27)]
    plan = storage.read_json(f"{work.folder}/plan.json")
    assert plan == json.loads(json.dumps(work.plan()))
    assert (plan["version"], plan["rows"], plan["input"]["where"]) == (
        "1", 87, "dataset:pets/v1/test",
    )  # fmt: skip
    assert work.serve.cpus_per_replica == 1


def test_a_stopped_job_does_only_what_is_missing_and_gives_the_same_files(
    storage: Storage, engine: OnnxEngine
) -> None:
    whole = open_work(storage, settings(output="whole"))
    finish(whole, run(whole, engine), StoppedClock())
    work = open_work(storage, settings(output="broken"))
    run(work, engine, stop_after=2)
    Path(storage.path(work.folder, "rows/part-00001.parquet")).unlink()
    hidden = Path(storage.path(work.folder, "rows/.part-00002.parquet.1a2b"))
    hidden.write_bytes(b"half")
    assert not storage.exists(f"{work.folder}/manifest.json")
    again = open_work(storage, settings(output="broken"))
    assert again.done == {0}
    assert [file.index for file in again.missing()] == [1, 2]
    summary = finish(again, run(again, engine), StoppedClock())
    assert summary["files_done_before"] == 1
    for name in storage.names(f"{whole.folder}/rows"):
        content = storage.read(f"{whole.folder}/rows/{name}")
        assert storage.read(f"{work.folder}/rows/{name}") == content
    manifests = [storage.read_json(f"{w.folder}/manifest.json") for w in (whole, again)]
    assert manifests[0] == manifests[1]
    assert answers_of(storage, again).equals(answers_of(storage, whole))


def test_the_summary_counts_all_rows_also_those_of_earlier_sessions(
    storage: Storage, engine: OnnxEngine
) -> None:
    run(open_work(storage, settings()), engine, stop_after=1)
    work = open_work(storage, settings())
    summary = finish(work, run(work, engine), StoppedClock())
    expected = engine.predict(images(87, 2)).argmax(axis=1)
    assert summary["accuracy"] == float((expected == labels_of(87)).mean())
    assert (summary["rows"], summary["errors"], summary["files"]) == (87, 0, 3)
    assert summary["images_per_second"] == 57 / 2
    assert summary["output"] == storage.path(work.folder)
    manifest = storage.read_json(f"{work.folder}/manifest.json")
    assert [entry["rows"] for entry in manifest["files"]] == [30, 30, 27]
    assert manifest["accuracy"] == summary["accuracy"]
    assert manifest["class_names"] == list(LABELS)
    before = storage.read(f"{work.folder}/manifest.json")
    done = open_work(storage, settings())
    assert done.missing() == []
    again = finish(done, [], StoppedClock())
    assert again["images_per_second"] is None and again["files_done_before"] == 3
    assert again["accuracy"] == summary["accuracy"]
    assert storage.read(f"{work.folder}/manifest.json") == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": ":2"}, "the version was 1, now 2; the model file's digest was"),
        ({"rows_per_file": 31}, "batch.rows_per_file was 30, now 31"),
        ({"input": "dataset:pets/train"}, "dataset:pets/v1/test .*, now dataset:pets/v1/train"),
    ],
)
def test_a_result_of_something_else_is_not_touched(
    storage: Storage, changes: dict[str, Any], told: str
) -> None:
    open_work(storage, settings(output="mine"))
    with pytest.raises(RequestError, match=told) as refused:
        open_work(storage, settings(output="mine", **changes))
    assert "--batch.output" in str(refused.value)
    assert open_work(storage, settings(output="mine", batch_rows=3, num_workers=2)).done == set()


def test_a_changed_folder_is_another_input(storage: Storage, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "photos", images(4))
    first = open_work(storage, settings(input=str(folder)))
    open_work(storage, settings(input=str(folder), output="mine"))
    os.utime(next(folder.rglob("*.png")), ns=(1, 1))
    assert open_work(storage, settings(input=str(folder))).folder != first.folder
    with pytest.raises(RequestError, match=r"batch\.input was .*photos \(digest"):
        open_work(storage, settings(input=str(folder), output="mine"))


def test_a_torch_engine_has_a_result_of_its_own(storage: Storage) -> None:
    config = replace(settings(), serve=ServeConfig(engine="torch", precision="fp32"))
    work = open_work(storage, config)
    assert work.folder == "predictions/classifier-1-torch-fp32-pets-v1-test"
    assert (work.serve.max_batch_rows, work.plan()["engine"]) == (8, "torch-fp32")


@pytest.mark.parametrize("name", ["a/b", "..", "über uns"])
def test_an_output_is_a_plain_name(storage: Storage, name: str) -> None:
    with pytest.raises(ConfigError, match=r"batch\.output="):
        open_work(storage, settings(output=name))


def test_a_foreign_folder_and_a_missing_model_are_refused(storage: Storage) -> None:
    storage.write("predictions/mine/other.txt", b"x")
    with pytest.raises(RequestError, match=r"it has no plan\.json"):
        open_work(storage, settings(output="mine"))
    config = replace(settings(), registry=RegistryConfig(model="classifier"))
    Path(storage.path("models/classifier/1/model.onnx")).write_bytes(b"x")
    with pytest.raises(Corrupt, match=r"model\.onnx"):
        open_work(storage, config)


def test_workers_are_as_many_as_there_are_cores_and_files(storage: Storage) -> None:
    work = open_work(storage, settings())
    assert choose_workers(work, cpus=4, spare_cpus=2) == 2
    assert choose_workers(work, cpus=64, spare_cpus=2) == 3
    assert choose_workers(work, cpus=1, spare_cpus=2) == 1
    assert choose_workers(replace(work, num_workers=4), cpus=4, spare_cpus=2) == 3
    assert choose_workers(replace(work, done=frozenset({0, 1})), cpus=4, spare_cpus=2) == 1
    with pytest.raises(DoesNotFit, match=r"batch\.num_workers=5 needs 5 CPUs; the cluster has 4"):
        choose_workers(replace(work, num_workers=5), cpus=4, spare_cpus=2)


def test_speed_counts_from_the_first_row_to_the_last_file() -> None:
    counts = Counts(rows=100)
    reports = [
        FileReport(index=0, counts=counts, began_at=10.0, ended_at=12.0),
        FileReport(index=1, counts=counts, began_at=10.5, ended_at=14.0),
    ]
    assert images_per_second(reports) == 50.0
    assert images_per_second([]) is None


def test_not_one_image_is_a_failure_and_a_lost_file_is_told(
    storage: Storage, tmp_path: Path, engine: OnnxEngine
) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    work = open_work(storage, settings(input=str(tmp_path), rows_per_file=2))
    reports = run(work, engine)
    with pytest.raises(WorkError, match=r"1 of 2 files .* were not written"):
        finish(work, reports[:1], StoppedClock())
    with pytest.raises(WorkError, match=r"Not one of the 3 images .* 0\.png: The PNG is damaged"):
        finish(work, reports, StoppedClock())
    assert storage.read_json(f"{work.folder}/manifest.json")["errors"] == 3
