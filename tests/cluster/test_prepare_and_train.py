"""Data and training on a local Ray: versions, quarantine, and runs that agree to the last bit."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

from rayloop.cluster import LOCAL_RAY
from rayloop.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from rayloop.data.prepare import prepare
from rayloop.data.versions import newest_version, open_version, read_split
from rayloop.errors import ConfigError, DataMissing, DataRefused, DoesNotFit, RequestError
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.result import TrainResult, load_model, load_result
from rayloop.train.run import Trainer, train

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def storage(home: Path) -> Storage:
    """An empty root."""
    return Storage(str(home))


def png(index: int, size: tuple[int, int] = (6, 8)) -> bytes:
    """A grey image unlike all others."""
    pixels = np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 60) -> Path:
    """A folder of PNGs by class."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index:03d}.png").write_bytes(png(number * 1000 + index))
    return root


def folder_config(path: Path, **changes: Any) -> DataConfig:
    """Settings for a folder of images."""
    settings = {"val_share": 0.2, "test_share": 0.2, "name": "pets", **changes}
    return DataConfig(source="image-folder", path=str(path), **settings)


def test_digits_are_prepared_once(storage: Storage) -> None:
    config = DataConfig(source="digits", rows_per_shard=500)
    first = prepare(config, storage)
    assert first.is_new
    assert sum(first.dataset.splits.values()) + sum(
        first.dataset.notes[name] for name in ("left_out_as_copies_of_test_rows",)
    ) == 1797  # fmt: skip
    manifest = storage.read(f"{first.dataset.folder}/manifest.json")
    again = prepare(config, storage)
    assert not again.is_new
    assert again.dataset == first.dataset == open_version(storage, "digits")
    assert storage.read(f"{first.dataset.folder}/manifest.json") == manifest
    train_rows = read_split(storage, first.dataset, "train")
    assert sum(shard.split == "train" for shard in first.dataset.shards) == 3
    assert np.bincount(train_rows.labels).tolist() == list(
        first.dataset.class_counts["train"].values()
    )
    scaled = train_rows.images / 255
    assert first.dataset.pixel_mean[0] == pytest.approx(scaled.mean(), abs=1e-5)
    assert first.dataset.pixel_std[0] == pytest.approx(scaled.std(), abs=1e-5)
    one_shard = prepare(replace(config, rows_per_shard=50_000, name="other"), storage).dataset
    assert one_shard.digest == first.dataset.digest
    assert np.array_equal(read_split(storage, one_shard, "train").images, train_rows.images)


def test_bad_rows_within_the_share_are_left_out_and_listed(
    storage: Storage, tmp_path: Path
) -> None:
    folder = image_folder(tmp_path / "photos")
    (folder / "cat" / "cut.png").write_bytes(png(1)[:60])
    (folder / "dog" / "large.png").write_bytes(png(2, size=(9, 9)))
    dataset = prepare(folder_config(folder, max_bad_share=0.02), storage).dataset
    assert dataset.refused == {"undecodable": 1, "wrong shape": 1}
    assert dataset.class_names == ("cat", "dog")
    assert dataset.shape == (6, 8, 1)
    assert sum(dataset.splits.values()) == 120
    lines = storage.read(f"{dataset.folder}/quarantine.jsonl").decode().splitlines()
    listed = {row["origin"]: row["reason"].split(":")[0] for row in map(json.loads, lines)}
    assert listed == {"cat/cut.png": "undecodable", "dog/large.png": "wrong shape"}


def test_more_bad_rows_than_the_share_make_no_version(storage: Storage, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "photos")
    (folder / "cat" / "cut.png").write_bytes(png(1)[:60])
    with pytest.raises(DataRefused, match=r"1 of 121 rows \(0\.8%\).*cat/cut\.png"):
        prepare(folder_config(folder, max_bad_share=0.005), storage)
    assert newest_version(storage, "pets") == ""
    assert storage.names("datasets/pets") == ["quarantine.jsonl"]


def test_what_cannot_train_a_classifier_is_refused(storage: Storage, tmp_path: Path) -> None:
    one_class = image_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(RequestError, match=r"one class only \('cat'\)"):
        prepare(folder_config(one_class), storage)
    two_rows = image_folder(tmp_path / "two", count=1)
    with pytest.raises(RequestError, match="split of pets would be empty: 2 good rows"):
        prepare(folder_config(two_rows, val_share=0.0), storage)
    with pytest.raises(DataMissing, match="does not exist"):
        prepare(folder_config(tmp_path / "nothing"), storage)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissing, match="has no images"):
        prepare(folder_config(tmp_path / "empty"), storage)
    assert newest_version(storage, "pets") == ""


def test_a_given_test_split_is_kept_and_its_copies_leave_training(
    storage: Storage, tmp_path: Path
) -> None:
    image_folder(tmp_path / "photos" / "train")
    image_folder(tmp_path / "photos" / "test", count=10)  # the same images as the first of train
    dataset = prepare(folder_config(tmp_path / "photos"), storage).dataset
    assert dataset.splits["test"] == 20
    assert dataset.notes["left_out_as_copies_of_test_rows"] == 20
    assert dataset.splits["train"] + dataset.splits["val"] == 100


