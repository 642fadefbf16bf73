"""Turn a server's name into a running server: its environment, command and wire format."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import Tree
from wire import Wire, request_bytes

HERE = Path(__file__).parent
APPS = HERE / "apps"
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is served."""

    path: str
    """An ONNX file, or `noop`."""

    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One way to serve."""

    peer: str
    """Name of the environment; empty is the project's own."""

    app: str
    """File under apps/."""

    wire: Wire
    how: str
    """The configuration in words, for the result file."""

    form: str = ""
    workers: int = 1
    threads: int = 1
    command: tuple[str, ...] = ("{python}", "{app}")


SERVERS = {
    "rayloop": Server(
        peer="", app="rayloop_app.py", wire="v2",
        how="1 replica, 1 engine thread; HAProxy and throughput mode, batches up to 32, wait 2 ms",
    ),
    "rayloop-registered": Server(
        peer="", app="rayloop_app.py", wire="v2", form="registered",
        how="1 replica, versions from a registry under a traffic plan, no events",
    ),
    "rayloop-2": Server(
        peer="", app="rayloop_app.py", wire="v2", workers=2,
        how="2 replicas, 1 engine thread each",
    ),
    "fastapi": Server(
        peer="fastapi", app="fastapi_app.py", wire="raw", form="inline", workers=2,
        command=("{bin}/uvicorn", "fastapi_app:app", "--host", "127.0.0.1", "--port", "{port}",
                 "--workers", "{workers}", "--log-level", "warning", "--no-access-log"),
        how="uvicorn with uvloop and httptools, 2 workers, engine on the event loop",
    ),
    "fastapi-pool": Server(
        peer="fastapi", app="fastapi_app.py", wire="raw", form="pool", workers=2,
        command=("{bin}/uvicorn", "fastapi_app:app", "--host", "127.0.0.1", "--port", "{port}",
                 "--workers", "{workers}", "--log-level", "warning", "--no-access-log"),
        how="the same with a plain `def` endpoint in FastAPI's thread pool",
    ),
    "litserve": Server(
        peer="litserve", app="litserve_app.py", wire="raw",
        how="1 worker, 1 HTTP process, batches up to 32, wait 2 ms",
    ),
    "litserve-fast": Server(
        peer="litserve", app="litserve_app.py", wire="raw", form="fast",
        how="the same with fast_queue (ZeroMQ)",
    ),
    "litserve-2": Server(
        peer="litserve", app="litserve_app.py", wire="raw", form="single-fast", workers=2,
        how="2 workers, 2 HTTP processes, fast_queue, no batching",
    ),
    "bentoml": Server(
        peer="bentoml", app="bentoml_app.py", wire="raw", workers=2,
        command=("{bin}/bentoml", "serve", "bentoml_app:Classifier", "--host", "127.0.0.1",
                 "--port", "{port}"),
        how="2 workers, raw body as a file, no batching",
    ),
    "bentoml-batch": Server(
        peer="bentoml", app="bentoml_app.py", wire="bento-json", form="batch", workers=2,
        command=("{bin}/bentoml", "serve", "bentoml_app:Classifier", "--host", "127.0.0.1",
                 "--port", "{port}"),
        how="2 workers, JSON arrays, adaptive batching up to 32",
    ),
    "mlserver": Server(
        peer="mlserver", app="mlserver_app.py", wire="v2-base64",
        command=("{bin}/mlserver", "start", "{folder}"),
        how="parallel_workers 0, V2 REST with the image as base64, no batching",
    ),
    "mlserver-batch": Server(
        peer="mlserver", app="mlserver_app.py", wire="v2-json", form="batch",
        command=("{bin}/mlserver", "start", "{folder}"),
        how="parallel_workers 0, V2 REST with JSON numbers, adaptive batching up to 32, wait 2 ms",
    ),
    "ray": Server(
        peer="", app="ray_app.py", wire="raw",
        how="Ray Serve's own proxy and defaults, `@serve.batch` up to 32, wait 2 ms, 1 replica",
    ),
}  # fmt: skip


