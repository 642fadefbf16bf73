"""Ray Serve as its documentation shows it: its own proxy, Starlette requests, `@serve.batch`."""

import signal
import threading

import numpy as np
import ray
from engine import MAX_BATCH, MAX_WAIT_S, PORT, WORKERS, images_of, load
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(
    num_replicas=WORKERS, max_ongoing_requests=4 * MAX_BATCH, ray_actor_options={"num_cpus": 1}
)
class Classifier:
    """Raw images in, raw floats out."""

    def __init__(self) -> None:
        self.engine = load()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT_S)
    async def infer(self, requests: list[np.ndarray]) -> list[np.ndarray]:
        """Probabilities of each request's images."""
        joint = self.engine(np.concatenate(requests))
        return np.split(joint, np.cumsum([len(images) for images in requests])[:-1])

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        answer = await self.infer(images_of(await request.body()))
        return Response(answer.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classifier.bind(), route_prefix="/infer")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
