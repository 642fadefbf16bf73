"""An fp32 ONNX file and calibration rows -> INT8 files, and which layers suffer from it.

Static INT8 is QDQ with uint8 activations and int8 weights per channel, the one form for which
ONNX Runtime has fast kernels on x86. Dynamic INT8 computes ranges at run time and touches matrix
products only; it is kept for comparison.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from rayloop.errors import WorkError
from rayloop.quantize import graph
from rayloop.quantize.export import INPUT_NAME, quiet
from rayloop.quantize.session import Images, Probabilities, open_session, predict

FP32, INT8_STATIC, INT8_DYNAMIC = "fp32", "int8_static", "int8_dynamic"
STATIC_OPS = [
    *graph.WEIGHT_OPS,
    *("Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Flatten", "Reshape", "Transpose"),
]
DYNAMIC_OPS = list(graph.PRODUCTS)
CALIBRATION_BATCH = 64


class RowReader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration rows in the form ONNX Runtime reads them: one batch a call, None at the end."""

    def __init__(self, images: Images) -> None:
        self._batches: Iterator[Images] = iter(
            [images[at : at + CALIBRATION_BATCH] for at in range(0, len(images), CALIBRATION_BATCH)]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def calibration_rows(images: Images, count: int) -> Images:
    """Rows spread evenly over a split, the same ones every time.

    Args:
        images: uint8, shape (N, H, W, C).
        count: How many; all of them when there are fewer.
    """
    chosen = np.linspace(0, len(images) - 1, num=min(count, len(images)))
    return images[np.unique(chosen.round().astype(np.int64))]


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticQuantizer:
    """Makes static INT8 files of one fp32 file; activation ranges are measured once.

    Attributes:
        fp32: The file `export_onnx` wrote.
        rows: uint8 calibration rows, shape (N, H, W, C).
        reduce_range: Use 7-bit weights, for machines without VNNI.
        cache: File for the measured ranges; written by the first call.
    """

    fp32: Path
    rows: Images
    reduce_range: bool
    cache: Path

    def write(self, target: Path, excluded: Sequence[str] = ()) -> None:
        """Write an INT8 file.

        Args:
            target: The file to write.
            excluded: Names of layers that stay in fp32.
        """
        model = onnx.load(self.fp32)
        with quiet():
            quantize_static(
                str(self.fp32),
                str(target),
                RowReader(self.rows),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=self.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=STATIC_OPS,
                nodes_to_exclude=[*graph.outside_layers(model), *excluded],
                calibration_cache_path=str(self.cache),
                # Logits in 8 bits would be the coarsest step of the whole graph.
                extra_options={"OpTypesToExcludeOutputQuantization": list(graph.PRODUCTS)},
            )
        make_small(target)

    def layers(self) -> list[str]:
        """Names of the layers that can be quantized, in graph order."""
        return graph.layer_names(onnx.load(self.fp32))


def write_dynamic(fp32: Path, target: Path, reduce_range: bool) -> None:
    """Write an INT8 file whose activations are quantized at run time, matrix products only.

    Args:
        fp32: The file `export_onnx` wrote.
        target: The file to write.
        reduce_range: Use 7-bit weights, for machines without VNNI.
    """
    with quiet():
        quantize_dynamic(
            str(fp32),
            str(target),
            op_types_to_quantize=DYNAMIC_OPS,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
        )
    make_small(target)


def make_small(path: Path) -> None:
    """Rewrite a finished ONNX file without names and notes that only cost bytes."""
    model = onnx.load(path)
    graph.strip(model)
    graph.drop_zero_points(model)
    graph.shorten_names(model)
    onnx.save(model, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """What quantizing one layer alone does to the answers.

    Attributes:
        layer: The layer's name in the fp32 graph.
        error: Mean total variation distance (0..1) between fp32's probabilities and those of the
            model in which only this layer is INT8.
    """

    layer: str
    error: float


def rank_layers(quantizer: StaticQuantizer, folder: Path, rows: Images) -> tuple[LayerError, ...]:
    """Quantize one layer at a time and order the layers by the error it causes, worst first.

    Args:
        quantizer: Of the model in question.
        folder: Where files may be put.
        rows: uint8 rows to compare on, shape (N, H, W, C); training rows.

    Raises:
        WorkError: The model has no layer to quantize.
    """
    layers = quantizer.layers()
    if not layers:
        raise WorkError(
            f"{quantizer.fp32.name} has no convolution and no linear layer with constant weights, "
            "so there is nothing to quantize; choose another model.name."
        )
    wanted = predict(open_session(quantizer.fp32), rows)
    errors = []
    for layer in layers:
        target = folder / "one_layer.onnx"
        quantizer.write(target, [other for other in layers if other != layer])
        answers = predict(open_session(target), rows)
        errors.append(LayerError(layer=layer, error=total_variation(wanted, answers)))
        target.unlink()
    return tuple(sorted(errors, key=lambda entry: -entry.error))


def total_variation(first: Probabilities, second: Probabilities) -> float:
    """Mean over rows of half the summed absolute difference: 0 equal, 1 disjoint."""
    return float(np.abs(first - second).sum(axis=1).mean() / 2)
