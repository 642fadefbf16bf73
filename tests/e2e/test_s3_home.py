"""Everything on an S3 home with an MLflow server: trained, killed, resumed, served, looked at."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rayloop.serve.events.store import EventStore
from rayloop.storage import Storage
from rayloop.train.checkpoint import checkpoint_paths
from tests.e2e.conftest import LONG, ROOT, Done, Turn, environment, run
from tests.mlflow_server import mlflow_server
from tests.s3_server import BUCKET, S3Server

RAYLOOP = str(Path(sys.executable).with_name("rayloop"))


@dataclass(frozen=True)
class Cloud:
    """Two servers and a home between them."""

    s3: S3Server
    mlflow: Callable[[], str]
    home: str = f"s3://{BUCKET}/team/home"

    def environment(self, user: str = "owner", mlflow: bool = True) -> dict[str, str]:
        """What a user's shell has."""
        uri = {"MLFLOW_TRACKING_URI": self.mlflow()} if mlflow else {}
        return environment(self.home) | self.s3.environment(user) | uri  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cloud(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """The servers; MLflow's starts while the first tests run."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as mlflow:
        yield Cloud(s3, mlflow)


@pytest.fixture
def storage(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The home, seen from this process."""
    for name, value in cloud.s3.environment().items():
        monkeypatch.setenv(name, value)
    return Storage(cloud.home)


def members(session: int) -> list[str]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        state, _, _, its_session = rest.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(name)
    return found


BAD = {
    "no permission": ({}, "stranger", ["denies ListObjectsV2", "Allow its user s3:ListBucket"]),
    "no bucket": ({"RAYLOOP_HOME": "s3://nowhere/x"}, "owner", ["no bucket 'nowhere'", "Create"]),
    "wrong key": ({"AWS_ACCESS_KEY_ID": "AKNOBODY"}, "owner", ["does not know the key", "Set AWS"]),
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "x"}, "owner", ["refuses the signature", "Set"]),
    "no server": (
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "owner",
        ["at http://127.0.0.1:1 does not answer", "correct AWS_ENDPOINT_URL"],
    ),
    "no tracking": ({}, "owner", ["SQLite database needs one", "Set MLFLOW_TRACKING_URI"]),
    "no tracking server": (
        {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}, "owner",
        ["MLflow server at http://127.0.0.1:1 does not answer", "correct MLFLOW_TRACKING_URI"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_and_nothing_is_left_running(cloud: Cloud, case: str) -> None:
    variables, user, sentences = BAD[case]
    job = subprocess.Popen(
        [sys.executable, "jobs/pipeline.py", "smoke", "--serve.http_port", "0"],
        cwd=ROOT,
        env=cloud.environment(user, mlflow=False) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = job.communicate(timeout=200)
    assert job.returncode == 2, err
    (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(sentence in told for sentence in sentences), told
    assert "Traceback" not in err
    assert out == ""
    assert members(job.pid) == []


@pytest.fixture(scope="module")
def resumed(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A pipeline whose driver was killed in training, and then the same command again."""
    report = tmp_path_factory.mktemp("report") / "report.html"
    command = [
        sys.executable, "jobs/pipeline.py", "smoke", "--run-id", "turn",
        "--train.checkpoint_every_epochs", "1", "--serve.http_port", "0",
        "--pipeline.report", str(report),
    ]  # fmt: skip
    env = cloud.environment()
    log = report.with_name("first.log")
    with log.open("wb") as out:
        first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cloud.s3.environment().items():
                patch.setenv(name, value)
            storage, until = Storage(cloud.home), time.monotonic() + 300
            while len(checkpoint_paths(storage, "turn")) < 2:
                assert first.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            first.kill()
            first.wait()
            assert not storage.exists("runs/turn/result.json")
    finally:
        first.kill()
        first.wait()
    done = run(command, env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_killed_and_resumed_it_gives_the_bits_of_a_local_run(resumed: Done, turn: Turn) -> None:
    assert "run turn goes on at step" in resumed.stderr
    for name in ("checkpoint_digest", "dataset_digest", "test_accuracy_int8"):
        assert resumed.last_line[name] == turn.done.last_line[name]


def test_what_was_served_is_what_was_measured(resumed: Done) -> None:
    assert resumed.last_line["failed_requests"] == 0
    assert resumed.last_line["different_answers"] == 0
    assert resumed.stdout.strip().splitlines()[-1].startswith("{")


def test_the_home_has_the_files_the_contract_names(resumed: Done, storage: Storage) -> None:
    (version,) = [name for name in storage.names("datasets/digits") if name != "latest.json"]
    assert {"train", "val", "test"} <= set(storage.names(f"datasets/digits/{version}"))
    assert {"config.json", "curves.png", "ledger.json", "result.json"} <= set(
        storage.names("runs/turn")
    )
    assert set(storage.names("models/classifier/1")) >= {"model.onnx", "release.json"}
    assert storage.names("serving") == []
    assert storage.names("events") != []
    assert not storage.exists("mlflow.db")


def test_commands_read_it_from_another_shell(cloud: Cloud, resumed: Done, storage: Storage) -> None:
    env = cloud.environment()
    events = EventStore(storage).read(date.min, date.max, ["prediction_id", "version"])
    assert events.num_rows == resumed.last_line["served_requests"]
    prediction_id = events["prediction_id"][0].as_py()

    def said(*words: str) -> Any:
        done = run([RAYLOOP, *words, "--json"], env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert said("events", "show", prediction_id)[0]["prediction_id"] == prediction_id
    (model,) = said("models")
    assert (model["version"], model["aliases"]) == ("1", ["champion"])
    (row,) = said("runs")
    assert (row["run_id"], row["status"]) == ("turn", "finished")
    assert said("traffic", "show")[0]["version"] == "1"


@LONG
def test_a_batch_is_predicted_from_it_into_it(cloud: Cloud, resumed: Done) -> None:
    done = run([sys.executable, "jobs/batch_predict.py", "smoke"], cloud.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.last_line["output"].startswith(f"{cloud.home}/predictions/")
    assert done.last_line["accuracy"] == resumed.last_line["test_accuracy_int8"]
