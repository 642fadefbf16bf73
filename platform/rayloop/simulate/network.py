"""Bytes and workers -> seconds of an all-reduce, what of it a step feels, and who is waited for.

The cost of a message is latency plus bytes over bandwidth (the alpha-beta model, Hockney 1994). An
all-reduce takes the faster of two algorithms, as NCCL and MPI choose by size: the ring, which sends
least, and halving and doubling, which takes fewest turns (Thakur, Rabenseifner and Gropp 2005).
Between nodes each worker exchanges its own part of the sum, so that a node's link carries every
byte once. Rings that meet in a switch are left out: the network is taken as full bisection.
"""

from dataclasses import dataclass
from statistics import NormalDist

BUCKET_BYTES = 25 * 2**20
"""Gradients that DDP exchanges at once, PyTorch's default (Li et al. 2020); the last bucket is
ready when the backward pass is over, so nothing hides it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What connects two ends.

    Attributes:
        latency_s: Seconds until an empty message has arrived.
        bytes_per_s: Bandwidth each way of one end.
    """

    latency_s: float
    bytes_per_s: float


def ring_s(num_bytes: float, count: int, link: Link) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) turns of 1/n of the bytes each.

    Args:
        num_bytes: Of the summed tensor.
        count: Ends of the ring; one has nobody to talk to.
        link: Between neighbours.
    """
    turns = 2 * (count - 1)
    return turns * link.latency_s + turns / count * num_bytes / link.bytes_per_s


def halving_s(num_bytes: float, count: int, link: Link) -> float:
    """Seconds of a recursive halving and doubling all-reduce.

    2 log2 n turns and as many bytes as the ring; where n is no power of two, those beyond it hand
    their bytes over first and get the sum last, which costs two turns and the bytes twice more.

    Args:
        num_bytes: Of the summed tensor.
        count: Ends.
        link: Between any two.
    """
    if count < 2:
        return 0.0
    doublings = count.bit_length() - 1
    inner, turns = 1 << doublings, 2 * doublings
    sent = 2 * (inner - 1) / inner * num_bytes
    if inner < count:
        turns, sent = turns + 2, sent + 2 * num_bytes
    return turns * link.latency_s + sent / link.bytes_per_s


def all_reduce_s(num_bytes: float, count: int, link: Link) -> float:
    """Seconds of an all-reduce by the faster algorithm; 0 for one worker."""
    return min(ring_s(num_bytes, count, link), halving_s(num_bytes, count, link))


def exposed_s(exchange_s: float, hides_under_s: float, num_bytes: float) -> float:
    """Seconds of an exchange that a step feels where it runs beside the backward pass.

    The last bucket cannot hide; the others do as long as the backward pass lasts.

    Args:
        exchange_s: Of the whole exchange.
        hides_under_s: Of the computation it runs beside; 0 if it waits for all of it.
        num_bytes: Of the exchange.
    """
    if hides_under_s <= 0 or num_bytes <= 0:
        return exchange_s
    last = min(1.0, BUCKET_BYTES / num_bytes) * exchange_s
    return max(last, exchange_s - hides_under_s)


def slowest_of(count: int) -> float:
    """How many standard deviations the slowest of so many workers lies behind the mean.

    The expected largest of n independent normal numbers, Blom 1958: the quantile at
    (n - 3/8) / (n + 1/4); within 5% of the exact value for n = 2, within 1% from 10 on. Steps have
    longer tails than the normal ones have, so on thousands of machines this is the least to expect.
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
