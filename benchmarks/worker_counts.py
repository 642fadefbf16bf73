"""One, two and four workers, same global batch, fp32: how far do their losses part in 100 steps?

    .venv/bin/python benchmarks/worker_counts.py

Trains the laptop preset's net with plain processes over gloo, no Ray, and compares each step's
global loss with that of one worker. Needs the Fashion-MNIST dataset version (jobs/prepare_data.py
laptop). `--not-invariant` shows what float32 sums in DDP give.
"""

import argparse
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.multiprocessing.spawn import spawn

from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import Split, open_version, read_split
from rayloop.models.zoo import build_classifier
from rayloop.ports import free_port
from rayloop.presets import laptop
from rayloop.storage import Storage, home
from rayloop.train.loop import Hooks, Worker, run_loop

STEPS = 100


def main() -> None:
    """Train three times and print the largest difference of a loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--not-invariant", action="store_true")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"])
    options = parser.parse_args()
    invariant = not options.not_invariant
    losses = {count: train(count, invariant, options.optimizer) for count in (1, 2, 4)}
    for count in (2, 4):
        gaps = [abs(a - b) for a, b in zip(losses[1], losses[count], strict=True)]
        print(f"{count} workers: largest difference {max(gaps):.2e} in {len(gaps)} steps")
        print("   at steps 1, 10, 30, 100:", *(f"{max(gaps[:n]):.1e}" for n in (1, 10, 30, 100)))


def train(world_size: int, invariant: bool, optimizer: str) -> list[float]:
    """The global loss of each step with so many workers."""
    with torch.multiprocessing.Manager() as manager:
        losses = manager.list()
        port = free_port("127.0.0.1")
        spawn(work, (world_size, port, invariant, optimizer, losses), nprocs=world_size)
        return list(losses)


def work(
    rank: int, world_size: int, port: int, invariant: bool, optimizer: Any, losses: Any
) -> None:
    """One worker's part."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    storage, config = Storage(home()), laptop()
    dataset = open_version(storage, config.data.dataset_name)
    rows = read_split(storage, dataset, "train")
    settings = replace(
        config.train, num_workers=world_size, worker_invariant=invariant, optimizer=optimizer,
        epochs=STEPS * config.train.global_batch_size / len(rows),
    )  # fmt: skip
    order = SampleOrder(
        len(rows), settings.global_batch_size, settings.seed, settings.norm_group_rows
    )
    model = build_classifier(
        config.model, dataset.shape, 10, dataset.pixel_mean, dataset.pixel_std, settings.seed
    )
    val = Split(rows.images[:100], rows.labels[:100], rows.row_ids[:100])
    told: list[float] = []
    run_loop(
        model, settings, order, ResidentFeed(rows, order, rank, world_size), val,
        Worker(rank=rank, world_size=world_size),
        hooks=Hooks(on_losses=lambda read: told.extend(loss.loss for loss in read)),
    )  # fmt: skip
    if rank == 0:
        losses.extend(told)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
