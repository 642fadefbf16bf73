"""A finished run whose model was chosen -> the same run with its test accuracy and linear floor.

A sweep decides on the validation split alone. The test split is for the model that was chosen, and
for it once: what it says is written into the run's record and never asked again.
"""

from dataclasses import replace

import torch

from rayloop.config import TrainConfig
from rayloop.data.versions import open_version, read_split
from rayloop.storage import Storage
from rayloop.train.evaluate import evaluate
from rayloop.train.floor import linear_floor
from rayloop.train.result import TrainResult, load_model, load_result, save_result


def final_test(
    storage: Storage, run_id: str, train: TrainConfig, mlflow_run_id: str = ""
) -> TrainResult:
    """Test a finished run's model and make the run the newest, unless that was done.

    Args:
        storage: The root.
        run_id: The chosen run.
        train: For the floor and the size of a batch.
        mlflow_run_id: The run in the tracking database, where its record has none.

    Raises:
        DataMissing: There is no finished run of that name, or its dataset is gone.
        Corrupt: The checkpoint does not match its digest.
    """
    result = load_result(storage, run_id)
    wants_floor = result.floor_accuracy is None and train.floor_epochs > 0
    if result.test_accuracy is not None and not wants_floor:
        return result
    dataset = open_version(storage, result.dataset_name, result.dataset_version)
    train_rows, test_rows = (read_split(storage, dataset, name) for name in ("train", "test"))
    if result.test_accuracy is None:
        metrics = evaluate(
            load_model(storage, result), test_rows, len(dataset.class_names),
            train.eval_batch_size, torch.device("cpu"),
        )  # fmt: skip
        result = replace(result, test_accuracy=metrics.accuracy)
    if result.floor_accuracy is None:
        floor = linear_floor(train, dataset, train_rows, test_rows)
        result = replace(result, floor_accuracy=floor)
    result = replace(result, mlflow_run_id=result.mlflow_run_id or mlflow_run_id)
    save_result(storage, result)
    return result
