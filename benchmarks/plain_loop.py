"""Our training loop against a plain torch loop: same net, same rows in RAM, same threads, one run.

    taskset -c 0 .venv/bin/python benchmarks/plain_loop.py --rounds 7

The plain loop is what a tutorial writes: shuffled indices, the whole batch through the network,
plain batch norm, AdamW, no augmentation, no metrics. Ours does the same work with all it does
beside it: the order, the row-wise ghost norms, sums in float64, metrics of every row, the ledger,
the watchdog's marks. Rounds alternate; the figure is the ratio of processor seconds, which other
work on the machine moves less than wall time. Needs the Fashion-MNIST dataset version.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from rayloop.config import AugmentConfig, Config, TrainConfig
from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, Split, open_version, read_split
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.presets import laptop
from rayloop.storage import Storage, home
from rayloop.train.loop import Hooks, run_loop
from rayloop.train.watchdog import Watchdog

STEPS = 60


def main() -> None:
    """Alternate the two loops and print the ratio of their speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    storage, config = Storage(home()), laptop()
    dataset = open_version(storage, config.data.dataset_name)
    rows = read_split(storage, dataset, "train")
    train = replace(
        config.train,
        num_workers=1,
        augment=AugmentConfig(flip=False, translate_px=0),
        epochs=STEPS * config.train.global_batch_size / len(rows),
    )
    speeds: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(options.rounds + 1):
        pair = {
            "plain": speed(lambda: plain(config, train, dataset, rows), train),
            "ours": speed(lambda: ours(config, train, dataset, rows), train),
        }
        if number > 0:  # the first round warms up
            for name, value in pair.items():
                speeds[name].append(value)
    ratios = [b / a for a, b in zip(speeds["plain"], speeds["ours"], strict=True)]
    print(
        json.dumps(
            {
                "n": len(ratios),
                "ratio_mean": round(statistics.mean(ratios), 4),
                "ratio_median": round(statistics.median(ratios), 4),
                "ratio_stdev": round(statistics.stdev(ratios), 4),
                "images_per_cpu_s": {k: round(statistics.median(v)) for k, v in speeds.items()},
            }
        )
    )


def speed(work: Callable[[], None], train: TrainConfig) -> float:
    """Images per processor second."""
    before = time.process_time()
    work()
    return STEPS * train.global_batch_size / (time.process_time() - before)


def build(config: Config, dataset: DatasetVersion) -> ImageClassifier:
    """The preset's net."""
    return build_classifier(
        config.model, dataset.shape, 10, dataset.pixel_mean, dataset.pixel_std, config.train.seed
    )


def plain(config: Config, train: TrainConfig, dataset: DatasetVersion, rows: Split) -> None:
    """The loop of a tutorial."""
    model = build(config, dataset).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    images, labels = torch.from_numpy(rows.images.copy()), torch.from_numpy(rows.labels.copy())
    order = torch.randperm(len(labels))
    for step in range(STEPS):
        chosen = order[step * train.global_batch_size : (step + 1) * train.global_batch_size]
        loss = cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(config: Config, train: TrainConfig, dataset: DatasetVersion, rows: Split) -> None:
    """Our loop, watched as in a job."""
    order = SampleOrder(len(rows), train.global_batch_size, train.seed, train.norm_group_rows)
    few = Split(rows.images[:1], rows.labels[:1], rows.row_ids[:1])
    feed = ResidentFeed(rows, order, 0, 1)
    with Watchdog(0, 600.0, lambda _: None, None) as watchdog:
        hooks = Hooks(on_phase=watchdog.mark)
        run_loop(build(config, dataset), train, order, feed, few, hooks=hooks)


if __name__ == "__main__":
    main()
