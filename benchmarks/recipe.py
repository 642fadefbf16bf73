r"""Fashion-MNIST on CPU cores: test accuracy by seed, and the processor time it took.

    .venv/bin/python jobs/prepare_data.py laptop --data.name fashion-mnist-full \
        --data.val_share 0.02
    .venv/bin/python benchmarks/recipe.py --seeds 3                                # small net
    .venv/bin/python benchmarks/recipe.py --seeds 3 --widths 24 64 96 --epochs 11.5  # larger net

The laptop preset's recipe in one process with one thread a seed, two seeds beside each other on two
cores (the share of a core each gets is that of data-parallel workers, without the exchange). Core
seconds are processor seconds of the training loop with its one validation an epoch. Testing comes
after and is not counted; there is no test-time augmentation, and nothing was chosen by test
accuracy. Prints one JSON line a seed and one for all.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import open_version, read_split
from rayloop.models.zoo import build_classifier
from rayloop.presets import laptop
from rayloop.storage import Storage, home
from rayloop.train.evaluate import evaluate
from rayloop.train.loop import run_loop

DATASET = "fashion-mnist-full"


def main() -> None:
    """Train each seed and print accuracy and cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=laptop().train.epochs)
    parser.add_argument("--widths", type=int, nargs="+", default=list(laptop().model.widths))
    parser.add_argument("--beside", type=int, default=2, help="seeds at the same time")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with ProcessPoolExecutor(options.beside, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(train, seed, options.epochs, tuple(options.widths)) for seed in seeds]
        results = []
        for job in jobs:
            results.append(job.result())
            print(json.dumps(results[-1]), flush=True)
    accuracies = [result["test_accuracy"] for result in results]
    print(
        json.dumps(
            {
                "n": len(results),
                "widths": options.widths,
                "epochs": options.epochs,
                "test_accuracy_mean": round(statistics.mean(accuracies), 5),
                "test_accuracy_stdev": round(statistics.pstdev(accuracies), 5),
                "core_minutes_mean": round(
                    statistics.mean(result["core_s"] for result in results) / 60, 2
                ),
                "core_minutes_max": round(max(result["core_s"] for result in results) / 60, 2),
            }
        )
    )


def train(seed: int, epochs: float, widths: tuple[int, ...]) -> dict[str, Any]:
    """Train one seed in this process."""
    torch.set_num_threads(1)
    storage, preset = Storage(home()), laptop()
    dataset = open_version(storage, DATASET)
    rows, val, test = (read_split(storage, dataset, name) for name in ("train", "val", "test"))
    settings = replace(preset.train, num_workers=1, seed=seed, epochs=epochs)
    model = build_classifier(
        replace(preset.model, widths=widths), dataset.shape, 10, dataset.pixel_mean,
        dataset.pixel_std, seed,
    )  # fmt: skip
    order = SampleOrder(len(rows), settings.global_batch_size, seed, settings.norm_group_rows)
    cpu, wall = time.process_time(), time.monotonic()
    outcome = run_loop(model, settings, order, ResidentFeed(rows, order, 0, 1), val)
    core_s, wall_s = time.process_time() - cpu, time.monotonic() - wall
    tested = evaluate(outcome.model, test, 10, 500, torch.device("cpu"))
    return {
        "seed": seed,
        "test_accuracy": tested.accuracy,
        "val_accuracy": outcome.history[-1]["val_accuracy"],
        "core_s": round(core_s, 1),
        "wall_s": round(wall_s, 1),
        "images_per_core_s": round(len(rows) * epochs / core_s),
    }


if __name__ == "__main__":
    main()
