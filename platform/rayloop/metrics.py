"""Turn every number that can be watched into one name, with its meaning, unit, labels and buckets.

A name is Triton's wherever Triton counts the same thing, so that its dashboards and tools work.
Counters go from the start of a replica; one that is started again has a new name in `replica`.
`docs/monitoring/` is written against these names.
"""

from dataclasses import dataclass
from typing import Literal

LATENCY_BUCKETS_MS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 10000.0)
"""Upper limits of latency histograms."""

BATCH_BUCKETS_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper limits of the histogram of batch sizes."""

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's names: no room or no time left; the client left; the engine raised; anything else."""

REFUSALS = ("400", "413", "429")
"""HTTP statuses of requests that are refused before anything of them is decoded."""

REPLICA = ("replica", "model")
VERSION = (*REPLICA, "version")
VARIANT = (*VERSION, "variant")
"""The version and variant that a request was given to, also where another version helped out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One name and what stands behind it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]

    help: str
    """What it counts, with its unit."""

    labels: tuple[str, ...]

    buckets: tuple[float, ...] = ()
    """Upper limits, without infinity; of histograms only."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a query finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))


def _counter(name: str, help: str, labels: tuple[str, ...]) -> Metric:
    return Metric(name=name, kind="counter", help=help, labels=labels)


def _gauge(name: str, help: str, labels: tuple[str, ...]) -> Metric:
    return Metric(name=name, kind="gauge", help=help, labels=labels)


def _histogram(
    name: str, help: str, labels: tuple[str, ...], buckets: tuple[float, ...] = LATENCY_BUCKETS_MS
) -> Metric:
    return Metric(name=name, kind="histogram", help=help, labels=labels, buckets=buckets)


SUCCESS = _counter("nv_inference_request_success", "Requests that were answered.", VARIANT)
FAILURE = _counter(
    "nv_inference_request_failure",
    "Requests that a version was given and that got no answer, by reason.",
    (*VARIANT, "reason"),
)
ROWS = _counter("nv_inference_count", "Rows that the engine answered.", VERSION)
EXECUTIONS = _counter("nv_inference_exec_count", "Engine calls.", VERSION)
REQUEST_US = _counter(
    "nv_inference_request_duration_us", "Microseconds from arrival to answer, summed.", VERSION
)
QUEUE_US = _counter(
    "nv_inference_queue_duration_us", "Microseconds that requests waited, summed.", VERSION
)
INPUT_US = _counter(
    "nv_inference_compute_input_duration_us",
    "Microseconds in which batches were put together, summed over their requests.",
    VERSION,
)
INFER_US = _counter(
    "nv_inference_compute_infer_duration_us",
    "Microseconds in the engine, summed over the requests of each batch.",
    VERSION,
)
OUTPUT_US = _counter(
    "nv_inference_compute_output_duration_us",
    "Microseconds in which answers were taken apart, summed over the requests of each batch.",
    VERSION,
)
PENDING_REQUESTS = _gauge(
    "nv_inference_pending_request_count", "Requests that wait for the engine.", VERSION
)

LATENCY = _histogram(
    "rayloop_request_latency_ms",
    "Milliseconds from a request's arrival in the replica to its answer.",
    VARIANT,
)
DECISIONS = _counter(
    "rayloop_decisions_total", "Answered rows, by what to do with them.", (*VARIANT, "decision")
)
FORCED = _counter(
    "rayloop_forced_requests_total",
    "Answered requests whose client chose the variant or version.",
    VARIANT,
)
SHARE = _gauge(
    "rayloop_traffic_share", "Share (0 to 1) of the units that the plan gives a variant.", VARIANT
)
PLAN = _gauge("rayloop_traffic_plan", "Number of the traffic plan in force.", REPLICA)
PLAN_REFUSED = _gauge(
    "rayloop_traffic_plan_refused",
    "Number of the newer traffic plan that cannot be put in force; 0 for none.",
    REPLICA,
)

BATCH_ROWS = _histogram(
    "rayloop_batch_rows", "Rows in an engine call.", VERSION, BATCH_BUCKETS_ROWS
)
PENDING_ROWS = _gauge("rayloop_pending_rows", "Rows that wait for the engine.", VERSION)
EXPIRED = _counter(
    "rayloop_expired_requests_total", "Requests whose time ran out in the queue.", VERSION
)
CANCELLED = _counter(
    "rayloop_cancelled_requests_total", "Requests whose client left before the answer.", VERSION
)
RETRIED = _counter(
    "rayloop_retried_requests_total",
    "Engine calls that raised and were made again, each request alone.",
    VERSION,
)
LOADED = _gauge(
    "rayloop_version_loaded",
    "1 for a loaded version; its role is live, fallback or kept.",
    (*VERSION, "role"),
)

CAPPED = _counter(
    "rayloop_fallback_capped_rows_total",
    "Doubtful rows that did not fall back since too many did; counted from the last plan.",
    REPLICA,
)
FALLBACK_FAILED = _counter(
    "rayloop_fallback_failed_rows_total",
    "Doubtful rows that the fallback version did not answer; counted from the last plan.",
    REPLICA,
)

COMPARED = _counter(
    "rayloop_shadow_compared_rows_total", "Rows that a shadow and a live version answered.", VERSION
)
AGREED = _counter(
    "rayloop_shadow_agreed_rows_total", "Compared rows that got the same class.", VERSION
)
SHADOW_DROPPED = _counter(
    "rayloop_shadow_dropped_rows_total", "Rows that the shadow had no time for.", VERSION
)
SHADOW_FAILED = _counter(
    "rayloop_shadow_failed_rows_total", "Rows lost with the shadow's process.", VERSION
)
NOT_FINITE = _counter(
    "rayloop_shadow_not_finite_rows_total", "Rows answered with NaN or infinity.", VERSION
)
SHADOW_RESTARTS = _counter(
    "rayloop_shadow_restarts_total", "Times the shadow's process was lost.", VERSION
)
SHADOW_PENDING = _gauge("rayloop_shadow_pending_rows", "Rows that wait for the shadow.", VERSION)
DIFFERENCE = _gauge(
    "rayloop_shadow_largest_difference",
    "Largest difference (0 to 1) of a probability from the live one, so far.",
    VERSION,
)
SHADOW_LATENCY = _histogram(
    "rayloop_shadow_latency_ms",
    "Milliseconds of a shadow's batch, without its time in the queue.",
    VERSION,
)

EVENTS_WRITTEN = _counter(
    "rayloop_events_written_rows_total", "Rows of prediction events in files.", REPLICA
)
EVENTS_DROPPED = _counter(
    "rayloop_events_dropped_rows_total", "Rows of prediction events that are lost.", REPLICA
)
EVENTS_PENDING = _gauge(
    "rayloop_events_pending_rows", "Rows of prediction events in no file yet.", REPLICA
)
EVENTS_FAILED_WRITES = _counter(
    "rayloop_events_failed_writes_total",
    "Writes of event files that storage refused; they are tried again.",
    REPLICA,
)

REFUSED = _counter(
    "rayloop_refused_requests_total",
    "Requests that the replica refused before any version was given them, by HTTP status.",
    (*REPLICA, "status"),
)
ONGOING = _gauge("rayloop_ongoing_requests", "Requests under way in the replica.", REPLICA)
READY = _gauge(
    "rayloop_ready", "1 if all variants with a share of the traffic are loaded, else 0.", REPLICA
)
REPLICAS = _gauge("rayloop_replicas", "Replicas that this page tells of.", ("model",))

METRICS = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of this file."""
