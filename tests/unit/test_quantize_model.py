"""A small trained network through export, INT8, comparison and gate, without Ray."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import ModelConfig, QuantizeConfig
from rayloop.data.versions import Split
from rayloop.errors import Corrupt, DataMissing, WorkError
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.quantize.cpu import cpu_features
from rayloop.quantize.export import WithSoftmax, check_export, export_onnx
from rayloop.quantize.methods import StaticQuantizer, rank_layers
from rayloop.quantize.result import QuantizeResult, load_quantize_result
from rayloop.quantize.session import open_session, predict
from rayloop.quantize.work import Chosen, Job, quantize_model, search
from rayloop.storage import Storage
from rayloop.train.result import TrainResult

CONFIG = QuantizeConfig(
    max_accuracy_drop=0.02, min_agreement=0.95, seconds_per_point=0.01, batch_sizes=(1, 32)
)
NAMES = tuple(str(digit) for digit in range(10))


def digits() -> tuple[Split, Split]:
    """Scikit-learn's digits as uint8 images, in a training and a test split."""
    found = load_digits()
    images = (found.images * 15).astype(np.uint8)[..., None]
    labels = found.target.astype(np.int64)
    rows = np.arange(len(labels))
    first, last = slice(0, 1200), slice(1200, None)
    return tuple(Split(images[at], labels[at], rows[at]) for at in (first, last))  # type: ignore[return-value]


