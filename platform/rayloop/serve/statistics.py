"""Turn finished engine calls and requests into the counts and times of the statistics extension."""

from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]


@dataclass(slots=True)
class Span:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` times that took `ns` nanoseconds each."""
        self.count += count
        self.ns += ns * count

    def to_json(self) -> dict[str, int]:
        """The span in the protocol's words."""
        return {"count": self.count, "ns": self.ns}


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Where the time of one engine call went, in nanoseconds."""

    input_ns: int
    """Putting the requests' rows together."""

    infer_ns: int
    """The engine itself."""

    output_ns: int
    """Taking the answers apart."""


@dataclass(slots=True)
class _BatchSize:
    input: Span = field(default_factory=Span)
    infer: Span = field(default_factory=Span)
    output: Span = field(default_factory=Span)


@dataclass(slots=True)
class VersionStatistics:
    """What one version has done since it was loaded in this process.

    Times of an engine call count once for each request in it, as Triton does, so that a mean is
    what one request experienced. `rows` counts what the engine answered, `executions` its calls.
    """

    rows: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    success: Span = field(default_factory=Span)
    fail: Span = field(default_factory=Span)
    queue: Span = field(default_factory=Span)
    compute_input: Span = field(default_factory=Span)
    compute_infer: Span = field(default_factory=Span)
    compute_output: Span = field(default_factory=Span)
    batches: dict[int, _BatchSize] = field(default_factory=dict)

    def executed(self, rows: int, requests: int, times: BatchTimes) -> None:
        """Note an engine call.

        Args:
            rows: Rows in it.
            requests: Requests that were in it and waited for it.
            times: Where its time went.
        """
        self.rows += rows
        self.executions += 1
        self.compute_input.add(times.input_ns, requests)
        self.compute_infer.add(times.infer_ns, requests)
        self.compute_output.add(times.output_ns, requests)
        size = self.batches.get(rows)
        if size is None:
            size = self.batches[rows] = _BatchSize()
        size.input.add(times.input_ns)
        size.infer.add(times.infer_ns)
        size.output.add(times.output_ns)

    def finished(self, ok: bool, ns: int, now_s: float) -> None:
        """Note the end of a request.

        Args:
            ok: It got its answer.
            ns: From its arrival to its answer.
            now_s: Seconds since the epoch.
        """
        (self.success if ok else self.fail).add(ns)
        if ok:
            self.last_inference_ms = int(now_s * 1000)

    def to_json(self, model: str, version: str) -> Document:
        """The entry of one version in `model_stats`."""
        return {
            "name": model,
            "version": version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {
                "success": self.success.to_json(),
                "fail": self.fail.to_json(),
                "queue": self.queue.to_json(),
                "compute_input": self.compute_input.to_json(),
                "compute_infer": self.compute_infer.to_json(),
                "compute_output": self.compute_output.to_json(),
                "cache_hit": Span().to_json(),
                "cache_miss": Span().to_json(),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": size.input.to_json(),
                    "compute_infer": size.infer.to_json(),
                    "compute_output": size.output.to_json(),
                }
                for rows, size in sorted(self.batches.items())
            ],
            "memory_usage": [],
            "response_stats": {},
        }


def merged(entries: list[list[Document]]) -> list[Document]:
    """One list for all replicas: entries of the same version are added up.

    Args:
        entries: The `model_stats` of each replica.
    """
    found: dict[tuple[str, str], Document] = {}
    for entry in (entry for replica in entries for entry in replica):
        key = (entry["name"], entry["version"])
        found[key] = _add(found[key], entry) if key in found else entry
    return [found[key] for key in sorted(found, key=lambda key: (key[0], int(key[1])))]


def _add(one: Document, other: Document) -> Document:
    sizes: dict[int, Document] = {}
    for size in (*one["batch_stats"], *other["batch_stats"]):
        rows = size["batch_size"]
        sizes[rows] = _add_spans(sizes[rows], size) if rows in sizes else size
    return {
        **one,
        "last_inference": max(one["last_inference"], other["last_inference"]),
        "inference_count": one["inference_count"] + other["inference_count"],
        "execution_count": one["execution_count"] + other["execution_count"],
        "inference_stats": _add_spans(one["inference_stats"], other["inference_stats"]),
        "batch_stats": [sizes[rows] for rows in sorted(sizes)],
    }


def _add_spans(one: Document, other: Document) -> Document:
    return {
        name: {key: span[key] + other[name][key] for key in span} if type(span) is dict else span
        for name, span in one.items()
    }
