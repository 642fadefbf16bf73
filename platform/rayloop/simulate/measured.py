"""A calibration that comes with rayloop, for those who have not trained anything yet."""

from rayloop.simulate.calibration import Calibration

LAPTOP = Calibration(
    name="laptop preset on 2 virtual cores",
    source="benchmarks/training_2core-avx2_2026-11-21.md: a quiet core makes 1,700 images/s, as "
    "do two workers on both; noise, link and four workers are guesses",
    fixed_s=0.0,
    row_s=1 / 1700,
    rows_per_worker=64,
    least_rows=32,
    largest_rows=256,
    noise=0.1,
    cores=2,
    contention=((1, 1.0), (2, 1.9), (4, 3.8)),
    platform_cores=0.07,
    exchange_bytes=8 * 98_000,
    node_latency_s=2e-4,
    crowded_latency_s=1.6e-3,
    node_bytes_per_s=1e9,
    hidden_share=0.0,
    checkpoint_s=1.2e-3,
    checkpoint_bytes=821_260,
    start_s=16.3,
    restart_s=12.6,
    workers=4,
    run_rows=540_000,
)
