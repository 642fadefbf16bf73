"""Stage 1: raw rows -> DatasetVersion -> per-worker batches."""
