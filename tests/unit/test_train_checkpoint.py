"""Checkpoints: whole or not there, verified when read, written beside the training."""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rayloop.config import ModelConfig
from rayloop.errors import ConfigError, Corrupt, RequestError, StorageFull
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.train.checkpoint import (
    FIRST_SAVE_AFTER_S,
    CheckpointWriter,
    checkpoint_digest,
    checkpoint_paths,
    interval_s,
    is_due,
    load_checkpoint,
    newest_good,
    refuse_foreign_state,
    refuse_other_manifest,
    save_checkpoint,
    young_daly_interval_s,
)
from rayloop.train.state_file import manifest_bytes, snapshot, state_bytes

FOLDER = "runs/r/checkpoints"
ABOUT = {"config_digest": "c1", "dataset_digest": "d1", "dataset": "d:1"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def classifier(name: str = "linear", seed: int = 0, classes: int = 3) -> ImageClassifier:
    """A small model of 4x4 grey images."""
    model = ModelConfig(name=name, widths=(8,))
    return build_classifier(model, (4, 4, 1), classes, (0.5,), (0.25,), seed)


def state_at(step: int) -> dict[str, Any]:
    """A state that tells its step."""
    return {"step": step, "weight": torch.full((3,), float(step))}


def save(storage: Storage, step: int, keep: int = 10) -> str:
    """A checkpoint whose state tells its step."""
    return save_checkpoint(storage, "r", step, state_at(step), ABOUT, keep)


def names_in(storage: Storage, folder: str = FOLDER) -> list[str]:
    """All names in a folder, hidden ones too."""
    return sorted(path.name for path in Path(storage.path(folder)).iterdir())


# --- saved and loaded


def test_a_checkpoint_comes_back_as_it_was(storage: Storage) -> None:
    path = save(storage, 7)
    assert path == f"{FOLDER}/step-00000007"
    checkpoint = load_checkpoint(storage, path)
    assert (checkpoint.path, checkpoint.step, checkpoint.state["step"]) == (path, 7, 7)
    assert torch.equal(checkpoint.state["weight"], torch.full((3,), 7.0))
    assert checkpoint.manifest == storage.read_json(f"{path}/manifest.json")
    assert checkpoint.manifest["dataset"] == "d:1"
    assert names_in(storage, path) == ["manifest.json", "state.pt"]


def test_only_the_newest_are_kept(storage: Storage) -> None:
    for step in (5, 10, 15, 100):
        save(storage, step, keep=2)
    assert names_in(storage) == ["step-00000015", "step-00000100"]


def test_a_run_that_fell_back_keeps_what_it_writes(storage: Storage) -> None:
    save(storage, 10, keep=1)
    save(storage, 20, keep=2)
    damage(storage, 20, "truncated")
    save(storage, 15, keep=1)
    found = newest_good(storage, "r")
    assert found is not None
    assert found.step == 15
    assert names_in(storage) == ["step-00000015", "step-00000020"]


def test_the_order_is_that_of_the_steps_beyond_eight_digits(storage: Storage) -> None:
    for step in (99_999_999, 100_000_000):
        save(storage, step)
    assert [path[-9:] for path in checkpoint_paths(storage, "r")] == ["-99999999", "100000000"]


def test_what_a_killed_writer_left_is_removed_at_the_next_save(storage: Storage) -> None:
    save(storage, 1)
    storage.write(f"{FOLDER}/.step-00000002.abc/state.pt", b"half")
    save(storage, 3)
    assert names_in(storage) == ["step-00000001", "step-00000003"]


def test_a_run_without_checkpoints_starts_from_nothing(storage: Storage) -> None:
    assert newest_good(storage, "r") is None
    for name in ("step-7", "step-000000007", "step-0000000x", "best", ".step-00000009", "step-"):
        storage.write(f"{FOLDER}/{name}/state.pt", b"")
    assert newest_good(storage, "r") is None
    save(storage, 1)
    assert checkpoint_paths(storage, "r") == [f"{FOLDER}/step-00000001"]


def full_state() -> tuple[dict[str, Any], nn.Module, torch.optim.Optimizer]:
    """Everything that decides a run's future, after two real steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(5, 1, 4, 4)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
    state = {
        "step": 2,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": [torch.get_rng_state(), {"numpy": (1, 2.5, "x", b"y", None)}],
        "history": [{"step": 1.0, "val_loss": 0.5}],
        "sums": torch.zeros(3, dtype=torch.float64),
    }
    return state, model, optimizer


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the last bit, types and tensor layouts included."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and (one.dtype, one.stride()) == (
            other.dtype,
            other.stride(),
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_full_state_comes_back_to_the_last_bit(storage: Storage) -> None:
    state, model, optimizer = full_state()
    assert state["scaler"]["scale"] == 256.0
    path = save_checkpoint(storage, "r", 2, snapshot(state), ABOUT, keep=1)
    back = load_checkpoint(storage, path).state
    assert same(back, state)
    with open(storage.path(path, "state.pt"), "rb") as file:
        assert same(torch.load(file, weights_only=True), state)
    digest = checkpoint_digest(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(back["model"])
    optimizer.load_state_dict(back["optimizer"])
    assert checkpoint_digest(model) == digest
    assert same(optimizer.state_dict(), state["optimizer"])


def test_a_snapshot_shares_nothing_with_what_trains_on() -> None:
    state, model, optimizer = full_state()
    copied, again = snapshot(state), snapshot(state)
    assert state_bytes(copied) == state_bytes(state) > 1000
    assert copied["model"]._metadata == state["model"]._metadata
    for parameter in model.parameters():
        parameter.data.add_(1)
    for slots in optimizer.state.values():
        slots["exp_avg"].zero_()
    state["history"].append({})
    state["history"][0]["step"] = 9.0
    state["random"][1]["numpy"] = ()
    assert same(copied, again)
    assert not same(copied["model"], state["model"])


def test_a_snapshot_uses_an_earlier_ones_memory_where_it_fits() -> None:
    state, model, _ = full_state()
    earlier = snapshot(state)
    weight, sums = earlier["model"]["0.weight"], earlier["sums"]
    for parameter in model.parameters():
        parameter.data.add_(1)
    state["sums"] = torch.ones(2)
    state["history"] += [{"new": torch.ones(1)}]
    state["random"] = tuple(state["random"])
    fresh = snapshot(state)
    later = snapshot(state, earlier)
    assert same(later, fresh)
    assert later["model"]["0.weight"] is weight
    assert later["sums"] is not sums
    assert same(snapshot({"model": 1, "random": []}, later), {"model": 1, "random": []})


def test_the_digest_of_a_model_sees_every_parameter_and_buffer() -> None:
    model, alike, other = (classifier("fastnet", seed) for seed in (0, 0, 1))
    assert checkpoint_digest(model) == checkpoint_digest(alike)
    assert checkpoint_digest(model) != checkpoint_digest(other)
    alike.scale[0] += 1e-6
    assert checkpoint_digest(model) != checkpoint_digest(alike)


def test_the_digest_does_not_see_the_memory_order() -> None:
    model, alike = classifier("fastnet"), classifier("fastnet")
    nhwc = alike.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert checkpoint_digest(model) == checkpoint_digest(nhwc)


# --- damage


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest and seal it anew, as a foreign writer that knows the format would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    manifest.update(changes)
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


def other_state(folder: Path, state: object) -> None:
    """Put another state.pt with a digest that matches."""
    torch.save(state, folder / "state.pt")
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    rewrite(folder, sha256=digest)


DAMAGES = {
    "truncated": ("state.pt was damaged", lambda f: os.truncate(f / "state.pt", 100)),
    "without state": ("a file is missing", lambda f: (f / "state.pt").unlink()),
    "without manifest": ("a file is missing", lambda f: (f / "manifest.json").unlink()),
    "half a manifest": ("not JSON", lambda f: (f / "manifest.json").write_text("{")),
    "binary manifest": ("not JSON", lambda f: (f / "manifest.json").write_bytes(b"\xff\x00")),
    "not a number": ("not JSON", lambda f: (f / "manifest.json").write_text('{"step": NaN}')),
    "a list": ("without manifest_sha256, sha256, step",
               lambda f: (f / "manifest.json").write_text("[1]")),
    "no fields": ("without manifest_sha256, sha256, step",
                  lambda f: (f / "manifest.json").write_text("{}")),
    "edited manifest": ("does not match its own digest", lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"d:1"', '"d:2"'))),
    "another step": ("manifest says step 777", lambda f: rewrite(f, step=777)),
    "a step in words": ("manifest says step two", lambda f: rewrite(f, step="two")),
    "a digest of nothing": ("state.pt was damaged", lambda f: rewrite(f, sha256=None)),
    "an unsafe state": ("torch cannot load", lambda f: other_state(f, {"x": threading.Thread})),
    "a state that is no dict": ("holds list in state.pt", lambda f: other_state(f, [1])),
}  # fmt: skip


def damage(storage: Storage, step: int, how: str) -> str:
    """Break one checkpoint; gives what the error must say."""
    says, do = DAMAGES[how]
    do(Path(storage.path(f"{FOLDER}/step-{step:08d}")))
    return says


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    storage: Storage, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(storage, 1)
    path = save(storage, 2)
    says = damage(storage, 2, how)
    with pytest.raises(Corrupt, match=says):
        load_checkpoint(storage, path)
    with caplog.at_level("WARNING", "rayloop.train"):
        found = newest_good(storage, "r")
    assert found is not None
    assert found.step == 1
    assert storage.path(path) in caplog.text
    assert "Falling back" in caplog.text


def test_a_renamed_checkpoint_is_not_believed(storage: Storage) -> None:
    folder = Path(storage.path(save(storage, 3)))
    folder.rename(folder.with_name("step-00000005"))
    with pytest.raises(Corrupt, match="renamed: its manifest says step 3"):
        load_checkpoint(storage, f"{FOLDER}/step-00000005")


def test_when_no_checkpoint_is_whole_nothing_starts_over_silently(storage: Storage) -> None:
    for step, how in enumerate(DAMAGES):
        save(storage, step, keep=100)
        damage(storage, step, how)
    with pytest.raises(Corrupt, match=f"None of the {len(DAMAGES)} checkpoints"):
        newest_good(storage, "r")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run with two checkpoints; who damages the second one mends it."""
    storage = Storage(str(tmp_path_factory.mktemp("two")))
    save(storage, 1)
    save(storage, 2)
    return storage


@settings(max_examples=100)
@given(data=st.data())
def test_any_changed_byte_or_lost_end_is_noticed(two: Storage, data: st.DataObject) -> None:
    names = st.sampled_from(["manifest.json", "state.pt"])
    file = Path(two.path(FOLDER, "step-00000002", data.draw(names)))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(0, 255))  # 0 cuts the file there
    rest = bytes([whole[place] ^ flip]) + whole[place + 1 :] if flip else b""
    file.write_bytes(whole[:place] + rest)
    try:
        found = newest_good(two, "r")
    finally:
        file.write_bytes(whole)
    assert found is not None
    assert found.step == 1
    undamaged = newest_good(two, "r")
    assert undamaged is not None
    assert undamaged.step == 2


