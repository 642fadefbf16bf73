"""TrainResult and QuantizeResult -> ModelVersion: a release record, and a name that points to it."""
