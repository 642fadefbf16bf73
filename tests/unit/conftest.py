"""Unit tests start no Ray: a call of `ray.init` here is a mistake."""

import pytest


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test started Ray; move it to tests/cluster")

    monkeypatch.setattr(ray, "init", refuse)
