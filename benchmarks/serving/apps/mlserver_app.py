"""MLServer: a custom runtime, as its documentation shows, with its adaptive batching if asked.

Over REST MLServer reads JSON only; over gRPC raw tensors. Images come as `image` UINT8.
"""

import numpy as np
from engine import images_of, load
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Classifier(MLModel):
    """The engine behind the V2 protocol."""

    async def load(self) -> bool:
        """Load the engine."""
        self.engine = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Probabilities of the one input."""
        tensor = payload.inputs[0]
        if tensor.datatype == "BYTES":
            from mlserver.codecs import Base64Codec

            images = images_of(b"".join(Base64Codec.decode_input(tensor)))
        else:
            images = NumpyCodec.decode_input(tensor)
        output: ResponseOutput = NumpyCodec.encode_output(
            "probabilities", np.asarray(self.engine(images))
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
