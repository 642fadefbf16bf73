"""(seed, epoch) -> the global order of training rows, with a state of one number: the step.

Training is one endless row of positions 0, 1, 2, ...; step s takes the `global_batch_size`
positions from s * global_batch_size on, and position p is row permutation(p // n)[p % n] of the
split. So every row comes exactly once an epoch, nothing is dropped at its end, each rank has its
stripe of every step, and to resume is to start at step s, with any number of workers.
"""

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

SHARE_KEY = [0, 1 << 63]
"""Key of the draw of a share; no (seed, epoch) reaches it."""


class SampleOrder:
    """The order of one run; the same on every worker.

    Args:
        num_rows: Rows of the training split.
        global_batch_size: Rows in one step over all workers.
        seed: Decides the permutations.
        unit: Rows that always stay on one rank: those that share the statistics of a norm.
        share: Share (0..1) of the rows that take part. They are drawn by chance, the same for every
            seed, and those of a smaller share are among those of a larger one.
    """

    def __init__(
        self,
        num_rows: int,
        global_batch_size: int,
        seed: int,
        unit: int = 1,
        share: float = 1.0,
    ) -> None:
        self.unit = max(1, unit)
        self._stored_rows = num_rows
        self.num_rows = num_rows if share >= 1 else max(1, round(share * num_rows))
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation: Rows = np.empty(0, np.int64)

    def num_steps(self, epochs: float) -> int:
        """Steps that cover `epochs` passes, at least one."""
        return max(1, round(epochs * self.num_rows / self.global_batch_size))

    def epoch_of(self, step: int) -> int:
        """The pass over the data to which the first row of a step belongs."""
        return step * self.global_batch_size // self.num_rows

    def rows(self, step: int) -> tuple[Rows, Rows]:
        """Row ids of a step and the epoch of each, both of shape (global_batch_size,)."""
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        epochs = positions // self.num_rows
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._of_epoch(int(epoch))[positions[chosen] % self.num_rows]
        return rows, epochs

    def stripe(self, step: int, rank: int, world_size: int) -> slice:
        """Where a rank's rows stand within those of a step: a contiguous part of whole units.

        The parts differ by at most one unit. A global batch that no number of workers divides is
        thereby still taken whole, as when one of four nodes is lost.

        Raises:
            ValueError: There are more workers than units in the global batch.
        """
        units = self.global_batch_size // self.unit
        if units < world_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} in units of {self.unit} rows is too "
                f"little for {world_size} workers"
            )
        cut = [units * at // world_size * self.unit for at in (rank, rank + 1)]
        return slice(cut[0], self.global_batch_size if rank + 1 == world_size else cut[1])

    def largest_stripe(self, world_size: int) -> int:
        """Rows of the rank that has most of them."""
        stripes = (self.stripe(0, rank, world_size) for rank in range(world_size))
        return max(int(stripe.stop - stripe.start) for stripe in stripes)

    def _of_epoch(self, epoch: int) -> Rows:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = generator.permutation(self.num_rows)
            is_whole = self.num_rows == self._stored_rows
            self._permutation = order if is_whole else _draw(self._stored_rows)[order]
            self._epoch = epoch
        return self._permutation


def _draw(num_rows: int) -> Rows:
    """All rows in an order that has nothing to do with how they are stored."""
    return np.random.Generator(np.random.Philox(key=SHARE_KEY)).permutation(num_rows)
