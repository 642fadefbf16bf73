"""LitServe with its own batching; raw bytes in and out."""

from typing import Annotated

import litserve
import numpy as np
from engine import FORM, MAX_BATCH, MAX_WAIT_S, PORT, WORKERS, images_of, load
from fastapi import Body, Response

RAW = "application/octet-stream"


class Classifier(litserve.LitAPI):
    """Decode, batch, predict, unbatch and encode, as LitServe asks for them."""

    def setup(self, device: str) -> None:
        """Load the engine in the worker."""
        self.engine = load()

    def decode_request(self, request: Annotated[bytes, Body(media_type=RAW)]) -> np.ndarray:
        """Raw bytes -> images [n, H, W, C]."""
        return images_of(request)

    def batch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
        """Join the requests' images and remember how many each has."""
        return np.concatenate(inputs), [len(images) for images in inputs]

    def predict(self, x):
        """Probabilities, joint for a batch."""
        if isinstance(x, tuple):
            return self.engine(x[0]), x[1]
        return self.engine(x)

    def unbatch(self, output: tuple[np.ndarray, list[int]]) -> list[np.ndarray]:
        """Split the probabilities again."""
        return np.split(output[0], np.cumsum(output[1])[:-1])

    def encode_response(self, output: np.ndarray) -> Response:
        """Raw little-endian floats."""
        return Response(output.tobytes(), media_type=RAW)


if __name__ == "__main__":
    single = "single" in FORM
    api = Classifier(
        max_batch_size=1 if single else MAX_BATCH, batch_timeout=0.0 if single else MAX_WAIT_S,
        api_path="/infer",
    )  # fmt: skip
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=WORKERS, fast_queue="fast" in FORM
    )
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=WORKERS,
        log_level="warning",
        generate_client_file=False,
    )
