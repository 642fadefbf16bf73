"""Debian's Prometheus reads the page, and evaluates every query of the dashboard and every rule."""

import json
import math
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayloop.metrics import METRICS
from rayloop.serve.exposition import CONTENT_TYPE, exposition
from rayloop.serve.status import quantile_ms
from tests.cluster.debian_prometheus import MONITORING, prometheus_programs, promtool
from tests.cluster.servers import free_ports
from tests.unit.serve_snapshots import busy

ALERTS = MONITORING / "alerts.yaml"
PANELS = json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]

HAPROXY = """\
haproxy_backend_http_responses_total{{proxy="http_app",code="4xx"}} {four}
haproxy_server_http_responses_total{{proxy="http_app",server="one",code="4xx"}} {one}
haproxy_backend_current_queue{{proxy="http_app"}} 2
"""
"""What HAProxy 2.8 says of itself after it refused three requests out of four, in short."""


@pytest.fixture(scope="module")
def programs(request) -> dict[str, str]:
    return prometheus_programs(request.config.cache)


@pytest.mark.parametrize("words", [("rules", "alerts.yaml"), ("config", "prometheus.yml")])
def test_promtool_accepts_the_files(words, programs) -> None:
    code, said = promtool(programs, "check", words[0], MONITORING / words[1])
    assert code == 0, said
    assert "SUCCESS: 12 rules found" in said


def test_promtool_reads_the_page(programs) -> None:
    """It finds fault only with the names that are not ours to choose, and with `ms` in two."""
    code, said = promtool(programs, "check", "metrics", page=exposition([busy("a"), busy("b")]))
    ours = [line for line in said.splitlines() if not line.startswith("nv_inference_")]
    assert ours == [
        f"rayloop_{name}_latency_ms metric names should not contain abbreviated units"
        for name in ("request", "shadow")
    ], (code, said)
    assert promtool(programs, "check", "metrics", page=b"a{ 1\n")[0] != 0


class Pages(BaseHTTPRequestHandler):
    """Two replicas that have done more each time they are asked, and HAProxy before them."""

    turns = count(1)

    def do_GET(self) -> None:
        turn = next(Pages.turns)
        if self.path == "/metrics":
            body = exposition([busy("one", turn), busy("two", 2 * turn)])
        else:
            body = HAPROXY.format(four=4 * turn, one=turn).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE.decode())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def pages() -> Iterator[int]:
    """The port under which the pages are."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Api:
    """Prometheus's own, in a process; once it has seen enough, it is asked about that moment."""

    def __init__(self, port: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.root, self._log, self._process = f"http://127.0.0.1:{port}", log, process
        self.moment = 0.0

    def ask(self, path: str, **parameters: object) -> Any:
        """The data of an answer.

        Raises:
            AssertionError: Prometheus ended, or says that something is wrong.
        """
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        url = f"{self.root}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        assert document["status"] == "success", document
        assert not document.get("warnings"), document
        return document["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression."""
        return self.ask("/api/v1/query", query=expression, time=self.moment)["result"]

    def is_up(self) -> bool:
        """Whether it answers by now."""
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.root}/-/ready", timeout=30) as answer:
                return answer.status == 200
        except OSError:
            return False

    def saw_enough(self) -> bool:
        """Whether this is a moment to ask about."""
        self.moment = time.time()
        return bool(self.query(ENOUGH))


ENOUGH = " and ".join(
    (
        "min(count_over_time(rayloop_ready[1m])) >= 5",
        "min(count_over_time(haproxy_backend_current_queue[1m])) >= 5",
        'count(ALERTS{alertname="RayloopEventsDropped"})',
        "count(up == 1) == 2",
        "count(rayloop_ready)",
    )
)


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask until it is so; at most three minutes."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def prometheus(programs, pages, tmp_path_factory) -> Iterator[Api]:
    """Prometheus with the files of docs/monitoring, which has scraped the pages some times."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(ALERTS)]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{pages}"]}]
    config["scrape_configs"][1]["metrics_path"] = "/haproxy"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                programs["prometheus"],
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            api = Api(port, folder / "log", process)
            wait_until(api.is_up)
            wait_until(api.saw_enough)
            yield api
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_prometheus_scrapes_every_metric(prometheus) -> None:
    assert {sample["value"][1] for sample in prometheus.query("up")} == {"1"}
    found = {sample["metric"]["__name__"] for sample in prometheus.query('{job="rayloop"}')}
    assert {series for metric in METRICS for series in metric.series} <= found
    kinds = prometheus.ask("/api/v1/metadata")
    for metric in METRICS:
        assert kinds[metric.name] == [{"type": metric.kind, "help": metric.help, "unit": ""}]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_query_of_the_dashboard_finds_something(expression, prometheus) -> None:
    for variable, text in (("$__rate_interval", "1m"), ("$model", ".*")):
        expression = expression.replace(variable, text)
    found = prometheus.query(expression)
    assert found
    values = [float(sample["value"][1]) for sample in found]
    assert all(math.isfinite(number) for number in values), found


def test_a_quantile_is_the_one_that_status_prints(prometheus) -> None:
    for share in (0.01, 0.5, 0.9, 0.99):
        (sample,) = prometheus.query(
            f"histogram_quantile({share}, sum by (le) "
            '(rayloop_request_latency_ms_bucket{variant="champion", replica="one"}))'
        )
        latency = busy()["variants"][0]["latency"]
        assert float(sample["value"][1]) == pytest.approx(
            quantile_ms(latency["counts"], share), abs=1e-3
        )


def test_the_pictures_say_what_happened(prometheus) -> None:
    titles = {panel["title"]: panel for panel in PANELS}

    def shown(title: str, place: int = 0) -> dict[str, float]:
        expression = titles[title]["targets"][place]["expr"]
        found = prometheus.query(
            expression.replace("$__rate_interval", "1m").replace("$model", "classifier")
        )
        return {sample["metric"].get("variant", ""): float(sample["value"][1]) for sample in found}

    split = shown("Live split, measured")
    assert split["champion"] == pytest.approx(80 / 90)
    assert split["challenger"] == pytest.approx(10 / 90)
    assert split["version-11"] == pytest.approx(0.0)
    assert shown("Error share")["champion"] == pytest.approx(10 / 100)
    assert shown("Agreement with the live version")[""] == pytest.approx(0.98)
    (refused,) = prometheus.query(
        f"({titles['Shed']['targets'][2]['expr'].replace('$__rate_interval', '1m')})"
        " / sum (rate(haproxy_server_http_responses_total[1m]))"
    )
    assert float(refused["value"][1]) == pytest.approx(3.0)


def test_prometheus_evaluates_every_rule(prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.ask("/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: "unknown" not in {rule["health"] for rule in rules()})
    assert {rule["health"] for rule in rules()} == {"ok"}, rules()
    written = yaml.safe_load(ALERTS.read_text())["groups"]
    assert {rule["name"] for rule in rules()} == {r["alert"] for g in written for r in g["rules"]}
    firing = {
        alert["metric"]["alertname"] for alert in prometheus.query('ALERTS{alertstate="firing"}')
    }
    assert "RayloopEventsDropped" in firing
    assert "RayloopNoReplicaReady" not in firing
