"""Does the simulator say how fast 1, 2 and 4 workers train here, from what one of them does alone?

    .venv/bin/python benchmarks/simulator.py --rounds 5
    .venv/bin/python benchmarks/simulator.py --rounds 1 --write /tmp/trial      # a short look

Measures, without ever training together: the step of one worker with several numbers of rows; how
much longer it gets when 2 and 4 such workers compute at once and in step, with nothing exchanged;
gloo's all-reduce; a checkpoint; a start, a restart, and what Ray's own processes take. Predicts
jobs/train.py with 1, 2 and 4 workers from that, writes the prediction down, and only then runs
them, rounds of runs and of further measurements alternating. Writes a calibration (JSON) and all
figures (JSON). Needs the Fashion-MNIST dataset version, and nothing beside it.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.multiprocessing.spawn import spawn

from rayloop.code_version import code_version
from rayloop.config import Config
from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import Split, open_version, read_split
from rayloop.models.classifier import count_parameters
from rayloop.models.zoo import build_classifier
from rayloop.ports import free_port
from rayloop.presets import laptop
from rayloop.simulate.calibration import Calibration, save_calibration
from rayloop.simulate.network import Link, halving_s
from rayloop.simulate.prediction import Plan, Prediction, predict
from rayloop.storage import Storage, home
from rayloop.train.account import Ledger
from rayloop.train.checkpoint import CheckpointWriter, save_checkpoint
from rayloop.train.loop import Hooks, run_loop

BATCH = 256
WORKERS = (1, 2, 4)
ROWS = (64, 128, 256)
STEPS = 600
"""Of a run. In the first seconds Ray still starts processes beside it, which cost 2 workers a sixth
of their speed: with 100 steps that is most of a run on a fast machine."""
WINDOW_ROWS = 15_360
"""Rows that a worker computes for one figure: 60 steps of 256."""
SKIPPED_STEPS = 3
"""First steps of a process, which load code and memory."""
SMALL_BYTES = 8 * 128
REPEATS = 40
"""All-reduces for one figure."""
QUIET_SHARE = 0.1
"""Of the machine's processor time that others may use during a figure that counts."""
PATIENCE_S = 15.0
"""Longest wait for a quiet moment before a figure is taken anyway."""
NOWHERE = Link(latency_s=0.0, bytes_per_s=1e12)
"""Between nodes: there is one."""


OF_A_RUN = ("start_s", "restart_s", "platform_cores")
"""What a whole run tells: seconds of a start and of a restart, cores that Ray itself keeps busy."""

Figure = tuple[float, float]
"""A value, and the share of the machine that others used meanwhile."""


@dataclass
class Measured:
    """Every figure of every round in seconds a step or an all-reduce, with others' share beside it.

    Attributes:
        alone: By rows.
        together: By workers that compute at once, each `BATCH / 4` rows.
        noise: From one step to the next while as many compute as there are cores, over the mean.
        sums: By workers and bytes.
    """

    alone: dict[int, list[Figure]] = field(default_factory=lambda: defaultdict(list))
    together: dict[int, list[Figure]] = field(default_factory=lambda: defaultdict(list))
    noise: list[Figure] = field(default_factory=list)
    sums: dict[str, list[Figure]] = field(default_factory=lambda: defaultdict(list))


class Others(threading.Thread):
    """How much of the processors those use that are not of this benchmark, while a block runs.

    Ours are the processes with our RAYLOOP_HOME in their environment, Ray's own included.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._used: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._mark = f"RAYLOOP_HOME={os.environ['RAYLOOP_HOME']}".encode()
        self.share = 0.0

    def __enter__(self) -> "Others":
        self._began, self._busy = time.monotonic(), busy_s()
        self._look(first=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._look()
        ours = sum(used - self._first.get(pid, 0.0) for pid, used in self._used.items())
        lasted = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        self.share = max(0.0, (busy_s() - self._busy - ours) / lasted)

    def run(self) -> None:
        """Look now and then, since processes end."""
        while not self._ended.wait(0.5):
            self._look()

    def _look(self, first: bool = False) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                is_ours = int(entry.name) == os.getpid()
                if not is_ours and self._mark not in (entry / "environ").read_bytes():
                    continue
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            self._used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / ticks
        if first:
            self._first = dict(self._used)


def busy_s() -> float:
    """Processor seconds used on this machine since it started, all cores."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in words[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def quietly(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action gives, done in a quiet moment if there is one, and the others' share in it."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with Others() as others:
            time.sleep(2)
        if others.share <= QUIET_SHARE:
            break
    with Others() as others:
        value = action()
    return value, round(others.share, 3)


