"""Turn snapshots of replicas into the page that Prometheus reads."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, get_args

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UntypedMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rayloop import metrics
from rayloop.metrics import METRICS, Metric
from rayloop.serve.events.event import Verdict

Document = dict[str, Any]
Labels = tuple[str, ...]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4.encode()
"""Of the page, for the header of that name."""

SPANS = {
    metrics.REQUEST_US: "success",
    metrics.QUEUE_US: "queue",
    metrics.INPUT_US: "compute_input",
    metrics.INFER_US: "compute_infer",
    metrics.OUTPUT_US: "compute_output",
}
SHADOW_ROWS = {
    metrics.COMPARED: "compared",
    metrics.AGREED: "agreed",
    metrics.SHADOW_DROPPED: "dropped",
    metrics.SHADOW_FAILED: "failed",
    metrics.NOT_FINITE: "not_finite",
    metrics.SHADOW_RESTARTS: "restarts",
    metrics.SHADOW_PENDING: "pending_rows",
    metrics.DIFFERENCE: "largest_difference",
}
EVENTS = {
    metrics.EVENTS_WRITTEN: "written_rows",
    metrics.EVENTS_DROPPED: "dropped_rows",
    metrics.EVENTS_PENDING: "pending_rows",
    metrics.EVENTS_FAILED_WRITES: "failed_writes",
}


def exposition(snapshots: Iterable[Document]) -> bytes:
    """The metrics of all replicas in Prometheus's text format, version 0.0.4.

    Args:
        snapshots: What `rayloop.serve.snapshot` gave, one of each replica; of two of the same
            replica the later one counts.
    """
    page = _Page()
    replicas = {snapshot["replica"]: snapshot for snapshot in snapshots}
    for replica, snapshot in replicas.items():
        whose = (replica, snapshot["model"])
        _put_replica(page, whose, snapshot)
        for variant in snapshot["variants"]:
            _put_variant(page, (*whose, variant["version"], variant["variant"]), variant)
        for version in snapshot["versions"]:
            _put_version(page, (*whose, version["version"]), version)
        for shadow in snapshot["shadows"]:
            _put_shadow(page, (*whose, shadow["version"]), shadow)
    for model, count in Counter(s["model"] for s in replicas.values()).items():
        page.put(metrics.REPLICAS, (model,), count)
    return page.text()


def _put_replica(page: "_Page", whose: Labels, snapshot: Document) -> None:
    page.put(metrics.READY, whose, snapshot["ready"])
    page.put(metrics.ONGOING, whose, snapshot["ongoing"])
    page.put(metrics.PLAN, whose, snapshot["plan"])
    page.put(metrics.PLAN_REFUSED, whose, snapshot["refused_plan"])
    page.put(metrics.CAPPED, whose, snapshot["fallback"]["capped_rows"])
    page.put(metrics.FALLBACK_FAILED, whose, snapshot["fallback"]["failed_rows"])
    page.put_known(EVENTS, whose, snapshot["events"])
    if "refused" in snapshot:
        refused = {str(status): count for status, count in snapshot["refused"].items()}
        for status, count in _with_zeros(metrics.REFUSALS, refused):
            page.put(metrics.REFUSED, (*whose, status), count)


def _put_variant(page: "_Page", whose: Labels, variant: Document) -> None:
    """Reasons and decisions that never occurred are there as 0: only then can growth be seen."""
    if variant["planned"]:
        page.put(metrics.SHARE, whose, variant["share"])
    page.put(metrics.SUCCESS, whose, variant["answered"])
    page.put(metrics.FORCED, whose, variant["forced"])
    page.put_latencies(metrics.LATENCY, whose, variant["latency"])
    for reason, count in _with_zeros(metrics.FAILURE_REASONS, variant["failures"]):
        page.put(metrics.FAILURE, (*whose, reason), count)
    for decision, count in _with_zeros(get_args(Verdict), variant["decisions"]):
        page.put(metrics.DECISIONS, (*whose, decision), count)


def _put_version(page: "_Page", whose: Labels, version: Document) -> None:
    counts, statistics = version["counts"], version["statistics"]
    page.put(metrics.LOADED, (*whose, version["role"]), 1)
    page.put(metrics.PENDING_ROWS, whose, version["pending_rows"])
    page.put_known({metrics.PENDING_REQUESTS: "pending_requests"}, whose, version)
    page.put(metrics.EXPIRED, whose, counts["expired"])
    page.put(metrics.CANCELLED, whose, counts["cancelled"])
    page.put(metrics.RETRIED, whose, counts["retried_alone"])
    page.put(metrics.ROWS, whose, statistics["inference_count"])
    page.put(metrics.EXECUTIONS, whose, statistics["execution_count"])
    for metric, name in SPANS.items():
        page.put(metric, whose, statistics["inference_stats"][name]["ns"] / 1000)
    _put_batch_sizes(page, whose, statistics["batch_stats"])


def _put_batch_sizes(page: "_Page", whose: Labels, sizes: list[Document]) -> None:
    limits = (*metrics.BATCH_BUCKETS_ROWS, float("inf"))
    counts, total = [0] * len(limits), 0
    for size in sizes:
        rows, count = size["batch_size"], size["compute_infer"]["count"]
        counts[next(place for place, limit in enumerate(limits) if rows <= limit)] += count
        total += rows * count
    page.put_histogram(metrics.BATCH_ROWS, whose, counts, total)


def _put_shadow(page: "_Page", whose: Labels, shadow: Document) -> None:
    page.put_known(SHADOW_ROWS, whose, shadow)
    page.put_latencies(metrics.SHADOW_LATENCY, whose, shadow["latency"])


def _with_zeros(known: Iterable[str], counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    yield from {**dict.fromkeys(known, 0), **counts}.items()


class _Page(Collector):
    """The families of one page; nothing of it outlives the page."""

    def __init__(self) -> None:
        self._families = {metric.name: _family(metric) for metric in METRICS}

    def put(self, metric: Metric, labels: Labels, value: float) -> None:
        """Add one sample."""
        assert len(labels) == len(metric.labels)
        self._families[metric.name].add_metric(labels, value)

    def put_known(
        self, names: Mapping[Metric, str], labels: Labels, values: Mapping[str, float]
    ) -> None:
        """Add a sample for each name that has a value."""
        for metric, name in names.items():
            if name in values:
                self.put(metric, labels, values[name])

    def put_latencies(self, metric: Metric, labels: Labels, latency: Document) -> None:
        """Add one histogram of `rayloop.serve.counts`."""
        self.put_histogram(metric, labels, latency["counts"], latency["sum_ms"])

    def put_histogram(
        self, metric: Metric, labels: Labels, counts: Sequence[int], total: float
    ) -> None:
        """Add one histogram.

        Args:
            metric: Which.
            labels: Their values.
            counts: By bucket, not summed up; the last one is beyond every limit.
            total: Sum of all values, in the metric's unit.
        """
        limits = [*map(floatToGoString, metric.buckets), "+Inf"]
        buckets = list(zip(limits, accumulate(counts), strict=True))
        self._families[metric.name].add_metric(labels, buckets, total)

    def collect(self) -> Iterable[Family]:
        """The families that have samples."""
        return [family for family in self._families.values() if family.samples]

    def text(self) -> bytes:
        """The page."""
        text = generate_latest(self)
        for metric in METRICS:
            if _is_bare(metric):
                name = metric.name.encode()
                text = text.replace(b"# TYPE %b untyped\n" % name, b"# TYPE %b counter\n" % name)
        return text


def _is_bare(metric: Metric) -> bool:
    """Whether it is a counter under a name of Triton's, which do not end in `_total`.

    The library would append that to the name of every counter that it is told of.
    """
    return metric.kind == "counter" and not metric.name.endswith("_total")


def _family(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    if metric.kind == "gauge":
        return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    kind = UntypedMetricFamily if _is_bare(metric) else CounterMetricFamily
    return kind(metric.name, metric.help, labels=metric.labels)
