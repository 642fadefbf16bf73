"""BentoML: a raw body as a file, or (BENCH_FORM `batch`) JSON arrays with its adaptive batching.

BentoML's batching takes arrays, which reach its main server as JSON only; raw bytes reach an API
as a file.
"""

from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType, DType
from engine import FORM, MAX_BATCH, WORKERS, images_of, load

RAW = "application/octet-stream"

if FORM == "batch":

    @bentoml.service(
        workers=WORKERS, traffic={"timeout": 30}, logging={"access": {"enabled": False}}
    )
    class Classifier:
        """Images as nested numbers."""

        def __init__(self) -> None:
            self.engine = load()

        @bentoml.api(route="/infer", batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000)
        def infer(self, image: Annotated[np.ndarray, DType("uint8")]) -> np.ndarray:
            """Probabilities."""
            return self.engine(image)

else:

    @bentoml.service(
        workers=WORKERS, traffic={"timeout": 30}, logging={"access": {"enabled": False}}
    )
    class Classifier:
        """Images as a raw body."""

        def __init__(self) -> None:
            self.engine = load()

        @bentoml.api(route="/infer")
        def infer(
            self, body: Annotated[Path, ContentType(RAW)], /
        ) -> Annotated[bytes, ContentType(RAW)]:
            """Probabilities as raw floats."""
            return self.engine(images_of(body.read_bytes())).tobytes()
