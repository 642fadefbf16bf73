"""Have the autoscaler of Ray's launcher take on-demand machines while there are no spot machines.

Neither autoscaler of Ray 2.60 does so by itself: both ask for the same machine again, for as long
as EC2 has none. The first one remembers for half an hour which type could not be started
(AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S) and tells the function that
RAY_AUTOSCALER_UTILIZATION_SCORER names; the second remembers only machines that came up and did
not join.
"""

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer

Score = tuple[bool, bool, int, float, float, bool]


def score(
    node_resources: dict[str, float],
    resources: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> Score | None:
    """How well a machine suits what is asked for; Ray starts the type with the highest.

    Ray's own order stays, inside two of ours: no GPU for what needs none, then types that could be
    started when last tried; and at the end, among equals, spot.

    Args:
        node_resources: What a machine of this type offers.
        resources: What is waited for.
        node_type: Its name in cluster.yaml.
        node_availability_summary: Which types could lately not be started.

    Returns:
        None if it holds nothing of what is waited for.
    """
    usual = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    if usual is None:
        return None
    no_gpu_wasted, *rest = usual
    tried = node_availability_summary.node_availabilities.get(node_type)
    available = tried is None or tried.is_available
    return (no_gpu_wasted, available, *rest, node_type.endswith("_spot"))
