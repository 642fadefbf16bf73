"""A dataset version and an order -> a Ray Data stream -> per-worker batches.

The stream's source is the order itself: each of its rows is a span of some dozens of steps of one
rank, and an actor gathers the images of each from memory-mapped shards. So one pipeline
serves the whole run and starts at any step; nothing is skipped and nothing is shuffled on the way.
It gives the same rows in the same order as `rayloop.data.batches.ResidentFeed`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from rayloop.config import DataConfig
from rayloop.data.batches import Batch
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, read_shard
from rayloop.errors import WorkError
from rayloop.storage import Storage


class StreamFeed:
    """Batches that come through Ray Data, each checked to be the one the order asks for.

    Args:
        iterator: The rank's shard of the pipeline made by `stream_dataset`.
        order: The run's order.
        rank: This worker.
        world_size: All workers.
        prefetch_batches: Batches that are fetched ahead.
    """

    def __init__(
        self,
        iterator: ray.data.DataIterator,
        order: SampleOrder,
        rank: int,
        world_size: int,
        prefetch_batches: int = 4,
    ) -> None:
        self._iterator, self._order = iterator, order
        self._rank, self._world_size = rank, world_size
        self._prefetch_batches = prefetch_batches

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches; the pipeline must have been made for just these steps."""
        size = self._order.largest_stripe(self._world_size)
        stream = self._iterator.iter_batches(
            batch_size=size, batch_format="numpy", prefetch_batches=self._prefetch_batches
        )
        step = first_step
        for columns in stream:
            rows, _ = self._order.rows(step)
            expected = rows[self._order.stripe(step, self._rank, self._world_size)]
            count = len(expected)
            if not np.array_equal(columns["row_id"][:count], expected):
                raise WorkError(
                    f"The stream gave rank {self._rank} other rows than step {step} of the order "
                    f"(steps {np.unique(columns['step'])}, ranks {np.unique(columns['rank'])}). "
                    "Train with --data.feed resident, and report this."
                )
            yield Batch(step, columns["image"][:count], columns["label"][:count])
            step += 1
        if step != last_step:
            raise WorkError(f"The stream ended at step {step} of {last_step} on rank {self._rank}.")


def choose_feed(config: DataConfig, dataset: DatasetVersion) -> str:
    """`resident` or `stream`: as configured, or by the size of the training split."""
    if config.feed != "auto":
        return config.feed
    size_bytes = dataset.splits["train"] * int(np.prod(dataset.shape))
    return "resident" if size_bytes <= config.resident_limit_bytes else "stream"


def stream_dataset(
    config: DataConfig,
    storage: Storage,
    dataset: DatasetVersion,
    order: SampleOrder,
    world_size: int,
    first_step: int,
    last_step: int,
) -> ray.data.Dataset:
    """The Ray Data pipeline of a run's steps, to be split over `world_size` workers.

    Blocks alternate between the ranks, so that an order-preserving split by whole blocks hands
    each rank its own; `StreamFeed` checks that it did.

    Nothing in it asks for a CPU, neither the source, which is made here, nor the gathering actor:
    an elastic run takes every CPU of the cluster, and what waited for one would wait for ever.
    """
    spans = [
        {"start": start, "stop": min(start + config.steps_per_block, last_step), "rank": rank}
        for start in range(first_step, last_step, config.steps_per_block)
        for rank in range(world_size)
    ]
    return ray.data.from_items(spans, override_num_blocks=max(1, len(spans))).map_batches(
        Gather,
        fn_constructor_args=(storage, dataset, order, world_size),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )


class Gather:
    """Spans of steps -> the rows they stand for, picked from memory-mapped shards."""

    def __init__(
        self, storage: Storage, dataset: DatasetVersion, order: SampleOrder, world_size: int
    ) -> None:
        self._order, self._world_size = order, world_size
        shards = [shard for shard in dataset.shards if shard.split == "train"]
        parts = [read_shard(storage, shard) for shard in shards]
        self._images = [images for images, _ in parts]
        self._labels = np.concatenate([labels for _, labels in parts])
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def __call__(self, spans: pa.Table) -> dict[str, npt.NDArray[Any]]:
        """Gather one block; all ranks get equally many rows, shorter stripes with fillers."""
        size = self._order.largest_stripe(self._world_size)
        pairs = [
            (step, span["rank"])
            for span in spans.to_pylist()
            for step in range(span["start"], span["stop"])
        ]
        steps, ranks = np.repeat(np.array(pairs).T, size, axis=1)
        stripes = [
            self._order.rows(step)[0][self._order.stripe(step, rank, self._world_size)]
            for step, rank in pairs
        ]
        rows = np.concatenate([np.resize(stripe, size) for stripe in stripes])
        return {
            "step": steps,
            "rank": ranks,
            "row_id": rows,
            "label": self._labels[rows],
            "image": self._pick(rows),
        }

    def _pick(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        if len(self._images) == 1:
            return self._images[0][rows]  # type: ignore[no-any-return]
        picked = np.empty((len(rows), *self._images[0].shape[1:]), np.uint8)
        shard_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of_row):
            chosen = shard_of_row == shard
            picked[chosen] = self._images[shard][rows[chosen] - self._starts[shard]]
        return picked