def middle_of(figures: list[Figure]) -> float:
    """The median of those taken in quiet, or of all where there are none."""
    quiet = [value for value, share in figures if share <= QUIET_SHARE]
    return statistics.median(quiet or [value for value, _ in figures])


class _Enough(Exception):
    """The window is over."""


def compute(rank: int, workers: int, rows: int, config: Config, barrier: Any, results: Any) -> None:
    """One worker that trains by itself, in step with the others; gives its steps' seconds."""
    torch.set_num_threads(1)
    storage = Storage(home())
    dataset = open_version(storage, config.data.dataset_name)
    split = read_split(storage, dataset, "train")
    train = replace(config.train, num_workers=1, global_batch_size=rows)
    order = SampleOrder(len(split), rows, train.seed + rank, train.norm_group_rows)
    model = build_classifier(
        config.model, dataset.shape, 10, dataset.pixel_mean, dataset.pixel_std, train.seed
    )
    few = Split(split.images[:1], split.labels[:1], split.row_ids[:1])
    told: list[float] = []
    before = 0.0

    def on_step(step: int, _: Ledger) -> None:
        nonlocal before
        barrier.wait()
        now = time.monotonic()
        if step > SKIPPED_STEPS:
            told.append(now - before)
        before = now
        if step == SKIPPED_STEPS + steps_of_window(rows):
            raise _Enough

    try:
        run_loop(
            model, train, order, ResidentFeed(split, order, 0, 1), few, hooks=Hooks(on_step=on_step)
        )
    except _Enough:
        results.append(told)


def steps_of_window(rows: int) -> int:
    """Steps for one figure: as many rows for each number of them in a step."""
    return WINDOW_ROWS // rows


def steps_of(workers: int, rows: int, config: Config) -> list[list[float]]:
    """Each worker's steps, with the wait for the others, while so many compute at once."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.list()
        barrier = torch.multiprocessing.get_context("spawn").Barrier(workers)
        spawn(compute, (workers, rows, config, barrier, results), nprocs=workers)
        return [list(steps) for steps in results]


def sum_up(rank: int, workers: int, port: int, num_bytes: int, results: Any) -> None:
    """All-reduces of a float64 tensor, as a step does; the first worker's seconds of each."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    values = torch.ones(num_bytes // 8, dtype=torch.float64)
    for repeat in range(REPEATS + 5):
        torch.distributed.barrier()
        before = time.perf_counter()
        torch.distributed.all_reduce(values)
        if rank == 0 and repeat >= 5:
            results.append(time.perf_counter() - before)
    torch.distributed.destroy_process_group()


def sums_of(workers: int, num_bytes: int) -> float:
    """Median seconds of an all-reduce."""
    port = free_port("127.0.0.1")
    with torch.multiprocessing.Manager() as manager:
        results = manager.list()
        spawn(sum_up, (workers, port, num_bytes, results), nprocs=workers)
        return statistics.median(results)


def noise_of(steps: list[float]) -> float:
    """Standard deviation from one step to the next over the mean; slow drifts do not count.

    Half the mean square of successive differences is the variance (von Neumann 1941).
    """
    squares = [(b - a) ** 2 for a, b in itertools.pairwise(steps)]
    return math.sqrt(statistics.fmean(squares) / 2) / statistics.fmean(steps)


