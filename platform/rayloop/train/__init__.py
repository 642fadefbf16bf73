"""Stage 3: batches -> checkpoint and TrainResult."""
