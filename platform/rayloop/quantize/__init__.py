"""TrainResult -> QuantizeResult: a smaller model, and an honest comparison with fp32."""