def train_briefly(rows: Split) -> ImageClassifier:
    """A network that knows something after a second."""
    model = build_classifier(
        ModelConfig(widths=(8, 16)), (8, 8, 1), 10, (0.3,), (0.37,), seed=0
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        chosen = torch.randint(0, len(rows), (128,), generator=generator).numpy()
        logits = model(torch.from_numpy(rows.images[chosen]))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(rows.labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained_result() -> TrainResult:
    """The record of a run that never was."""
    return TrainResult(
        run_id="r1", checkpoint="c", checkpoint_digest="d" * 64, model_name="fastnet",
        num_parameters=1, dataset_name="digits", dataset_version="v", dataset_digest="e" * 64,
        class_names=NAMES, shape=(8, 8, 1), pixel_mean=(0.3,), pixel_std=(0.37,),
        val_accuracy=0.9, test_accuracy=0.9, floor_accuracy=0.5, steps=80, images_per_second=1.0,
        data_wait_share=0.0, mfu=None, goodput=1.0, step_ms={}, seconds=1.0, precision="fp32",
        feed="resident", num_workers=1, resumed_at_step=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    """Training and test rows."""
    return digits()


@pytest.fixture(scope="module")
def model(splits: tuple[Split, Split]) -> ImageClassifier:
    """A trained network."""
    return train_briefly(splits[0])


@pytest.fixture(scope="module")
def job(splits: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job on digits in a folder of its own."""
    return Job(
        config=CONFIG,
        clock=SYSTEM_CLOCK,
        folder=tmp_path_factory.mktemp("quantize"),
        train_rows=splits[0],
        split="test",
        rows=splits[1],
        class_names=NAMES,
        features=cpu_features(),
    )


@pytest.fixture(scope="module")
def result(job: Job, model: ImageClassifier) -> QuantizeResult:
    """The whole comparison, once."""
    last = list(quantize_model(job, model, trained_result()))[-1]
    assert isinstance(last, QuantizeResult)
    return last


@pytest.fixture
def quantizer(job: Job, result: QuantizeResult, tmp_path: Path) -> StaticQuantizer:
    """Makes INT8 files of the exported network."""
    return StaticQuantizer(
        fp32=job.folder / result.methods[0].file,
        rows=job.train_rows.images[:128],
        reduce_range=True,
        cache=tmp_path / "ranges.json",
    )


def test_export_answers_as_torch_does(
    job: Job, result: QuantizeResult, model: ImageClassifier
) -> None:
    """Same probabilities for any batch size, from raw uint8 images."""
    session = open_session(job.folder / "fp32.onnx")
    assert [(entry.name, entry.type) for entry in session.get_inputs()] == [
        ("image", "tensor(uint8)")
    ]
    assert [entry.name for entry in session.get_outputs()] == ["probabilities"]
    images = job.rows.images[:7]
    with torch.inference_mode():
        wanted = WithSoftmax(model)(torch.from_numpy(images)).numpy()
    for size in (1, 2, 7):
        np.testing.assert_allclose(predict(session, images, size), wanted, atol=1e-5)
    assert not list(job.folder.glob("*.data"))


def test_a_wrong_export_is_found(job: Job, result: QuantizeResult, model: ImageClassifier) -> None:
    """The check compares with the module that was exported, not with itself."""
    other = build_classifier(ModelConfig(widths=(8, 16)), (8, 8, 1), 10, (0.3,), (0.37,), seed=9)
    with pytest.raises(WorkError, match="away from"):
        check_export(WithSoftmax(other).eval(), job.folder / "fp32.onnx", (8, 8, 1))


def test_int8_passes_and_every_figure_is_there(job: Job, result: QuantizeResult) -> None:
    """The static model is chosen, smaller, and close to fp32."""
    assert (result.chosen, result.gate, result.passed) == ("int8_static", "pass", True)
    fp32, static = result.method("fp32"), result.method("int8_static")
    assert fp32.accuracy > 0.85
    assert abs(fp32.accuracy - static.accuracy) <= CONFIG.max_accuracy_drop
    assert static.size_bytes < fp32.size_bytes
    assert static.size_bytes == (job.folder / static.file).stat().st_size
    assert sum(map(sum, result.confusion)) == result.test_rows == len(job.rows)
    wrong = result.test_rows - round(static.accuracy * result.test_rows)
    assert len(result.mistakes) == min(24, wrong)
    line = result.summary()
    assert set(line["methods"][0]) == {
        "name", "accuracy", "size_bytes", "latency_ms_b1", "images_per_second_b32",
    }  # fmt: skip
    with pytest.raises(DataMissing, match="batch size 64"):
        static.at_batch(64)


def test_int8_answers_do_not_depend_on_the_batch(result: QuantizeResult) -> None:
    """A served answer can be compared with a batch's, bit for bit."""
    assert result.method("int8_static").batch_difference == 0


def test_predictions_and_golden_rows_are_the_models_own(job: Job, result: QuantizeResult) -> None:
    """What is stored is what the chosen file computes."""
    session = open_session(job.folder / "int8_static.onnx")
    with np.load(job.folder / "golden.npz") as golden:
        answers = predict(session, golden["images"], 1)
        np.testing.assert_array_equal(answers, golden["probabilities"])
    with np.load(job.folder / "predictions.npz") as stored:
        assert len(stored["row_ids"]) == len(job.rows)
        accuracy = (stored["class_index"] == stored["labels"]).mean()
    assert accuracy == pytest.approx(result.method("int8_static").accuracy)


def test_reduced_range_keeps_one_bit_free(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    """With it weights stay within 7 bits, and without it they do not."""
    for reduce_range, limit in ((True, 64), (False, 127)):
        target = tmp_path / "int8.onnx"
        replace(quantizer, reduce_range=reduce_range).write(target)
        weights = [
            numpy_helper.to_array(tensor)
            for tensor in onnx.load(target).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        ]
        assert max(int(np.abs(entry.astype(int)).max()) for entry in weights) == limit


def test_excluded_layers_stay_in_fp32(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    """With every layer excluded the answers are fp32's; the ranking is by falling error."""
    layers = quantizer.layers()
    quantizer.write(tmp_path / "none.onnx", layers)
    images = quantizer.rows[:20]
    np.testing.assert_allclose(
        predict(open_session(tmp_path / "none.onnx"), images),
        predict(open_session(quantizer.fp32), images),
        atol=1e-6,
    )
    ranking = rank_layers(quantizer, tmp_path, images)
    assert {entry.layer for entry in ranking} == set(layers)
    errors = [entry.error for entry in ranking]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0


def test_search_leaves_out_layers_before_it_gives_up(
    job: Job, result: QuantizeResult, quantizer: StaticQuantizer, tmp_path: Path
) -> None:
    """A gate nothing can pass costs as many attempts as configured, then the reasons stand."""
    config = replace(CONFIG, max_accuracy_drop=0.0, max_excluded_layers=2)
    strict = replace(job, config=config, folder=tmp_path)
    perfect = np.eye(10, dtype=np.float32)[job.rows.labels]
    found = list(search(strict, quantizer, tmp_path / "int8.onnx", perfect))[-1]
    assert isinstance(found, Chosen)
    assert [len(attempt["excluded"]) for attempt in found.attempts] == [0, 1, 2]
    worst = [entry.layer for entry in found.sensitivity[:2]]
    assert list(found.excluded) == worst
    assert "max_accuracy_drop=0.0" in found.reasons[0]


def test_result_survives_storage_and_damage_is_told(result: QuantizeResult, tmp_path: Path) -> None:
    """Read back it is equal; missing and damaged files say what to do."""
    storage = Storage(str(tmp_path))
    with pytest.raises(DataMissing, match="jobs/quantize.py"):
        load_quantize_result(storage, "r1")
    storage.write_json("runs/r1/quantize/result.json", result.to_json())
    assert load_quantize_result(storage, "r1") == result
    storage.write_json("runs/r1/quantize/result.json", {"run_id": "r1"})
    with pytest.raises(Corrupt, match="jobs/quantize.py"):
        load_quantize_result(storage, "r1")


def test_export_is_repeatable(model: ImageClassifier, job: Job, result: QuantizeResult) -> None:
    """The same weights give the same bytes, so a release's digest names them."""
    target = job.folder / "again.onnx"
    export_onnx(model, target)
    assert target.read_bytes() == (job.folder / "fp32.onnx").read_bytes()
