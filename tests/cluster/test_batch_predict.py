"""Batch prediction on a local Ray: the online answer row for row, resumed, and past broken rows."""

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import BatchConfig, Config, DataConfig, ServeConfig
from rayloop.errors import Corrupt, DataMissing, DoesNotFit, WorkError
from rayloop.serve.assemble import make_service
from rayloop.serve.engine import OnnxEngine
from rayloop.serve.http import InferenceApp
from rayloop.serve.offline.plan import BatchWork, open_work
from rayloop.serve.offline.result import finish
from rayloop.serve.offline.run import predict_files
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.storage import Storage
from tests.cluster.servers import LABELS, MODEL, SHAPE, images, model_bytes
from tests.unit.offline_cases import (
    DeadlyPiece,
    add_dataset,
    encoded,
    image_folder,
    parquet_file,
    publish,
    without_database,
)

pytestmark = pytest.mark.usefixtures("local_ray")
ANSWER = ("class_index", "label", "confidence", "probabilities")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A root with version 1 of the model and the dataset `pets`."""
    without_database(monkeypatch)
    root = Storage(str(tmp_path / "root"))
    publish(root)
    add_dataset(root)
    return root


@pytest.fixture
def engine() -> OnnxEngine:
    return OnnxEngine(model_bytes(1))


def work_of(storage: Storage, **changes: Any) -> BatchWork:
    """Batch prediction with two engines, in files of 30 rows."""
    batch = {"version": ":1", "batch_rows": 8, "rows_per_file": 30, "num_workers": 2, **changes}
    data = DataConfig(source="digits", name="pets")
    return open_work(storage, Config(data=data, batch=BatchConfig(**batch)))


def predict(storage: Storage, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last line of the job, and all rows of its result."""
    work = work_of(storage, **changes)
    summary = finish(work, predict_files(work), SYSTEM_CLOCK)
    return summary, pq.read_table(f"{summary['output']}/rows").to_pylist()


def online(engine: OnnxEngine, files: list[bytes]) -> list[dict[str, Any]]:
    """What `POST /predict` answers to image files, one by one and with others in its batch."""
    spec = ModelSpec(model=MODEL, version="1", shape=SHAPE, class_names=LABELS)
    config = ServeConfig(max_batch_rows=7)

    async def one(app: InferenceApp, body: bytes) -> dict[str, Any]:
        sent: list[dict[str, Any]] = []
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "headers": [], "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)
        return {"status": sent[0]["status"], **json.loads(sent[1]["body"])}

    async def main() -> list[dict[str, Any]]:
        service = make_service(engine, spec, config)
        app = InferenceApp(service, config)
        found = await asyncio.gather(*(one(app, file) for file in files))
        await service.close()
        return found

    return asyncio.run(main())


def test_a_split_gets_the_engines_and_the_servers_answers(
    storage: Storage, engine: OnnxEngine
) -> None:
    summary, rows = predict(storage)
    pixels = images(87, seed=2)
    assert [row["row_id"] for row in rows] == list(range(87))
    for row, image in zip(rows, pixels, strict=True):
        assert row["probabilities"] == engine.predict(image[None])[0].tolist()
        assert row["error"] is None
    for row, answer in zip(rows, online(engine, [encoded(image) for image in pixels]), strict=True):
        assert {name: row[name] for name in ANSWER} == {name: answer[name] for name in ANSWER}
    hits = [row["label"] == row["true_label"] for row in rows]
    assert summary["accuracy"] == np.mean(hits)
    assert (summary["rows"], summary["errors"], summary["files_done_before"]) == (87, 0, 0)
    assert summary["images_per_second"] > 0
    manifest = storage.read_json(
        f"{Path(summary['output']).relative_to(storage.root)}/manifest.json"
    )
    assert manifest["artifact_digest"] and manifest["rows"] == 87


