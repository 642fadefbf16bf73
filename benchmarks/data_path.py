"""Images per second of the data path alone, per feed, without any training.

    python benchmarks/data_path.py

Fashion-MNIST's training split, one worker, global batch 256, each way five times in turn, so that
noise of the machine falls on all alike: the resident feed from Ray's object store, the same with
augmentation, and the streamed feed through Ray Data (its first batch left out and told apart).
Prepare the data first: python jobs/prepare_data.py laptop
"""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from rayloop.clock import SYSTEM_CLOCK
from rayloop.cluster import connect, machine_cores
from rayloop.data.batches import Batch, ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.transforms import augment, choose
from rayloop.data.versions import open_version, read_split
from rayloop.presets import laptop
from rayloop.storage import Storage, home

REPEATS = 5
STEPS = 200


def timed(make: Callable[[], Iterator[Batch]]) -> tuple[float, float]:
    """Images per second after the first batch, and the seconds until the first."""
    start = SYSTEM_CLOCK.monotonic()
    batches = make()
    next(batches)
    first = SYSTEM_CLOCK.monotonic()
    images = sum(len(batch.labels) for batch in batches)
    return images / (SYSTEM_CLOCK.monotonic() - first), first - start


def main() -> None:
    """Measure all ways in turn and write the result file."""
    torch.set_num_threads(1)
    config = laptop()
    storage = Storage(home())
    dataset = open_version(storage, config.data.dataset_name)
    order = SampleOrder(dataset.splits["train"], 256, 0)
    with connect(config.cluster):
        import ray

        from rayloop.data.feed import StreamFeed, stream_dataset

        ray.data.DataContext.get_current().execution_options.preserve_order = True
        split = ray.get(ray.put(read_split(storage, dataset, "train")))

        def resident() -> Iterator[Batch]:
            return ResidentFeed(split, order, 0, 1).batches(0, STEPS)

        def augmented() -> Iterator[Batch]:
            settings = config.train.augment
            for batch in resident():
                rows, epochs = order.rows(batch.step)
                chosen = choose(settings, 0, batch.step, rows, epochs, slice(None))
                augment(torch.from_numpy(batch.images), chosen, settings)
                yield batch

        def stream() -> Iterator[Batch]:
            rows = stream_dataset(config.data, storage, dataset, order, 1, 0, STEPS)
            return StreamFeed(rows.iterator(), order, 0, 1).batches(0, STEPS)

        ways = {"resident": resident, "resident + augmentation": augmented, "stream": stream}
        found = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, make in ways.items():
                found[name].append(timed(make))
    write(found)


def write(found: dict[str, list[tuple[float, float]]]) -> None:
    """Write and print the table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        "# The data path alone: images per second per feed",
        "",
        f"n={REPEATS} of {STEPS} steps of 256 images each; mean ± standard deviation. "
        f"{machine_cores()} cores, {platform.processor() or platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f} at the end; commit {commit}.",
        "",
        "| feed | images/s | first batch after s |",
        "| --- | --- | --- |",
    ]
    for name, runs in found.items():
        rates, firsts = [rate for rate, _ in runs], [first for _, first in runs]
        lines.append(
            f"| {name} | {statistics.mean(rates):,.0f} ± {statistics.stdev(rates):,.0f} "
            f"| {statistics.mean(firsts):.2f} |"
        )
    day = datetime.now(UTC).date().isoformat()
    path = Path(__file__).with_name(f"data-path_{machine_cores()}core_{day}.md")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
