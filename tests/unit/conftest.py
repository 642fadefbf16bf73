"""Unit tests start no Ray: a call of `ray.init` here is a mistake."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small nets; threads would wait for each other


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test started Ray; move it to tests/cluster")

    monkeypatch.setattr(ray, "init", refuse)
