"""Sizes of a plan -> how its workers are divided, and how long a pipeline stands idle.

Workers = data x pipeline x tensor. A pipeline's stages work on micro-batches one after the other;
while it fills and drains, stages wait. With GPipe's schedule or 1F1B a step of m micro-batches on p
stages lasts (m + p - 1) slots instead of m; with v chunks of layers on each stage the idle part is
1/v of that (interleaved 1F1B, Narayanan et al. 2021, section 2.2).
"""

from dataclasses import dataclass

from rayloop.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How the workers of a plan are divided.

    Attributes:
        data: Replicas of the whole model.
        pipeline: Stages of a replica.
        tensor: Workers that share each layer of a stage.
        micro_batches: Of a replica in one step.
        chunks: Groups of layers on each stage; 1 is plain 1F1B.
    """

    data: int
    pipeline: int = 1
    tensor: int = 1
    micro_batches: int = 1
    chunks: int = 1

    @property
    def workers(self) -> int:
        """All of them."""
        return self.data * self.pipeline * self.tensor

    @property
    def bubble(self) -> float:
        """Idle time of a step's computation over its busy time: (p - 1) / (v m)."""
        return (self.pipeline - 1) / (self.chunks * self.micro_batches)

    @property
    def bubble_share(self) -> float:
        """Idle share (0..1) of a step's computation: (p - 1) / (v m + p - 1)."""
        return self.bubble / (1 + self.bubble)


def divide(
    workers: int, pipeline: int = 1, tensor: int = 1, micro_batches: int = 1, chunks: int = 1
) -> Division:
    """Divide workers among replicas.

    Raises:
        ConfigError: They do not make whole replicas.
    """
    each = pipeline * tensor
    if workers % each:
        raise ConfigError(
            f"{workers} workers do not make whole replicas of {each} workers "
            f"({pipeline} stages of {tensor}); use a multiple of {each}."
        )
    return Division(
        data=workers // each, pipeline=pipeline, tensor=tensor, micro_batches=micro_batches,
        chunks=chunks,
    )  # fmt: skip