KILLED_WHILE_SAVING = """
import logging, os, random, select, signal, sys, torch
from rayloop.storage import Storage
from rayloop.train.checkpoint import newest_good, save_checkpoint
torch.set_num_threads(1)
root, rounds, chance = sys.argv[1], int(sys.argv[2]), random.Random(5)
storage, step = Storage(root), 0
for _ in range(rounds):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        while True:
            step += 1
            state = {"step": step, "weight": torch.full((5000,), float(step))}
            save_checkpoint(storage, "r", step, state, {}, 2)
            os.write(write, b"%d " % step)
    os.close(write)
    told = b""
    while told.count(b" ") < chance.randint(0, 2):
        told += os.read(read, 100)
    select.select([read], [], [], chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 100):
        told += more
    acknowledged = int((b"%d " % step + told).split()[-1])
    found = newest_good(storage, "r")
    assert (found.step if found else 0) >= acknowledged, (found, acknowledged)
    assert not found or bool((found.state["weight"] == found.step).all())
    step = found.step if found else 0
print("reached", step)
"""


@pytest.fixture(scope="module", autouse=True)
def saving_and_dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process whose children are killed while they save; it works beside the other tests."""
    root = str(tmp_path_factory.mktemp("killed"))
    command = [sys.executable, "-W", "error", "-c", KILLED_WHILE_SAVING, root, "20"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# --- a full disk


@pytest.mark.parametrize(
    ("disk", "says"),
    [
        ("/dev/full", "No space left on device"),
        ("/dev/null", r"only 0 of [\d,]+ bytes were written"),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, disk: str, says: str
) -> None:
    open_file = Path.open

    def open_full(path: Path, *args: Any, **kwargs: Any) -> Any:
        full = path.name == "state.pt" and args == ("wb",)
        return open_file(Path(disk) if full else path, *args, **kwargs)

    for step in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_full)
            with pytest.raises(StorageFull) as caught:
                save(storage, 7)
        text = str(caught.value)
        assert re.search(f"{FOLDER}/step-00000007 failed: {says}. It needs 12 bytes", text)
        kept = f"The last checkpoint, {storage.path(FOLDER)}/step-00000001, is kept."
        assert (kept if step else "There is no earlier checkpoint.") in text
        assert names_in(storage) == (["step-00000001"] if step else [])
        save(storage, 1)


def test_a_state_that_cannot_be_pickled_leaves_no_rest(storage: Storage) -> None:
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(storage, "r", 1, {"x": threading.Lock()}, ABOUT, 1)
    assert names_in(storage) == []


# --- the writer


class FakeClock:
    """A clock that goes on by one second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return 0.0

    def monotonic(self) -> float:
        """One second later than the last time."""
        self.seconds += 1
        return self.seconds


