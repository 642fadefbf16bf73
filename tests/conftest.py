"""What every test gets: a home of its own, and an environment without the developer's settings."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import S3Server, s3_server

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty RAYLOOP_HOME."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("RAYLOOP_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    aws = [name for name in os.environ if name.startswith("AWS_")]
    for name in ("RAY_ADDRESS", "RAYLOOP_HOME", "MLFLOW_TRACKING_URI", *aws):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with an empty bucket, of the whole session."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server
