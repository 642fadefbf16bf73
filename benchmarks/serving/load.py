"""Turn requests and arrival times into latencies, goodput and the server's CPU time."""

import json
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from processes import Usage
from servers import Running
from wire import request_bytes

RECORD = np.dtype(
    [("intended", "f8"), ("sent", "f8"), ("done", "f8"),
     ("status", "i4"), ("body_bytes", "i4"), ("retry_after", "i4"), ("reserved", "i4")]
)  # fmt: skip
DIFFERENT_REQUESTS = 64
SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one round of load gave."""

    records: np.ndarray
    """One `RECORD` for each request; times in seconds after the start."""

    seconds: float
    """From the start to the last answer."""

    before: Usage
    after: Usage
    client_cpu_s: float
    memory_mb: tuple[tuple[float, float], ...]
    """Pairs of time and the tree's memory while it ran."""

    @property
    def good(self) -> np.ndarray:
        """Which requests were answered with 200."""
        return self.records["status"] == 200

    @property
    def latencies_ms(self) -> np.ndarray:
        """Of the answered requests, from the intended time."""
        good = self.records[self.good]
        return (good["done"] - good["intended"]) * 1000

    @property
    def requests_per_s(self) -> float:
        """Answered requests a second."""
        return float(self.good.sum()) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """The server tree's CPU milliseconds for each answered request."""
        return (self.after.cpu_s - self.before.cpu_s) * 1000 / max(1, int(self.good.sum()))

    @property
    def client_cpu_ms(self) -> float:
        """The client's CPU milliseconds for each request."""
        return self.client_cpu_s * 1000 / max(1, len(self.records))

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies of all requests; one without a 200 counts as endless."""
        if not len(self.records):
            return float("nan")
        latency = np.where(self.good, self.records["done"] - self.records["intended"], np.inf)
        return float(np.percentile(latency, percent, method="higher")) * 1000

    def cpu_by_name(self) -> dict[str, float]:
        """CPU milliseconds for each answered request, by process name."""
        answered = max(1, int(self.good.sum()))
        names = self.after.by_name
        spent = {
            name: (names[name] - self.before.by_name.get(name, 0.0)) * 1000 / answered
            for name in names
        }
        return dict(sorted(spent.items(), key=lambda item: -item[1]))


def closed(
    running: Running, connections: int, seconds: float, rows: int = 1, timeout_s: float = 30.0
) -> Round:
    """Each connection sends its next request when its last is answered."""
    requests = _requests(running, rows, None)
    return _send(running, requests, ["closed", str(connections), str(seconds), str(timeout_s)])


def open_loop(
    running: Running,
    schedule: np.ndarray,
    *,
    rows: int = 1,
    connections: int = 512,
    timeout_s: float = 10.0,
    deadline_ms: float | None = None,
) -> Round:
    """Requests leave at their times whatever the server does; latency counts from these times.

    Args:
        running: The server.
        schedule: Seconds after the start, rising.
        rows: Images in a request.
        connections: Most connections at once; a request beyond waits and its time runs.
        timeout_s: After this time from the intended one the client gives up.
        deadline_ms: Sent as a header when given.
    """
    requests = _requests(running, rows, deadline_ms)
    with tempfile.NamedTemporaryFile(suffix=".f8") as file:
        schedule.astype("<f8").tofile(file.name)
        return _send(running, requests, ["open", str(connections), file.name, str(timeout_s)])


def poisson(rate_per_s: float, seconds: float, seed: int) -> np.ndarray:
    """Arrival times of a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(
        1 / rate_per_s, int(rate_per_s * seconds * 1.5) + 50
    )
    times = np.cumsum(gaps)
    return times[times < seconds]


def _requests(running: Running, rows: int, deadline_ms: float | None) -> bytes:
    made = [
        request_bytes(running.server.wire, running.port, running.model.shape, rows, i, deadline_ms)
        for i in range(DIFFERENT_REQUESTS)
    ]
    return b"".join(len(one).to_bytes(4, "little") + one for one in made)


def _send(running: Running, requests: bytes, mode: list[str]) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "requests", Path(folder) / "records"
        asked.write_bytes(requests)
        before = running.tree.usage()
        client = subprocess.Popen(
            [sender(), "127.0.0.1", str(running.port), str(asked), str(answered), *mode],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        memory = _watch(running, client, before.memory_mb)
        said = client.communicate()[0]
        if client.returncode:
            raise RuntimeError(f"the sender ended with {client.returncode}")
        after = running.tree.usage()
        records = np.fromfile(answered, RECORD)
    summary = json.loads(said)
    return Round(
        records=records,
        seconds=float(summary["seconds"]),
        before=before,
        after=after,
        client_cpu_s=float(summary["cpu_s"]),
        memory_mb=tuple(memory),
    )


def _watch(
    running: Running, client: subprocess.Popen[str], memory_before_mb: float
) -> list[tuple[float, float]]:
    """Sample memory until the client ends; short rounds are left alone."""
    samples, passed_s = [(0.0, memory_before_mb)], 0.0
    ended = threading.Event()
    while not ended.is_set():
        try:
            client.wait(SAMPLE_EVERY_S)
            return samples
        except subprocess.TimeoutExpired:
            passed_s += SAMPLE_EVERY_S
            if int(passed_s) % 5 == 0:
                samples.append((passed_s, running.tree.usage(but=client.pid).memory_mb))
    return samples


@cache
def sender() -> str:
    """Path of the compiled client.

    Raises:
        RuntimeError: There is no C compiler.
    """
    source = Path(__file__).parent / "sender.c"
    target = Path(tempfile.gettempdir()) / f"rayloop-sender-{source.stat().st_mtime_ns:x}"
    if not target.exists():
        try:
            subprocess.run(["cc", "-O2", "-o", str(target), str(source)], check=True)
        except FileNotFoundError:
            raise RuntimeError(
                "The client needs a C compiler; on Debian: apt-get install gcc"
            ) from None
    return str(target)
