"""Models and test rows -> accuracy, agreement with fp32, and time by batch size."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from rayloop.clock import Clock
from rayloop.quantize.methods import total_variation
from rayloop.quantize.result import LatencyPoint, MethodRow, Mistake
from rayloop.quantize.session import Images, Probabilities, predict

Labels = npt.NDArray[np.int64]
ROUNDS = 3
WARM_CALLS = 3
MIN_CALLS = 3
INVARIANCE_ROWS = 48


def accuracy(answers: Probabilities, labels: Labels) -> float:
    """Share (0..1) of rows whose likeliest class is the label."""
    return float((answers.argmax(axis=1) == labels).mean())


def agreement(first: Probabilities, second: Probabilities) -> float:
    """Share (0..1) of rows on which two models choose the same class."""
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


def class_accuracy(
    answers: Probabilities, labels: Labels, class_names: Sequence[str]
) -> dict[str, float]:
    """Accuracy (0..1) by class name; classes without rows are left out."""
    right = answers.argmax(axis=1) == labels
    return {
        name: float(right[labels == index].mean())
        for index, name in enumerate(class_names)
        if (labels == index).any()
    }


def confusion(
    answers: Probabilities, labels: Labels, class_count: int
) -> tuple[tuple[int, ...], ...]:
    """Rows by true class (first index) and predicted class (second)."""
    counts = np.zeros((class_count, class_count), dtype=np.int64)
    np.add.at(counts, (labels, answers.argmax(axis=1)), 1)
    return tuple(tuple(int(value) for value in row) for row in counts)


def worst_mistakes(
    answers: Probabilities, labels: Labels, row_ids: npt.NDArray[np.int64], count: int
) -> tuple[Mistake, ...]:
    """The wrong answers given with most confidence, worst first."""
    predicted, confidence = answers.argmax(axis=1), answers.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    return tuple(
        Mistake(
            row_id=int(row_ids[at]),
            label=int(labels[at]),
            predicted=int(predicted[at]),
            confidence=float(confidence[at]),
        )
        for at in order
    )


def batch_difference(session: onnxruntime.InferenceSession, images: Images) -> float:
    """Largest difference of a row's probability (0..1) alone, in threes and in one large batch.

    0 means bit for bit; integer sums never differ, the rounding of a last float layer may.
    """
    rows = images[:INVARIANCE_ROWS]
    together = predict(session, rows)
    return max(float(np.abs(together - predict(session, rows, size)).max()) for size in (1, 3))


def compare_method(
    name: str,
    file: Path,
    answers: Probabilities,
    fp32_answers: Probabilities,
    labels: Labels,
    class_names: Sequence[str],
    batch_change: float,
    latency: tuple[LatencyPoint, ...],
    excluded_layers: tuple[str, ...] = (),
) -> MethodRow:
    """Put what is known about one method into a row.

    Args:
        name: The method's name.
        file: Its ONNX file.
        answers: Its probabilities on the test split, shape (N, K).
        fp32_answers: Those of fp32.
        labels: True classes, shape (N,).
        class_names: Label names in index order.
        batch_change: As `batch_difference` found.
        latency: As `measure_latency` found.
        excluded_layers: Layers left in fp32.
    """
    content = file.read_bytes()
    by_class = class_accuracy(answers, labels, class_names)
    fp32_by_class = class_accuracy(fp32_answers, labels, class_names)
    return MethodRow(
        name=name,
        file=file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        accuracy=accuracy(answers, labels),
        agreement=agreement(answers, fp32_answers),
        max_probability_change=float(np.abs(answers - fp32_answers).max()),
        mean_total_variation=total_variation(answers, fp32_answers),
        class_accuracy=by_class,
        worst_class_drop=max(fp32_by_class[name] - by_class[name] for name in by_class),
        batch_difference=batch_change,
        latency=latency,
        excluded_layers=excluded_layers,
    )


def measure_latency(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    images: Images,
    batch_size: int,
    seconds: float,
    clock: Clock,
) -> dict[str, LatencyPoint]:
    """Time every method at one batch size, in turns, so that a busy moment hits all of them.

    Args:
        sessions: Methods by name.
        images: uint8 rows to take the batch from, repeated when there are too few.
        batch_size: Rows of one call.
        seconds: Measuring time of each method, over all rounds.
        clock: Read before and after every call.
    """
    batch: Images = np.ascontiguousarray(np.resize(images, (batch_size, *images.shape[1:])))
    rounds: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in sessions}
    for session in sessions.values():
        for _ in range(WARM_CALLS):
            predict(session, batch, batch_size)
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            rounds[name].append(_time_calls(session, batch, seconds / ROUNDS, clock))
    return {name: _point(batch_size, times) for name, times in rounds.items()}


def _time_calls(
    session: onnxruntime.InferenceSession, batch: Images, seconds: float, clock: Clock
) -> npt.NDArray[np.float64]:
    """Seconds of each call made in about `seconds`, at least `MIN_CALLS`."""
    feed = {session.get_inputs()[0].name: batch}
    times: list[float] = []
    end = clock.monotonic() + seconds
    while len(times) < MIN_CALLS or clock.monotonic() < end:
        start = clock.monotonic()
        session.run(None, feed)
        times.append(clock.monotonic() - start)
    return np.array(times)


def _point(batch_size: int, rounds: list[npt.NDArray[np.float64]]) -> LatencyPoint:
    every = np.concatenate(rounds)
    median = float(np.median(every))
    medians = [float(np.median(times)) for times in rounds]
    return LatencyPoint(
        batch_size=batch_size,
        calls=len(every),
        median_ms=1000 * median,
        p99_ms=1000 * float(np.percentile(every, 99)),
        spread=(max(medians) - min(medians)) / median,
        images_per_second=batch_size / median,
    )
