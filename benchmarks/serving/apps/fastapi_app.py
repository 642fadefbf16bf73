"""A bare FastAPI application around the engine: the floor a Python server can reach.

BENCH_FORM `inline` runs the engine on the event loop (no thread hop; health checks wait for it);
`pool` is a plain `def` endpoint, which FastAPI runs in its thread pool.
"""

from engine import FORM, images_of, load
from fastapi import Body, FastAPI, Request, Response

app = FastAPI()
predict = load()
RAW = "application/octet-stream"

if FORM == "pool":

    @app.post("/infer")
    def infer(body: bytes = Body(media_type=RAW)) -> Response:
        """Probabilities of the raw images in the body."""
        return Response(predict(images_of(body)).tobytes(), media_type=RAW)

else:

    @app.post("/infer")
    async def infer(request: Request) -> Response:
        """Probabilities of the raw images in the body."""
        body = await request.body()
        return Response(predict(images_of(body)).tobytes(), media_type=RAW)