@dataclass(slots=True)
class Running:
    """A server that answers."""

    name: str
    server: Server
    model: Model
    port: int
    pid: int
    tree: Tree
    start_s: float


@contextmanager
def serving(
    name: str, model: Model, peers: Path, settings: dict[str, object] | None = None
) -> Iterator[Running]:
    """Run a server while the context lasts.

    Args:
        name: Key of `SERVERS`.
        model: What to serve.
        peers: Folder of the peers' environments.
        settings: Changed fields of `ServeConfig`; for rayloop only.
    """
    server, port, tree = SERVERS[name], free_port(), Tree()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    python = Path(sys.executable) if not server.peer else peers / server.peer / "bin" / "python"
    if server.peer == "mlserver":
        write_mlserver_settings(folder, port, server.form == "batch")
    places = {
        "python": python, "bin": python.parent, "app": APPS / server.app, "port": port,
        "workers": server.workers, "folder": folder,
    }  # fmt: skip
    argv = [part.format(**places) for part in server.command]
    start = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            argv, cwd=APPS, env=environment(server, model, port, settings),
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_right(server, model, port, process, folder / "log")
        yield Running(name, server, model, port, process.pid, tree, time.monotonic() - start)
    finally:
        tree.end(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def environment(
    server: Server, model: Model, port: int, settings: dict[str, object] | None
) -> dict[str, str]:
    """What the server's processes see."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    if server.peer:
        kept.pop("PYTHONPATH", None)
    kept.pop("VIRTUAL_ENV", None)
    apps = os.pathsep.join(filter(None, [str(APPS), kept.get("PYTHONPATH", "")]))
    return {
        **kept,
        "PYTHONPATH": apps,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(server.threads),
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENTOML_DO_NOT_TRACK": "1",
        "BENCH_MODEL": model.path,
        "BENCH_SHAPE": ",".join(map(str, model.shape)),
        "BENCH_CLASSES": str(model.classes),
        "BENCH_WORKERS": str(server.workers),
        "BENCH_THREADS": str(server.threads),
        "BENCH_FORM": server.form,
        "BENCH_PORT": str(port),
        "BENCH_SETTINGS": json.dumps(settings or {}),
    }


def write_mlserver_settings(folder: Path, port: int, batch: bool) -> None:
    """MLServer's two configuration files."""
    (folder / "settings.json").write_text(json.dumps({
        "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(),
        "metrics_port": free_port(), "parallel_workers": 0, "debug": False,
        "metrics_endpoint": None,
    }))  # fmt: skip
    batching = {"max_batch_size": 32, "max_batch_time": 0.002} if batch else {}
    (folder / "model-settings.json").write_text(
        json.dumps({"name": "classifier", "implementation": "mlserver_app.Classifier", **batching})
    )


def wait_until_right(
    server: Server, model: Model, port: int, process: subprocess.Popen[bytes], log: Path
) -> None:
    """Wait until three requests in a row are answered with 200, each on a fresh connection.

    Raises:
        RuntimeError: The server ended or is not there in time; with the end of its log.
    """
    body = request_bytes(server.wire, port, model.shape, 1, seed=0)
    until, good, last = time.monotonic() + START_TIMEOUT_S, 0, ""
    while good < 3:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{server.app} did not start ({last}):\n{log.read_text()[-3000:]}")
        try:
            last = ask(port, body)[:300].decode("latin-1")
            good = good + 1 if " 200 " in last.split("\r\n")[0] else 0
            if last[9:12] in ("400", "415", "422", "500"):
                raise RuntimeError(f"{server.app} does not take its request: {last}")
        except OSError as error:
            last, good = str(error), 0
        time.sleep(0.05 if good else 0.3)


def ask(port: int, request: bytes) -> bytes:
    """The whole answer to one request; the connection is closed after it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        link.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        chunks = []
        while chunk := link.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
