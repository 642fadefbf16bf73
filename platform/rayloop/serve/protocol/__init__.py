"""The Open Inference Protocol V2: bytes of a request -> an image batch, probabilities -> bytes."""
