"""A network's settings -> what its INT8 model costs on this machine, known before it is trained.

How long a network takes and how large its file is does not depend on what its weights have learned,
so an untrained one is exported, quantized and timed. Equal networks are measured once.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.config import Config, digest_of
from rayloop.data.versions import open_version, read_split
from rayloop.locks import exclusive
from rayloop.quantize.compare import measure_latency
from rayloop.quantize.cpu import cpu_features, needs_reduced_range
from rayloop.quantize.export import export_onnx
from rayloop.quantize.methods import StaticQuantizer, calibration_rows
from rayloop.quantize.session import open_session
from rayloop.storage import Storage
from rayloop.train.start import initial_model

CALIBRATION_ROWS = 64
SECONDS = 0.6
ROUNDS = 3


def measure_cost(storage: Storage, config: Config, clock: Clock = SYSTEM_CLOCK) -> dict[str, float]:
    """Latency and size of the static INT8 model of a configuration's network.

    One process measures at a time, and the fastest of several rounds counts, since trials may run
    beside it.

    Args:
        storage: The root; keeps what was measured under `costs/`.
        config: The run's settings: `model`, and `data` for the shape of an image.
        clock: Times the calls.

    Returns:
        `latency_ms_b1`, the median time of one image on one thread, and `size_bytes`.
    """
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    features = cpu_features()
    key = digest_of([asdict(config.model), dataset.shape, len(dataset.class_names), features])
    path = f"costs/{key[:16]}.json"
    with exclusive(storage, "costs"):
        if not storage.exists(path):
            rows = calibration_rows(read_split(storage, dataset, "train").images, CALIBRATION_ROWS)
            with tempfile.TemporaryDirectory() as folder:
                fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
                export_onnx(initial_model(config, dataset).eval(), fp32)
                StaticQuantizer(
                    fp32=fp32, rows=rows, reduce_range=needs_reduced_range(features),
                    cache=Path(folder) / "ranges.json",
                ).write(int8)  # fmt: skip
                session = open_session(int8, 1)
                points = [
                    measure_latency({"int8": session}, rows, 1, SECONDS / ROUNDS, clock)["int8"]
                    for _ in range(ROUNDS)
                ]
                found = {
                    "latency_ms_b1": round(min(point.median_ms for point in points), 5),
                    "size_bytes": float(int8.stat().st_size),
                }
            storage.write_json(path, found)
    return {name: float(value) for name, value in storage.read_json(path).items()}
