"""Turn a loaded engine into a service, and prove that it computes what was recorded at export."""

import io
import secrets
from collections.abc import Callable
from itertools import count

import numpy as np

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import ServeConfig
from rayloop.errors import Corrupt
from rayloop.registry.store import CHAMPION
from rayloop.serve.batcher import Batcher
from rayloop.serve.engine import Engine
from rayloop.serve.events.memory import Memory
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.service import ModelService
from rayloop.serve.shelf import Shelf
from rayloop.serve.traffic.plan import single
from rayloop.serve.variant import Variant

GOLDEN_TOLERANCE = 0.02
"""Largest difference of a golden probability (0..1). On the kind of CPU that exported the model it
is 0; on another kind a rounding may fall the other way and move a probability by about 0.01, while
saturation, a wrong file or wrong preprocessing move it by far more."""


def make_service(
    engine: Engine,
    spec: ModelSpec,
    config: ServeConfig,
    memory: Memory | None = None,
    shelf: Shelf | None = None,
) -> ModelService:
    """A service in which one version, the champion, answers everything."""
    plan = single(spec.model, CHAMPION, spec.version)
    loaded = [make_variant(f"version-{spec.version}", engine, spec, config)]
    writer = memory.writer if memory else secrets.token_hex(8)
    new_id = prediction_ids(writer)
    return ModelService(loaded, plan, config, SYSTEM_CLOCK, new_id, memory, shelf)


def make_variant(name: str, engine: Engine, spec: ModelSpec, config: ServeConfig) -> Variant:
    """An engine with its queue; to be called on the event loop that will use it."""
    batcher = Batcher(
        engine.predict,
        max_batch_rows=config.max_batch_rows,
        max_wait_s=config.max_batch_wait_ms / 1000,
        max_queued_rows=config.max_queued_rows,
    )
    return Variant(name, spec, batcher)


def prediction_ids(prefix: str) -> Callable[[], str]:
    """Makes ids of 32 hexadecimal digits, unique as long as prefixes are.

    A counter behind a random prefix: one random number a replica instead of one system call a
    request.

    Args:
        prefix: 16 random hexadecimal digits.
    """
    numbers = count(1)
    return lambda: f"{prefix}{next(numbers):016x}"


def prove(engine: Engine, golden: bytes, where: str, tolerance: float = GOLDEN_TOLERANCE) -> float:
    """Check that the engine gives the answers recorded at export, and say how far off it is.

    Args:
        engine: The loaded model.
        golden: An npz with `images` uint8 [N, H, W, C] and `probabilities` float32 [N, K].
        where: Named in the error.
        tolerance: Largest difference of a probability, 0..1.

    Returns:
        The largest difference of a probability, 0..1.

    Raises:
        Corrupt: The difference is above it.
    """
    with np.load(io.BytesIO(golden), allow_pickle=False) as rows:
        images, recorded = rows["images"], rows["probabilities"]
    found = engine.predict(images)
    difference = (
        float(np.abs(found - recorded).max()) if found.shape == recorded.shape else float("inf")
    )
    if not difference <= tolerance:
        raise Corrupt(
            f"{where}: the model's answers to the golden rows differ from the recorded ones by "
            f"{difference:.3g} (allowed {tolerance}); this machine computes it differently. "
            "Quantize and register on this kind of CPU."
        )
    return difference
