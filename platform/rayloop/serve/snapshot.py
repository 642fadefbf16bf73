"""Turn the state of one replica into plain values, for metrics and for `rayloop status`."""

import os
from dataclasses import asdict
from typing import Any

from rayloop.serve.body import REFUSED
from rayloop.serve.ongoing import GRPC, HTTP
from rayloop.serve.service import ModelService
from rayloop.serve.shadow.shadow import Shadow
from rayloop.serve.traffic.follow import PlanFollower
from rayloop.serve.traffic.plan import TrafficPlan

Document = dict[str, Any]


def snapshot(service: ModelService, follower: PlanFollower, replica: str) -> Document:
    """Everything a replica knows about itself; counts go from its start.

    Args:
        service: Its versions.
        follower: Its plan.
        replica: Its name.
    """
    opinion = service.second_opinion
    return {
        "replica": replica,
        "pid": os.getpid(),
        "model": service.spec.model,
        "ready": service.ready,
        "ongoing": HTTP.count + GRPC.count,
        "refused": dict(REFUSED),
        "plan": service.plan.number,
        "refused_plan": follower.refused,
        "refused_reason": follower.reason,
        "variants": _variants(service),
        "versions": [_version(service, version) for version in service.versions],
        "shadows": [_shadow(shadow) for shadow in service.shadows.values()],
        "fallback": {"capped_rows": opinion.capped, "failed_rows": opinion.failed},
        "events": service.memory.counts() if service.memory else {},
    }


def _variants(service: ModelService) -> list[Document]:
    """Planned ones, asked or not, and whatever else was asked."""
    planned = {(v.name, v.version): v.share for v in service.plan.variants}
    keys = [*planned, *(key for key in service.counts if key not in planned)]
    return [
        {
            "variant": name,
            "version": version,
            "share": planned.get((name, version), 0.0),
            "planned": (name, version) in planned,
            **_counted(service, name, version),
        }
        for name, version in keys
    ]


def _counted(service: ModelService, name: str, version: str) -> Document:
    counts = service.counts_of(name, version)
    return {
        "answered": sum(counts.latency.counts),
        "forced": counts.forced,
        "failures": dict(counts.failures),
        "decisions": dict(counts.decisions),
        "latency": asdict(counts.latency),
    }


def _version(service: ModelService, version: str) -> Document:
    batcher = service.find(version).batcher
    return {
        "version": version,
        "role": _role(service.plan, version),
        "pending_rows": batcher.queued_rows,
        "pending_requests": batcher.queued_requests,
        "statistics": batcher.statistics.to_json(service.spec.model, version),
        "counts": asdict(batcher.counts),
    }


def _role(plan: TrafficPlan, version: str) -> str:
    """What a loaded version is there for."""
    if any(variant.version == version for variant in plan.variants):
        return "live"
    return "fallback" if version == plan.low_confidence.fallback else "kept"


def _shadow(shadow: Shadow) -> Document:
    return {"version": shadow.version, "pending_rows": shadow.pending_rows, **asdict(shadow.counts)}