def test_a_folder_gets_the_servers_answers_and_its_refusals(
    storage: Storage, engine: OnnxEngine, tmp_path: Path
) -> None:
    folder = image_folder(tmp_path / "photos", images(20))
    (folder / "ant" / "cut.png").write_bytes(encoded(images(1)[0])[:60])
    (folder / "ant" / "small.webp").write_bytes(encoded(images(1)[0][:5], "WEBP"))
    summary, rows = predict(storage, input=str(folder), rows_per_file=6)
    assert (summary["rows"], summary["errors"]) == (22, 2)
    assert [row["row_id"] for row in rows] == sorted(row["row_id"] for row in rows)
    answers = online(engine, [(folder / row["row_id"]).read_bytes() for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert row["true_label"] == Path(row["row_id"]).parent.name
        if answer["status"] == 200:
            assert {name: row[name] for name in ANSWER} == {name: answer[name] for name in ANSWER}
        else:
            assert row["error"] == answer["error"]
            assert all(row[name] is None for name in ANSWER)
    assert sum(row["error"] is not None for row in rows) == 2


def test_parquet_gets_the_same_answers(
    storage: Storage, engine: OnnxEngine, tmp_path: Path
) -> None:
    path = parquet_file(tmp_path / "rows.parquet", images(64))
    _, rows = predict(storage, input=str(path))
    found = np.float32([row["probabilities"] for row in rows])
    np.testing.assert_array_equal(found, engine.predict(images(64)))


def test_a_job_that_was_killed_computes_only_what_is_missing(storage: Storage) -> None:
    whole, rows = predict(storage, output="whole")
    summary, _ = predict(storage, output="mine", num_workers=1)
    folder = Path(summary["output"])
    (folder / "manifest.json").unlink()
    (folder / "rows" / "part-00001.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    again, rows_again = predict(storage, output="mine")
    assert (again["files_done_before"], again["files"]) == (2, 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert rows_again == rows
    for path in (Path(whole["output"]) / "rows").iterdir():
        assert (folder / "rows" / path.name).read_bytes() == path.read_bytes()
    assert again["accuracy"] == whole["accuracy"]


def test_an_engine_that_is_killed_is_replaced(storage: Storage, tmp_path: Path) -> None:
    pixels = images(6000)
    path = parquet_file(tmp_path / "rows.parquet", pixels, row_group_size=100)
    killed: list[int] = []

    def kill_an_engine() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not storage.names("predictions/mine/rows"):
            time.sleep(0.002)
        killed.extend(engines_under(os.getpid()))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_an_engine, daemon=True)
    thread.start()
    changes = {"output": "mine", "rows_per_file": 100, "num_workers": 1}
    summary, rows = predict(storage, input=str(path), **changes)
    thread.join()
    assert len(killed) == 1
    assert (summary["rows"], summary["errors"]) == (6000, 0)
    assert [row["row_id"] for row in rows] == list(range(6000))


def test_a_file_that_kills_every_engine_ends_the_job(storage: Storage) -> None:
    work = work_of(storage, num_workers=1)
    deadly = replace(work, source=replace(work.source, piece=lambda *_: DeadlyPiece()))
    with pytest.raises(WorkError, match=r"died 4 times.*same command again"):
        predict_files(deadly)


def engines_under(pid: int) -> list[int]:
    """Processes that run an engine and descend from a process."""
    parents, engines = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            if b"Predictor" in command and command.startswith(b"ray::"):
                engines.append(int(entry.name))
    return [engine for engine in engines if pid in ancestors(engine, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    """The processes a process descends from, nearest first."""
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found


def test_what_an_engine_meets_is_told_as_itself(storage: Storage) -> None:
    publish(storage, "2", golden_error=0.3)
    with pytest.raises(Corrupt, match="golden rows"):
        predict(storage, version=":2")
    shard = Path(storage.path("datasets/pets/v1/test/part-00001.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=r"part-00001\.arrow"):
        predict(storage)
    shard.unlink()
    with pytest.raises(DataMissing, match=r"part-00001\.arrow"):
        predict(storage)


def test_more_engines_than_cpus_are_refused_at_once(storage: Storage) -> None:
    with pytest.raises(DoesNotFit, match=r"batch\.num_workers=64 needs 64 CPUs; the cluster has 4"):
        predict(storage, num_workers=64)
