"""A calibration that comes with rayloop, for those who have not trained anything yet."""

from rayloop.simulate.calibration import Calibration

LAPTOP = Calibration(
    name="laptop preset on 2 virtual cores",
    source="benchmarks/simulator_2core_2026-11-22.md, Intel Xeon, batch of 256 rows",
    fixed_s=2.65e-3,
    row_s=2.78e-4,
    rows_per_worker=64,
    least_rows=64,
    largest_rows=256,
    noise=0.052,
    cores=2,
    contention=((1, 1.0), (2, 1.033), (4, 2.465)),
    platform_cores=0.083,
    exchange_bytes=784_000,
    node_latency_s=1.43e-4,
    crowded_latency_s=1.165e-3,
    node_bytes_per_s=2.0e9,
    hidden_share=0.0,
    checkpoint_s=1.28e-3,
    checkpoint_bytes=819_436,
    start_s=10.4,
    restart_s=5.7,
    workers=4,
    run_rows=323_472,
)
