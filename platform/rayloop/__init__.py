"""rayloop: from raw rows to a served, quantized model and back, on Ray."""

__version__ = "0.1.0"
