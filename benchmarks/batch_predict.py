r"""Images per second of batch prediction beside the bare engine on the same cores.

    .venv/bin/python benchmarks/batch_predict.py
    .venv/bin/python benchmarks/batch_predict.py --rows 200000 --rows-per-file 4096 16384 \
        --repeats 5

The newest release under RAYLOOP_HOME answers its own training split, repeated to `--rows` images.
The bare engine is one process a worker with the same engine, batch size and one thread, its
images in memory, its answers thrown away. Batch prediction is the job's own pipeline: memory-mapped
shards with their digests checked, Ray Data, answers in Parquet files on the disk; its time runs
from the first row read to the last file in place, so loading the engines is left out and waiting
for the last file is not. The whole job is `jobs/batch_predict.py` as a command, Ray's start and
end included. The ways take turns, forwards and backwards, and ratios are within a turn.

Everything is written to a temporary folder; RAYLOOP_HOME is only read.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rayloop.clock import SYSTEM_CLOCK
from rayloop.cluster import connect, machine_cores
from rayloop.config import BatchConfig, Config, DataConfig
from rayloop.data.versions import (
    DatasetVersion,
    Shard,
    encode_table,
    open_version,
    read_split,
    shard_table,
    write_manifest,
)
from rayloop.quantize.cpu import cpu_features
from rayloop.registry.release import ReleaseRecord, load_release
from rayloop.serve.engine import OnnxEngine
from rayloop.serve.offline.plan import open_work
from rayloop.serve.offline.result import finish, images_per_second
from rayloop.storage import Storage, home

HERE = Path(__file__).parent
TARGET_RATIO = 0.9
DATASET = "repeated"
ROWS_PER_SHARD = 50_000
BARE = "bare engine"


def prepare(source: Storage, target: Storage, rows: int, version: str) -> ReleaseRecord:
    """Copy a release, and write its training images again and again as a dataset."""
    model = "classifier"
    version = version or max(source.names(f"models/{model}"), key=int)
    release = load_release(source, model, version)
    for name in source.names(release.folder):
        target.write(f"{release.folder}/{name}", source.read(f"{release.folder}/{name}"))
    dataset = open_version(source, release.dataset["name"], release.dataset["version"])
    split = read_split(source, dataset, "train")
    shards = []
    for start in range(0, rows, ROWS_PER_SHARD):
        chosen = np.arange(start, min(start + ROWS_PER_SHARD, rows)) % len(split)
        table = shard_table(
            split.images[chosen], split.labels[chosen], np.zeros(len(chosen), "V32")
        )
        shards.append(add_shard(target, encode_table(table), len(chosen), len(shards)))
    repeated = replace(
        dataset, name=DATASET, version="v1", splits={"train": rows}, shards=tuple(shards)
    )
    write_manifest(target, repeated)
    return release


def add_shard(target: Storage, content: bytes, rows: int, index: int) -> Shard:
    """Write one shard and describe it."""
    path = f"datasets/{DATASET}/v1/train/part-{index:05d}.arrow"
    target.write(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return Shard(path=path, split="train", rows=rows, size_bytes=len(content), sha256=sha256)


# --- the bare engine


def bare_engine(
    root: str, release: ReleaseRecord, dataset: DatasetVersion, workers: int, batch_rows: int
) -> float:
    """Images per second of engines beside one another, each over its part of the rows."""
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(workers), context.Queue()
    part = dataset.splits["train"] // workers
    words = (root, release, dataset, part, batch_rows, ready, times)
    processes = [context.Process(target=run_bare, args=words) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [times.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return workers * part / (max(end for _, end in found) - min(start for start, _ in found))


def run_bare(
    root: str,
    release: ReleaseRecord,
    dataset: DatasetVersion,
    rows: int,
    batch_rows: int,
    ready: Any,
    times: Any,
) -> None:
    """One process of `bare_engine`: everything in memory before the clock starts."""
    storage = Storage(root)
    engine = OnnxEngine(storage.read(f"{release.folder}/{release.artifact}"))
    images = np.array(read_split(storage, dataset, "train").images[:rows])
    engine.predict(images[:batch_rows])
    ready.wait(600)
    start = SYSTEM_CLOCK.now()
    for first in range(0, rows, batch_rows):
        engine.predict(images[first : first + batch_rows])
    times.put((start, SYSTEM_CLOCK.now()))


# --- batch prediction


def settings(version: str, workers: int, batch_rows: int, rows_per_file: int) -> Config:
    """Batch prediction over all rows into a fresh result."""
    batch = BatchConfig(
        input=f"dataset:{DATASET}/train",
        output="measured",
        version=f":{version}",
        batch_rows=batch_rows,
        rows_per_file=rows_per_file,
        num_workers=workers,
    )
    return Config(data=DataConfig(source="digits"), batch=batch)


def pipeline(root: str, config: Config) -> float:
    """Images per second of the job's pipeline, from the first row read to the last file."""
    storage = Storage(root)
    storage.remove("predictions")
    work = open_work(storage, config)
    with connect(config.cluster):
        from rayloop.serve.offline.run import predict_files

        reports = predict_files(work)
    finish(work, reports, SYSTEM_CLOCK)
    return images_per_second(reports) or 0.0


