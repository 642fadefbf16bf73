"""Two instances on one machine get files and ports of their own."""

import os
import socket
from pathlib import Path

import pytest

from rayloop import haproxy
from rayloop.config import ServeConfig
from rayloop.errors import ConfigError, DoesNotFit
from rayloop.ports import QUIET_PORTS, free_port, port_is_free


def test_every_file_is_in_the_folder_and_every_port_in_one_free_window(monkeypatch) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: True)
    first = haproxy.environment(Path("/scratch/a"), ServeConfig())
    assert first["RAY_SERVE_ENABLE_HA_PROXY"] == first["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    files = [name for name, value in first.items() if "/" in value]
    assert len(files) == 6
    assert all(first[name].startswith("/scratch/a") for name in files)
    ports = [int(value) for name, value in first.items() if name.endswith("_PORT")]
    assert len(ports) == len(set(ports)) == 8
    assert max(ports) - min(ports) < haproxy.PORTS_PER_INSTANCE
    assert haproxy.FIRST_PORT <= min(ports) <= max(ports) < haproxy.LAST_PORT


def test_a_window_in_use_is_stepped_over() -> None:
    base = haproxy.free_window()
    with socket.socket() as taken:
        taken.bind(("", base + 1))
        taken.listen()
        assert not port_is_free("", base + 1)
        other = haproxy.free_window()
    assert abs(other - base) >= haproxy.PORTS_PER_INSTANCE


def test_the_port_that_is_wanted_is_given_where_nobody_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) in QUIET_PORTS
    assert free_port("127.0.0.1", port) == port


def test_no_window_left_is_said(monkeypatch) -> None:
    monkeypatch.setattr(haproxy, "port_is_free", lambda host, port: False)
    with pytest.raises(DoesNotFit, match="no-haproxy"):
        haproxy.free_window()


def test_a_folder_too_long_for_sockets_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: True)
    with pytest.raises(ConfigError, match="TMPDIR"):
        haproxy.environment(Path("/" + "x" * haproxy.LONGEST_FOLDER), ServeConfig())


def test_without_haproxy_the_plain_environment_takes_over_with_one_warning(
    monkeypatch, caplog
) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: False)
    with caplog.at_level("WARNING", "rayloop.serve"):
        assert haproxy.environment(Path("/scratch/a"), ServeConfig()) == haproxy.plain_environment()
    assert len(caplog.records) == 1
    assert haproxy.plain_environment()["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_the_scratch_folder_lives_as_long_as_the_context(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: True)
    monkeypatch.setattr(haproxy, "LONGEST_FOLDER", 200)
    monkeypatch.setattr(haproxy.tempfile, "tempdir", str(tmp_path))
    with haproxy.ingress(ServeConfig()) as variables:
        folder = Path(variables["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
        assert folder.parent == tmp_path
        assert folder.is_dir()
    assert not folder.exists()
    with haproxy.ingress(ServeConfig(haproxy=False)) as variables:
        assert variables == haproxy.plain_environment()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("variables", [haproxy.plain_environment(), haproxy._throughput()])
def test_a_proxy_may_take_as_long_to_start_as_its_client_waits(variables) -> None:
    from ray.serve._private.constants import HTTP_PROXY_TIMEOUT

    assert float(variables["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= HTTP_PROXY_TIMEOUT