def measure(measured: Measured, config: Config, exchange_bytes: int, is_first: bool) -> None:
    """One round of everything that drifts with the load; the first one of all."""
    for rows in ROWS if is_first else (ROWS[-1],):
        steps, others = quietly(lambda rows=rows: steps_of(1, rows, config))
        measured.alone[rows].append((statistics.median(steps[0]), others))
    for workers in WORKERS:
        each, others = quietly(lambda count=workers: steps_of(count, BATCH // 4, config))
        usual = statistics.fmean(map(statistics.median, each))
        measured.together[workers].append((usual, others))
        if workers == 2:
            measured.noise.append((statistics.fmean(map(noise_of, each)), others))
        if workers == 1:
            measured.alone[BATCH // 4].append((usual, others))
    for workers in WORKERS[1:]:
        for num_bytes in (SMALL_BYTES, exchange_bytes):
            took, others = quietly(lambda n=workers, size=num_bytes: sums_of(n, size))
            measured.sums[f"{workers} {num_bytes}"].append((took, others))


def checkpoint_of(config: Config, folder: Path) -> tuple[float, int]:
    """Seconds a checkpoint takes from the training, and its bytes."""
    storage, where = Storage(home()), Storage(str(folder))
    dataset = open_version(storage, config.data.dataset_name)
    split = read_split(storage, dataset, "train")
    train = replace(config.train, num_workers=1, global_batch_size=BATCH // 4)
    order = SampleOrder(len(split), BATCH // 4, train.seed, train.norm_group_rows)
    model = build_classifier(
        config.model, dataset.shape, 10, dataset.pixel_mean, dataset.pixel_std, train.seed
    )
    few = Split(split.images[:1], split.labels[:1], split.row_ids[:1])
    booked: list[float] = []

    def write(step: int, state: dict[str, Any]) -> str:
        return save_checkpoint(where, "measured", step, state, {}, 2)

    with CheckpointWriter(write) as writer:
        hooks = Hooks(
            on_step=lambda _, ledger: booked.append(ledger.seconds["checkpoint"]),
            is_checkpoint_due=lambda: len(booked) % 10 == 0,
            save=writer.save,
        )
        feed = ResidentFeed(split, order, 0, 1)
        run_loop(model, train, order, feed, few, hooks=hooks, last_step=51)
    size = sum(path.stat().st_size for path in folder.rglob("state.pt"))
    return booked[-1] / 5, size // len(list(folder.rglob("state.pt")))


def calibrate(
    measured: Measured, config: Config, exchange_bytes: int, others: dict[str, float]
) -> Calibration:
    """The medians of the rounds so far as a calibration."""
    middle = {rows: middle_of(values) for rows, values in measured.alone.items()}
    line = statistics.linear_regression(list(middle), list(middle.values()))
    together = {count: middle_of(told) for count, told in measured.together.items()}
    factors, largest = [], 1.0
    for count in WORKERS:
        largest = max(largest, together[count] / together[1])
        factors.append((count, largest))
    small, large = (middle_of(measured.sums[f"2 {size}"]) for size in (SMALL_BYTES, exchange_bytes))
    most = max(WORKERS)
    crowded_s = middle_of(measured.sums[f"{most} {SMALL_BYTES}"])
    turns = halving_s(0.0, most, Link(latency_s=1.0, bytes_per_s=1.0))
    return Calibration(
        name=f"laptop preset on {os.cpu_count()} virtual cores",
        source=f"benchmarks/simulator.py, {len(measured.noise)} rounds, "
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}",
        fixed_s=max(0.0, line.intercept),
        row_s=line.slope,
        rows_per_worker=BATCH / 4,
        least_rows=min(ROWS),
        largest_rows=max(ROWS),
        noise=middle_of(measured.noise),
        cores=os.cpu_count() or 1,
        contention=tuple(factors),
        platform_cores=others["platform_cores"],
        exchange_bytes=exchange_bytes,
        node_latency_s=small / 2,
        crowded_latency_s=crowded_s / turns,
        node_bytes_per_s=exchange_bytes / max(1e-9, large - small),
        hidden_share=0.0,
        checkpoint_s=others["checkpoint_s"],
        checkpoint_bytes=others["checkpoint_bytes"],
        start_s=others["start_s"],
        restart_s=others["restart_s"],
        workers=max(WORKERS),
        run_rows=laptop().train.epochs * others["rows"],
    )


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def train(workers: int, run_id: str, seed: int, rows: int) -> dict[str, Any]:
    """A training run as a user starts it; its record's figures."""
    words = [sys.executable, "jobs/train.py", "laptop", "--run-id", run_id]
    settings = {
        "num-workers": workers, "global-batch-size": BATCH, "cpus-per-worker": 1, "seed": seed,
        "epochs": STEPS * BATCH / rows, "floor-epochs": 0,
    }  # fmt: skip
    words += [word for name, value in settings.items() for word in (f"--train.{name}", str(value))]
    words += ["--cluster.num-cpus", str(max(WORKERS) + 2)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ledger = result["ledger_s"]
    causes = ("start", "step", "data_wait", "checkpoint")
    return {
        "workers": workers,
        "images_per_second": result["images_per_second"],
        "usual_images_per_second": BATCH / result["step_ms"]["p50"] * 1e3,
        "run_s": sum(ledger[cause] for cause in causes),
    }


def _train_quietly(workers: int, number: int, rows: int) -> dict[str, Any]:
    """A run of a round, in a quiet moment if there is one."""
    told, others = quietly(lambda: train(workers, f"round-{number}-{workers}", number, rows))
    return {**told, "others": others}


def predictions_of(calibration: Calibration) -> dict[int, Prediction]:
    """What the simulator says of the runs."""
    return {
        workers: predict(
            Plan(
                workers=workers, rows=BATCH / workers, between=NOWHERE,
                workers_per_node=max(WORKERS), run_rows=STEPS * BATCH,
            ),
            calibration,
        )
        for workers in WORKERS
    }  # fmt: skip


def of_a_run() -> tuple[float, float, float]:
    """What `OF_A_RUN` names, by a run of two workers one of which is killed."""
    words = [sys.executable, "benchmarks/recovery.py", "--kills", "1", "--every-s", "6"]
    done = subprocess.run([*words, "--epochs", "4.0"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["ledger_s"]["start"], told["restart_s_mean"], told["platform_cores"]


def main() -> None:
    """Measure, predict, train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=int, default=2, help="rounds measured before any run")
    stem = f"simulator_{os.cpu_count()}core_{time.strftime('%Y-%m-%d')}"
    parser.add_argument("--write", type=Path, default=Path("benchmarks") / stem)
    parser.add_argument(
        "--known", type=float, nargs=len(OF_A_RUN), metavar=tuple(map(str.upper, OF_A_RUN)),
        help="what was measured before of a run, which takes minutes",
    )  # fmt: skip
    options = parser.parse_args()
    data = Path(home()) / "datasets"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "datasets").symlink_to(data)
        os.environ["RAYLOOP_HOME"] = folder
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as nice as those alone
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """All rounds; every figure is in the file after each of them."""
    torch.set_num_threads(1)
    config, storage = laptop(), Storage(str(folder))
    dataset = open_version(storage, config.data.dataset_name)
    rows = dataset.splits["train"]
    model = build_classifier(
        config.model, dataset.shape, 10, dataset.pixel_mean, dataset.pixel_std, 0
    )
    exchange_bytes = 8 * count_parameters(model)
    others = dict(zip(OF_A_RUN, options.known or of_a_run(), strict=True))
    others |= {"rows": float(rows)}
    seconds, size = checkpoint_of(config, folder / "measured")
    others |= {"checkpoint_s": seconds, "checkpoint_bytes": float(size)}
    measured = Measured()
    for number in range(options.before):
        measure(measured, config, exchange_bytes, is_first=number == 0)
    first = calibrate(measured, config, exchange_bytes, others)
    told = {count: asdict(it) for count, it in predictions_of(first).items()}
    speeds = {count: round(it["rows_per_s"]) for count, it in told.items()}
    print(f"predicted before any run, images/s: {speeds}", flush=True)
    runs, version = [], code_version()
    for number in range(options.rounds):
        turn = number % len(WORKERS)
        for workers in WORKERS[turn:] + WORKERS[:turn]:
            runs.append(_train_quietly(workers, number, rows))
            print(json.dumps(runs[-1]), flush=True)
        measure(measured, config, exchange_bytes, is_first=False)
        last = calibrate(measured, config, exchange_bytes, others)
        path = options.write.absolute()
        save_calibration(last, Storage(str(path.parent)), f"{path.name}_calibration.json")
        raw = {
            "machine": f"{os.cpu_count()} virtual cores, {cpu_name()}, torch {torch.__version__}",
            "commit": version.commit[:7] + ("+" if version.has_changes else ""),
            "rounds_before": options.before,
            "rounds": number + 1,
            "measured": {
                name: dict(it) if isinstance(it, dict) else it
                for name, it in vars(measured).items()
            },
            "calibration_before": asdict(first),
            "calibration": asdict(last),
            "predicted_before": told,
            "predicted": {count: asdict(it) for count, it in predictions_of(last).items()},
            "runs": runs,
        }
        path.with_name(f"{path.name}.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
