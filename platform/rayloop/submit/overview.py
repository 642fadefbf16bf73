"""The pages of a head's dashboard -> one screen: nodes, resources, jobs, serving, what failed."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from rayloop.errors import RayloopError
from rayloop.submit.job import RUNNING, Job

Document = dict[str, Any]

RECENT_S = 24 * 3600.0
"""A failure older than that is no news."""

SHOWN_JOBS = 6
NODES = "/api/v0/nodes?detail=true&limit=10000"
"""Ray's own limit is 100 of those that live or lived, in no order; this is the most it allows."""

LONGEST = 160
"""Letters of a message on the screen."""

HEALTHY = ("RUNNING", "HEALTHY", "DEPLOYING", "UPDATING", "UPSCALING", "DOWNSCALING")


class Pages(Protocol):
    """A head that answers."""

    address: str

    def get(self, path: str) -> Document:
        """One page."""

    def versions(self) -> dict[str, str]:
        """Of its Python and Ray."""

    def jobs(self) -> list[Job]:
        """Its submitted jobs, oldest first."""


def overview(cluster: Pages, now: float) -> Document:
    """Look at a cluster.

    Args:
        cluster: Its head.
        now: Seconds since the epoch.

    Returns:
        `ray` (address and versions), `resources` (used and total), `nodes`, `jobs` (those that run
        and the newest others), `apps`, `failures` (newest first), all of the last day.
    """
    status = cluster.get("/api/cluster_status")["data"]["clusterStatus"] or {}
    found = cluster.get(NODES)["data"]["result"]["result"]
    serving: Document = {}
    with contextlib.suppress(RayloopError):  # where Serve never ran, some versions have no page
        serving = cluster.get("/api/serve/applications/")
    jobs = cluster.jobs()
    usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
    nodes = [_node(one, now) for one in found]
    return {
        "ray": {"address": cluster.address, **cluster.versions()},
        "resources": _resources(usage, [one for one in found if one["state"] == "ALIVE"]),
        "nodes": [node for node in nodes if node["state"] == "ALIVE"],
        "pending_nodes": _pending(status),
        "jobs": [_job(job, now) for job in _shown(jobs)],
        "apps": _apps(serving),
        "urls": _urls(serving),
        "failures": sorted(
            (
                failure
                for failure in (
                    *_failed_jobs(jobs, now),
                    *_lost_nodes(found, now),
                    *_failed_launches(status, now),
                    *_unhealthy(serving),
                )
                if failure["seconds_ago"] is None or failure["seconds_ago"] <= RECENT_S
            ),
            key=lambda failure: failure["seconds_ago"] or 0.0,
        ),
    }


def _resources(usage: Mapping[str, Any], alive: list[Document]) -> list[Document]:
    """Used and total of what nodes offer; the totals of nodes where nothing was ever used."""
    names = {"CPU": 1.0, "GPU": 1.0, "memory": 2**30, "object_store_memory": 2**30}
    rows = []
    for name, unit in names.items():
        total = sum(node["resources_total"].get(name, 0.0) for node in alive)
        used = float((usage.get(name) or [0.0])[0])
        if total:
            shown = name if unit == 1.0 else f"{name} (GiB)"
            rows.append(
                {"name": shown, "used": round(used / unit, 2), "total": round(total / unit, 2)}
            )
    return rows


def _node(one: Document, now: float) -> Document:
    resources, labels = one["resources_total"], one.get("labels") or {}
    return {
        "node": one["node_id"][:8],
        "ip": one["node_ip"],
        "kind": "head" if one["is_head_node"] else labels.get("ray.io/node-group", "worker"),
        "market": labels.get("ray.io/market-type", ""),
        "state": one["state"],
        "CPU": resources.get("CPU", 0.0),
        "GPU": resources.get("GPU", 0.0),
        "memory_gib": round(resources.get("memory", 0.0) / 2**30, 1),
        "up_s": round(max(0.0, now - one["start_time_ms"] / 1000)),
    }


def _pending(status: Document) -> int:
    report = status.get("autoscalerReport") or {}
    launches = sum((report.get("pendingLaunches") or {}).values())
    return int(launches + len(report.get("pendingNodes") or []))