class Gate:
    """A write that waits until it is let through, and keeps what it got."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.got: list[tuple[int, float]] = []

    def __call__(self, step: int, state: dict[str, Any]) -> str:
        """Write nothing, later."""
        self.entered.set()
        assert self.open.wait(60)
        self.got.append((step, float(state["weight"][0])))
        return f"step-{step}"


def test_training_goes_on_while_a_checkpoint_is_written() -> None:
    gate, state = Gate(), state_at(1)
    with CheckpointWriter(gate) as writer:
        writer.save(1, state)
        assert gate.entered.wait(60)
        state["weight"].fill_(99.0)
        assert gate.got == []
        assert writer.cost_s is None
        gate.open.set()
        writer.flush()
        assert gate.got == [(1, 1.0)]
        writer.flush()
    assert gate.got == [(1, 1.0)]


def test_a_save_waits_for_the_one_before_and_the_end_for_the_last() -> None:
    order: list[str] = []
    first_may_end = threading.Event()

    def write(step: int, _: dict[str, Any]) -> str:
        order.append(f"begin {step}")
        assert first_may_end.wait(60)
        order.append(f"end {step}")
        return ""

    with CheckpointWriter(write) as writer:
        writer.save(1, state_at(1))
        threading.Timer(0.05, first_may_end.set).start()
        writer.save(2, state_at(2))
        assert order[:2] == ["begin 1", "end 1"]
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


def test_what_saving_cost_is_counted() -> None:
    with CheckpointWriter(lambda *_: "", FakeClock()) as writer:
        for step in (1, 2, 3):
            writer.save(step, state_at(step))
        writer.flush()
        assert writer.blocked_s == 3.0
        assert writer.cost_s is not None
        assert 1.0 <= writer.cost_s < 2.0


def fail(step: int, _: dict[str, Any]) -> str:
    """A write onto a full disk."""
    raise StorageFull(f"no room for {step}")


def test_an_error_of_the_thread_is_raised_once() -> None:
    with CheckpointWriter(fail) as writer:
        writer.save(1, state_at(1))
        with pytest.raises(StorageFull, match="no room for 1"):
            writer.save(2, state_at(2))
        writer.flush()
        writer.save(3, state_at(3))
        with pytest.raises(StorageFull, match="no room for 3"):
            writer.flush()
    with pytest.raises(StorageFull, match="no room for 4"), CheckpointWriter(fail) as writer:
        writer.save(4, state_at(4))


def save_and_leave(write: Callable[[int, dict[str, Any]], str]) -> None:
    """A training that saves step 5 and meets an error of its own."""
    with CheckpointWriter(write) as writer:
        writer.save(5, state_at(5))
        raise KeyError("mine")


def test_an_error_that_leaves_already_is_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError, match="mine"):
        save_and_leave(fail)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "The last checkpoint was not written: no room for 5")
    ]
    gate = Gate()
    gate.open.set()
    with pytest.raises(KeyError, match="mine"):
        save_and_leave(gate)
    assert gate.got == [(5, 5.0)]


# --- how often


@given(cost_s=st.floats(1e-3, 100), mtbf_s=st.floats(1e3, 1e6), factor=st.floats(0.1, 10))
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float, factor: float) -> None:
    def lost_share(interval: float) -> float:
        return cost_s / interval + interval / (2 * mtbf_s)

    best = young_daly_interval_s(cost_s, mtbf_s)
    assert lost_share(best) <= lost_share(best * factor) * (1 + 1e-9)


def test_the_interval_keeps_to_the_cost_share() -> None:
    assert young_daly_interval_s(2.0, 100.0) == 20.0
    assert interval_s(2.0, cost_share=0.005, mtbf_s=100.0) == 400.0
    assert interval_s(2.0, cost_share=0.5, mtbf_s=100.0) == 20.0


@settings(deadline=None, max_examples=50)
@given(cost_s=st.floats(1e-3, 30), step_s=st.floats(0.01, 5), share=st.floats(1e-3, 0.1))
def test_a_run_spends_at_most_the_share_on_checkpoints(
    cost_s: float, step_s: float, share: float
) -> None:
    now_s = saved_at_s = 0.0
    known: float | None = None
    saved_at: list[float] = []
    for _ in range(2000):
        now_s += step_s
        if is_due(now_s - saved_at_s, known, share):
            saved_at.append(now_s)
            now_s += cost_s
            saved_at_s, known = now_s, cost_s
    assert all(later - saved_at[0] >= number * cost_s / share
               for number, later in enumerate(saved_at))  # fmt: skip
    assert bool(saved_at) == (2000 * step_s >= FIRST_SAVE_AFTER_S * (1 - 1e-9))


# --- refusals


def saved_model(storage: Storage, model: nn.Module, about: dict[str, Any]) -> Any:
    """A checkpoint of a model, read back."""
    path = save_checkpoint(storage, "r", 1, {"model": model.state_dict()}, about, 1)
    return load_checkpoint(storage, path)


def test_weights_of_another_model_are_refused_by_name(storage: Storage) -> None:
    model = classifier("fastnet")
    checkpoint = saved_model(storage, model, ABOUT)
    refuse_foreign_state(checkpoint, model)
    with pytest.raises(RequestError, match=r"of another shape: \S+ \(3.* instead of \(5"):
        refuse_foreign_state(checkpoint, classifier("fastnet", classes=5))
    with pytest.raises(RequestError, match=r"missing: \S+.*; unexpected: .+, .+, \S+ and \d+ more"):
        refuse_foreign_state(checkpoint, classifier("linear"))
    path = save(storage, 2)
    with pytest.raises(RequestError, match="no weights under 'model'"):
        refuse_foreign_state(load_checkpoint(storage, path), model)


def test_other_settings_or_data_are_refused_by_name(storage: Storage) -> None:
    checkpoint = saved_model(storage, classifier(), {**ABOUT, "torch": "1"})
    refuse_other_manifest(checkpoint, {**ABOUT, "torch": "2"})
    with pytest.raises(ConfigError, match="config_digest was c1, now c2. Use"):
        refuse_other_manifest(checkpoint, {**ABOUT, "config_digest": "c2"})
    with pytest.raises(ConfigError, match="data: dataset_digest was d1, now d2"):
        refuse_other_manifest(checkpoint, {**ABOUT, "dataset_digest": "d2"})
    bare = saved_model(storage, classifier(), {})
    with pytest.raises(ConfigError, match="config_digest was None, now c1; dataset_digest was"):
        refuse_other_manifest(bare, ABOUT)


# --- what worked meanwhile


def test_a_kill_at_any_moment_leaves_the_last_acknowledged_or_a_newer_one(
    saving_and_dying: subprocess.Popen[str],
) -> None:
    stdout, stderr = saving_and_dying.communicate(timeout=300)
    assert saving_and_dying.returncode == 0, stderr
    assert "is not whole" not in stderr, "a half-written checkpoint had become visible"
    assert int(stdout.split()[-1]) >= 10
