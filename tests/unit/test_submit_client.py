"""Clusters that refuse, are of another kind, or are not there: told in a sentence, in time."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAYLOOP = str(Path(sys.executable).with_name("rayloop"))
Answer = tuple[int, object]


@pytest.fixture
def head() -> Iterator[Callable[[dict[str, Answer]], str]]:
    """Starts a server with the pages given; gives its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(pages: dict[str, Answer]) -> str:
        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, page = pages.get(self.path, (404, "not here"))
                body = page.encode() if isinstance(page, str) else json.dumps(page).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Pages))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def submit(home: Path, address: str, *words: str, **env: str) -> tuple[int, str]:
    """A submission's exit code, and what it says."""
    return rayloop(home, "submit", "train", "smoke", "--address", address, *words, **env)


def rayloop(home: Path, *words: str, **env: str) -> tuple[int, str]:
    """A command's exit code, and what it says."""
    done = subprocess.run(
        [RAYLOOP, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "RAYLOOP_HOME": str(home),
             "RAY_AUTH_TOKEN": "ab" * 32, **env},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def about(ray: str = "2.60.0", python: str = "") -> dict[str, Answer]:
    found = {"rayVersion": ray, "pythonVersion": python or ".".join(map(str, sys.version_info[:3]))}
    return {"/api/v0/cluster_metadata": (200, {"result": True, "msg": "", "data": found})}


@pytest.mark.parametrize(
    ("pages", "told"),
    [
        (about(ray="2.51.0"), "The cluster runs ray 2.51.0, and the job was submitted with ray 2."),
        (about(python="3.9.1"), "The cluster runs python 3.9, and the job was submitted with"),
        (
            {"/api/v0/cluster_metadata": (403, "Forbidden: Invalid authentication token")},
            "refuses the token it was sent",
        ),
        (
            {"/api/v0/cluster_metadata": (401, "Unauthorized: Missing authentication token")},
            "wants a token, and none was sent",
        ),
        ({"/api/v0/cluster_metadata": (200, "<html>")}, "Is this the dashboard of a Ray"),
        ({"/api/v0/cluster_metadata": (200, {"data": {}})}, "Is this the dashboard of a Ray"),
        ({}, "Is this the dashboard of a Ray"),
        ({"/api/v0/cluster_metadata": (502, "bad gateway")}, "answers with status 502"),
    ],
)
def test_a_cluster_that_does_not_fit_is_refused_before_anything_is_sent(
    head: Callable[[dict[str, Answer]], str],
    tmp_path: Path,
    pages: dict[str, Answer],
    told: str,
) -> None:
    code, said = submit(tmp_path, head(pages))
    assert code == 2
    assert told in said


def test_the_version_refusal_says_that_nothing_was_started(
    head: Callable[[dict[str, Answer]], str], tmp_path: Path
) -> None:
    _, said = submit(tmp_path, head(about(ray="2.51.0")))
    assert "Nothing was started" in said and "requirements.lock" in said


def test_a_folder_of_this_machine_is_refused_for_other_machines(
    head: Callable[[dict[str, Answer]], str], tmp_path: Path
) -> None:
    # As a node is listed that joined a moment ago: its own report is not there yet.
    node = {"raylet": {"state": "ALIVE", "nodeManagerHostname": "elsewhere"}}
    nodes: dict[str, Answer] = {"/nodes?view=summary": (200, {"data": {"summary": [node]}})}
    code, said = submit(tmp_path, head(about() | nodes), "--data.path", "photos")
    assert code == 2
    assert "--data.path photos is a path of this machine" in said


def test_a_server_that_accepts_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, said = submit(tmp_path, address)
    assert code == 2
    assert f"There is no Ray at {address} (no answer in time)" in said


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:82650", "http://HOST:PORT", "http://:8265", "http://[::1:8265"]
)
def test_an_address_with_a_slip_in_it_is_told(tmp_path: Path, address: str) -> None:
    code, said = submit(tmp_path, address)
    assert code == 2
    assert address in said


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = str(tmp_path / "auth_token")
    token = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": file, "RAY_AUTH_MODE": "token"}
    code, said = submit(tmp_path, "http://127.0.0.1:9", **token)
    assert code == 2
    assert file in said and "get-auth-token" in said


def test_a_job_without_a_name_is_not_looked_for(tmp_path: Path) -> None:
    code, said = rayloop(tmp_path, "stop", "", "--address", "http://127.0.0.1:9")
    assert code == 2
    assert "The job's name is empty" in said
