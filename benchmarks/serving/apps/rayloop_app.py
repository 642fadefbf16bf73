"""Our own server, started as `make serve` does, around the file or an engine that does nothing."""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np

from rayloop import cluster, haproxy
from rayloop.config import ClusterConfig, EventsConfig, ServeConfig


def load_file(path: str, shape: tuple[int, int, int], classes: int, config: ServeConfig):
    """The service around one ONNX file; `noop` is an engine that makes zeros."""
    from rayloop.serve.assemble import make_service
    from rayloop.serve.engine import OnnxEngine, warm_up_sizes
    from rayloop.serve.protocol.spec import ModelSpec

    if path == "noop":
        engine = NoEngine(classes)
    else:
        engine = OnnxEngine(Path(path).read_bytes(), config.cpus_per_replica)
        engine.warm(warm_up_sizes(config.max_batch_rows))
    names = tuple(str(index) for index in range(classes))
    spec = ModelSpec(model="classifier", version="1", shape=shape, class_names=names)
    return make_service(engine, spec, config)


class NoEngine:
    """Zeros of the right shape."""

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Zeros [N, K]."""
        return np.zeros((len(images), self._classes), np.float32)

    def warm(self, batch_sizes: object) -> None:
        """Nothing to warm."""


def main() -> None:
    """Serve until SIGTERM."""
    env = os.environ
    shape = tuple(int(size) for size in env["BENCH_SHAPE"].split(","))
    workers = int(env["BENCH_WORKERS"])
    settings = {
        "http_port": int(env["BENCH_PORT"]), "grpc_port": 0,
        "min_replicas": workers, "max_replicas": workers,
        "cpus_per_replica": int(env["BENCH_THREADS"]), "haproxy": env["BENCH_FORM"] != "plain",
        **json.loads(env.get("BENCH_SETTINGS", "{}")),
    }  # fmt: skip
    config = ServeConfig(**settings)
    if env["BENCH_FORM"] == "registered":
        serve_registered(config, env["BENCH_HOME"])
        return
    load = functools.partial(load_file, env["BENCH_MODEL"], shape, int(env["BENCH_CLASSES"]))
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(), extra):
        from rayloop.serve import app, run

        with run.running(app.application(config, load), config.host, run.choose_port(config)):
            wait_for_the_end()


def serve_registered(config: ServeConfig, home: str) -> None:
    """What a registry holds, under its traffic plan."""
    load = functools.partial(load_registered, home)
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(), extra):
        from rayloop.serve import app, run

        with run.running(app.application(config, load), config.host, run.choose_port(config)):
            wait_for_the_end()


def load_registered(home: str, config: ServeConfig):
    """The service of a root, which makes events as long as the root holds a file `on`."""
    from rayloop.serve.load import load_service
    from rayloop.storage import Storage

    service = load_service(Storage(home), "classifier", config, EventsConfig())
    memory = service.memory

    def switch() -> None:
        while True:
            service.memory = memory if (Path(home) / "on").exists() else None
            time.sleep(0.05)

    threading.Thread(target=switch, daemon=True).start()
    return service


def wait_for_the_end() -> None:
    """Until SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


if __name__ == "__main__":
    main()