@pytest.mark.parametrize("label_kind", ["int", "name", "bytes"])
def test_parquet_with_encoded_images(storage: Storage, tmp_path: Path, label_kind: str) -> None:
    names = {"int": [0, 1], "name": ["cat", "dog"], "bytes": [b"cat", b"dog"]}[label_kind]
    labels = [names[index % 2] for index in range(80)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [png(index) for index in range(80)], "label": labels}), path)
    config = DataConfig(
        source="parquet", path=str(path), name="p", val_share=0.2, test_share=0.2, max_bad_share=0.0
    )
    dataset = prepare(config, storage).dataset
    assert dataset.class_names == (("0", "1") if label_kind == "int" else ("cat", "dog"))
    assert sum(dataset.splits.values()) == 80
    assert sum(sum(counts.values()) for counts in dataset.class_counts.values()) == 80


def test_parquet_with_numbers_refuses_ragged_rows_and_nan(storage: Storage, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images: list[Any] = random.integers(0, 255, (78, 4, 4)).astype(float).tolist()
    images.append([[float("nan")] * 4] * 4)
    images.append([[1.0, 2.0], [3.0]])
    labels = [0.0, 1.0] * 40
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    config = DataConfig(
        source="parquet",
        path=str(path),
        name="n",
        val_share=0.2,
        test_share=0.2,
        max_bad_share=0.05,
    )
    dataset = prepare(config, storage).dataset
    assert dataset.refused == {"NaN or infinite pixel": 1, "undecodable": 1}
    assert sum(dataset.splits.values()) == 78


# --- training


def run_config(run_id: str, feed: Any = "resident", **changes: Any) -> Config:
    """A short run over the digits."""
    settings = {"epochs": 4, "global_batch_size": 64, "norm_group_rows": 32, "floor_epochs": 0.0}
    return Config(
        run_id=run_id,
        data=DataConfig(source="digits", val_share=0.15, feed=feed, steps_per_block=8),
        model=ModelConfig(widths=(8, 16)),
        train=TrainConfig(
            augment=AugmentConfig(flip=False, translate_px=1), **{**settings, **changes}
        ),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A root with the digits, kept for the runs of this file."""
    storage = Storage(str(tmp_path_factory.mktemp("runs")))
    prepare(run_config("").data, storage)
    return storage


def run(root: Storage, config: Config) -> TrainResult:
    """Train with the tracker of that root."""
    return train(config, root, Tracker(root))


def test_both_feeds_train_the_same_model(root: Storage) -> None:
    resident = run(root, run_config("resident"))
    stream = run(root, run_config("stream", feed="stream"))
    assert (resident.feed, stream.feed) == ("resident", "stream")
    assert resident.num_workers == 2
    assert resident.steps == stream.steps > 30
    assert resident.checkpoint_digest == stream.checkpoint_digest
    assert resident.test_accuracy == stream.test_accuracy
    assert resident.test_accuracy > 0.5
    assert load_result(root, "resident") == resident
    assert not load_model(root, stream).training


def test_a_local_run_starts_no_process_that_it_has_no_use_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def callbacks(**more: Any) -> set[str]:
        trainer = Trainer(lambda: None, **more)
        return {type(one).__name__ for one in trainer._create_default_callbacks()}

    datasets, cleaner = "DatasetsCallback", "PlacementGroupCleanerCallback"
    assert not callbacks() & {datasets, cleaner}
    assert datasets in callbacks(datasets={"train": ray.data.range(1)})
    monkeypatch.delenv(LOCAL_RAY)
    assert cleaner in callbacks()


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(root: Storage) -> None:
    done = load_result(root, "resident")
    assert run(root, run_config("resident")) == done
    with pytest.raises(ConfigError, match=r"train\.epochs was 4, now 5"):
        run(root, run_config("resident", epochs=5))


@pytest.mark.parametrize(
    "changes", [{"num_workers": 64}, {"cpus_per_worker": 64}, {"use_gpu": True}]
)
def test_what_cannot_be_scheduled_is_refused_at_once(
    root: Storage, changes: dict[str, Any]
) -> None:
    with pytest.raises(DoesNotFit, match="the cluster has 4 CPUs and 0 GPUs on 1 node"):
        run(root, run_config("too-large", **changes))
    assert not root.exists("runs/too-large")


def test_a_batch_larger_than_the_training_split_is_refused(root: Storage) -> None:
    with pytest.raises(RequestError, match=r"global_batch_size=4096 is more than the \d+ training"):
        run(root, run_config("too-large", global_batch_size=4096))
    assert not root.exists("runs/too-large")


def test_a_run_without_its_data_is_refused(root: Storage) -> None:
    config = run_config("no-data")
    with pytest.raises(DataMissing, match="There is no dataset 'other'"):
        run(root, replace(config, data=replace(config.data, name="other")))