def whole_job(root: str, config: Config) -> tuple[float, float]:
    """Images per second of the command from its start to its end, and its seconds."""
    Storage(root).remove("predictions")
    batch = config.batch
    words = ["jobs/batch_predict.py", "smoke", "--batch.input", batch.input]
    words += ["--batch.version", batch.version, "--batch.batch_rows", str(batch.batch_rows)]
    words += ["--batch.rows_per_file", str(batch.rows_per_file)]
    words += ["--batch.num_workers", str(batch.num_workers)]
    start = SYSTEM_CLOCK.monotonic()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=HERE.parent,
        env={**os.environ, "RAYLOOP_HOME": root},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = SYSTEM_CLOCK.monotonic() - start
    return json.loads(done.stdout.splitlines()[-1])["rows"] / seconds, seconds


def main() -> None:
    """Measure the ways in turn and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument(
        "--rows-per-file", type=int, nargs="+", default=[BatchConfig().rows_per_file]
    )
    parser.add_argument("--batch-rows", type=int, default=BatchConfig().batch_rows)
    parser.add_argument("--workers", type=int, default=machine_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--version", default="", help="of the model; the newest if left out")
    parser.add_argument("--job-repeats", type=int, default=3, help="of the whole command")
    words = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="rayloop-batch-") as root:
        release = prepare(Storage(home()), Storage(root), words.rows, words.version)
        rates, jobs = measure(root, release, words)
    text = report(rates, jobs, release, words, load)
    day = datetime.now(UTC).date().isoformat()
    (HERE / f"batch-predict_{machine_cores()}core_{day}.md").write_text(text)
    print(text)


def measure(
    root: str, release: ReleaseRecord, words: argparse.Namespace
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """Images per second by way, one figure a turn; and the whole command's with its seconds."""
    dataset = open_version(Storage(root), DATASET)
    sizes = {f"batch prediction, {size:,} rows a file": size for size in words.rows_per_file}
    configs = {
        name: settings(release.version, words.workers, words.batch_rows, size)
        for name, size in sizes.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in (BARE, *configs)}
    for turn in range(words.repeats):
        names = list(rates) if turn % 2 == 0 else list(rates)[::-1]
        for name in names:
            rate = (
                bare_engine(root, release, dataset, words.workers, words.batch_rows)
                if name == BARE
                else pipeline(root, configs[name])
            )
            rates[name].append(rate)
            print(f"{name}: {rate:,.0f} images/s", file=sys.stderr)
    first = next(iter(configs.values()))
    return rates, [whole_job(root, first) for _ in range(words.job_repeats)]


def spread(values: list[float], digits: int = 0) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.{digits}f} ± {deviation:,.{digits}f}"


def report(
    rates: dict[str, list[float]],
    jobs: list[tuple[float, float]],
    release: ReleaseRecord,
    words: argparse.Namespace,
    load: float,
) -> str:
    """The result file's text, misses included."""
    ratios = {
        name: [rate / bare for rate, bare in zip(found, rates[BARE], strict=True)]
        for name, found in rates.items()
    }
    best = statistics.mean(list(ratios.values())[1])
    verdict = "met" if best >= TARGET_RATIO else "MISSED"
    lines = [
        "# Batch prediction beside the bare engine",
        "",
        f"- claim: at least {TARGET_RATIO:.0%} of the bare engine's images per second: "
        f"{best:.1%}, {verdict}",
        f"- {release.method} model {release.config.get('model', {}).get('name', '')} for "
        f"{'x'.join(map(str, release.shape))} images, {words.rows:,} images, "
        f"{words.workers} workers of one thread, batches of {words.batch_rows}",
        f"- machine: {machine_cores()} cores, {' '.join(cpu_features())}; load {load:.1f} before; "
        f"Python {platform.python_version()}",
        f"- commit {commit()}; n = {words.repeats} turns; mean ± standard deviation, ratios within "
        "a turn",
        f"- command: python benchmarks/{' '.join([Path(__file__).name, *sys.argv[1:]])}",
        "",
        "| way | images/s | of the bare engine |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {spread(rates[name])} | {spread(ratios[name], 3)} |" for name in rates]
    if jobs:
        lines += [
            "",
            f"The whole command, from its start to its end (n = {len(jobs)}): "
            f"{spread([rate for rate, _ in jobs])} images/s in "
            f"{spread([seconds for _, seconds in jobs], 1)} s, of which Ray's start, the loading "
            "of the engines and Ray's end do not grow with the images.",
        ]
    return "\n".join([*lines, ""])


def commit() -> str:
    """The short hash of the checked-out commit."""
    words = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
