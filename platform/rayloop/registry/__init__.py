"""TrainResult and QuantizeResult -> a release record, and a name that points to it."""