def _shown(jobs: list[Job]) -> list[Job]:
    running = [job for job in jobs if job.status in RUNNING]
    others = [job for job in jobs if job not in running]
    return [*running, *reversed(others[-max(0, SHOWN_JOBS - len(running)) or len(others) :])][
        : max(SHOWN_JOBS, len(running))
    ]


def _job(job: Job, now: float) -> Document:
    end = job.ended or now
    return {
        "name": job.name,
        "status": job.status,
        "seconds": round(end - job.began) if job.began else 0,
        "command": job.command,
    }


def _apps(serving: Document) -> list[Document]:
    rows = []
    for name, app in (serving.get("applications") or {}).items():
        for deployment in app.get("deployments", {}).values():
            replicas = deployment.get("replicas", [])
            rows.append(
                {
                    "app": name,
                    "status": app["status"],
                    "route": app.get("route_prefix") or "",
                    "deployment": deployment["name"],
                    "replicas": sum(replica["state"] == "RUNNING" for replica in replicas),
                    "wanted": deployment.get("target_num_replicas", len(replicas)),
                    "nodes": len({replica.get("node_id") for replica in replicas}),
                }
            )
    return rows


def _urls(serving: Document) -> list[str]:
    """Where the nodes' proxies answer requests."""
    options = serving.get("http_options") or {}
    port = options.get("port")
    addresses = {proxy.get("node_ip") for proxy in (serving.get("proxies") or {}).values()}
    if options.get("host") in ("127.0.0.1", "localhost") and addresses:
        addresses = {"127.0.0.1"}
    hosts = [f"[{one}]" if ":" in one else one for one in sorted(filter(None, addresses))]
    return [f"http://{host}:{port}" for host in hosts if port]


def _failed_jobs(jobs: list[Job], now: float) -> list[Document]:
    return [
        _failure("job", job.name, job.message, now - job.ended if job.ended else None)
        for job in jobs
        if job.status == "FAILED"
    ]


def _lost_nodes(nodes: list[Document], now: float) -> list[Document]:
    return [
        _failure(
            "node", f"{one['node_id'][:8]} ({one['node_ip']})",
            one.get("state_message") or "it is dead", _ago(one.get("end_time_ms"), now),
        )
        for one in nodes
        if one["state"] != "ALIVE" and not _was_let_go(one.get("state_message") or "")
    ]  # fmt: skip


def _was_let_go(message: str) -> bool:
    """Whether a node went as it should: an autoscaler's idle ones do every day."""
    return "idle" in message.lower() or "Expected termination" in message


def _failed_launches(status: Document, now: float) -> list[Document]:
    report = status.get("autoscalerReport") or {}
    availability = (report.get("nodeAvailabilitySummary") or {}).get("nodeAvailabilities") or {}
    return [
        _failure(
            "launch", kind,
            str((record.get("unavailableNodeInformation") or {}).get("description", "no capacity")),
            now - record["lastCheckedTimestamp"] if record.get("lastCheckedTimestamp") else None,
        )
        for kind, record in availability.items()
        if not record.get("isAvailable", True)
    ]  # fmt: skip


def _unhealthy(serving: Document) -> list[Document]:
    found = []
    for name, app in (serving.get("applications") or {}).items():
        if app["status"] not in HEALTHY:
            found.append(_failure("app", name, app.get("message") or app["status"], None))
        for deployment in app.get("deployments", {}).values():
            if deployment["status"] not in HEALTHY:
                told = deployment.get("message") or deployment["status"]
                found.append(_failure("deployment", f"{name}/{deployment['name']}", told, None))
    return found


def _failure(kind: str, name: str, message: str, seconds_ago: float | None) -> Document:
    """A row of the last table; None seconds is now."""
    own = re.findall(r"rayloop\.errors\.\w+: (.+)", message)
    lines = [line.strip("│ ") for line in (own[-1:] or message.splitlines())]
    lines = [line for line in lines if any(letter.isalnum() for letter in line)]
    errors = [line for line in lines if line.startswith("error: ")]
    text = (errors or lines)[-1] if kind == "job" and lines else " ".join(lines)
    return {
        "what": kind,
        "name": name,
        "seconds_ago": None if seconds_ago is None else round(max(0.0, seconds_ago)),
        "message": text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...",
    }


def _ago(milliseconds: float | None, now: float) -> float | None:
    return now - milliseconds / 1000 if milliseconds else None
