"""What a head tells -> one screen: what runs, what is used, and every failure of the last day."""

from typing import Any

import pytest

from rayloop.cli import cluster_screen
from rayloop.submit.job import Job
from rayloop.submit.overview import NODES, overview

NOW = 1_800_000_000.0


def job(name: str, status: str, began: float, ended: float | None = None, why: str = "") -> Job:
    return Job(name, status, why, command="python jobs/train.py laptop", began=began, ended=ended)


def node(name: str, state: str = "ALIVE", head: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "node_id": name * 8, "node_ip": "10.0.0.1", "is_head_node": head, "state": state,
        "state_message": more.get("message"), "labels": more.get("labels", {}),
        "resources_total": {"CPU": 0.0 if head else 8.0, "GPU": 1.0, "memory": 8 * 2.0**30},
        "start_time_ms": (NOW - 3600) * 1000, "end_time_ms": more.get("ended", 0),
    }  # fmt: skip


class Head:
    address = "http://head:8265"

    def __init__(self) -> None:
        self.listed: list[Job] = []
        self.pages: dict[str, Any] = {
            "/api/cluster_status": {"data": {"clusterStatus": None}},
            NODES: {"data": {"result": {"result": [node("h", head=True)]}}},
            "/api/serve/applications/": {"applications": {}},
        }

    def get(self, path: str) -> dict[str, Any]:
        return self.pages[path]

    def versions(self) -> dict[str, str]:
        return {"python": "3.11.7", "ray": "2.60.0"}

    def jobs(self) -> list[Any]:
        return self.listed


@pytest.fixture
def head() -> Head:
    return Head()


def test_an_idle_cluster_fits_on_the_screen(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    seen = overview(head, NOW)
    assert seen["failures"] == [] and seen["jobs"] == [] and seen["urls"] == []
    cluster_screen.show(seen)
    shown = capsys.readouterr().out
    assert "Ray 2.60.0  http://head:8265  1 nodes" in shown
    assert "no failures in the last day" in shown


def test_nodes_and_resources_count_only_what_lives(head: Head) -> None:
    spot = {"ray.io/market-type": "spot", "ray.io/node-group": "gpu_spot"}
    head.pages[NODES]["data"]["result"]["result"] = [
        node("h", head=True), node("a", labels=spot),
        node("d", "DEAD", message="preempted", ended=(NOW - 90) * 1000),
        node("i", "DEAD", message="Terminated due to idle", ended=(NOW - 80) * 1000),
    ]  # fmt: skip
    head.pages["/api/cluster_status"]["data"]["clusterStatus"] = {
        "loadMetricsReport": {"usage": {"CPU": [3.0, 16.0], "memory": [2.0**31, 2.0**34]}},
        "autoscalerReport": {"pendingLaunches": {"gpu": 2}, "pendingNodes": [["ip", "gpu", "up"]]},
    }
    seen = overview(head, NOW)
    assert [(n["kind"], n["market"]) for n in seen["nodes"]] == [("head", ""), ("gpu_spot", "spot")]
    assert seen["resources"][0] == {"name": "CPU", "used": 3.0, "total": 8.0}
    assert {"name": "memory (GiB)", "used": 2.0, "total": 16.0} in seen["resources"]
    assert seen["pending_nodes"] == 3
    (lost,) = seen["failures"]
    assert (lost["what"], lost["seconds_ago"], lost["message"]) == ("node", 90, "preempted")


def test_a_node_type_that_cannot_be_had_is_a_failure(head: Head) -> None:
    head.pages["/api/cluster_status"]["data"]["clusterStatus"] = {
        "autoscalerReport": {
            "nodeAvailabilitySummary": {
                "nodeAvailabilities": {
                    "gpu_spot": {
                        "isAvailable": False,
                        "lastCheckedTimestamp": NOW - 60,
                        "unavailableNodeInformation": {"description": "no spot capacity"},
                    },
                    "cpu": {"isAvailable": True},
                }
            }
        }
    }
    (failure,) = overview(head, NOW)["failures"]
    assert (failure["name"], failure["message"]) == ("gpu_spot", "no spot capacity")


def test_running_jobs_come_first_and_failures_say_why(head: Head) -> None:
    def at(seconds_ago: float) -> float:
        return NOW - seconds_ago

    why = "Job entrypoint command failed with exit code 2, last logs:\nerror: no such file\n╰───╯\n"
    head.listed = [
        job("yesterday", "FAILED", at(200_000), at(190_000), "old"),
        *(job(f"done-{n}", "SUCCEEDED", at(5000 - n), at(4000 - n)) for n in range(8)),
        job("broken", "FAILED", at(700), at(600), why),
        job("long", "RUNNING", at(900)),
    ]
    seen = overview(head, NOW)
    assert [job["name"] for job in seen["jobs"]][:3] == ["long", "broken", "done-7"]
    assert len(seen["jobs"]) == 6
    assert seen["jobs"][0]["seconds"] == 900
    (failure,) = seen["failures"]
    assert failure["message"] == "error: no such file"
    assert failure["seconds_ago"] == 600


@pytest.mark.parametrize("running", [0, 1, 6, 9])
def test_every_running_job_is_shown(head: Head, running: int) -> None:
    head.listed = [job(f"e{n}", "STOPPED", n, n + 1) for n in range(9)]
    head.listed += [job(f"r{n}", "PENDING", n + 20) for n in range(running)]
    names = [job["name"] for job in overview(head, NOW)["jobs"]]
    assert len(names) == max(6, running)
    assert sum(name.startswith("r") for name in names) == running


def test_serving_and_what_is_unwell(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    replicas = [{"state": "RUNNING", "node_id": "a"}, {"state": "STARTING", "node_id": "b"}]
    head.pages["/api/serve/applications/"] = {
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "proxies": {"a": {"node_ip": "10.0.0.2"}, "b": {"node_ip": "fd00::1"}},
        "applications": {
            "rayloop": {
                "status": "RUNNING", "route_prefix": "/", "message": "",
                "deployments": {"Classifier": {
                    "name": "Classifier", "status": "UNHEALTHY", "message": "no [room]",
                    "target_num_replicas": 3, "replicas": replicas,
                }},
            },
            "other": {"status": "DEPLOY_FAILED", "message": "no module x", "deployments": {}},
        },
    }  # fmt: skip
    seen = overview(head, NOW)
    (app,) = seen["apps"]
    assert (app["replicas"], app["wanted"], app["nodes"]) == (1, 3, 2)
    assert seen["urls"] == ["http://10.0.0.2:8000", "http://[fd00::1]:8000"]
    assert {failure["message"] for failure in seen["failures"]} == {"no [room]", "no module x"}
    cluster_screen.show(seen)
    assert "no [room]" in capsys.readouterr().out


def test_times_are_said_in_the_unit_that_fits() -> None:
    told = [cluster_screen.duration(seconds) for seconds in (3, 300, 10_000, 500_000)]
    assert told == ["3 s", "5 min", "2.8 h", "5.8 d"]
