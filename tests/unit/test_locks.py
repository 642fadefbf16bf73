"""Locks under a root: one process at a time, and one that is told instead of waiting."""

from pathlib import Path

import pytest

from rayloop.errors import RequestError
from rayloop.locks import exclusive
from rayloop.storage import Storage


def test_what_one_holds_another_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "new"))
    with exclusive(storage, "s", "Sweep 's' is busy."):
        with (
            pytest.raises(RequestError, match="Sweep 's' is busy."),
            exclusive(storage, "s", "Sweep 's' is busy."),
        ):
            pass
        with exclusive(storage, "t", "Sweep 't' is busy."):
            pass
    with exclusive(storage, "s", "Sweep 's' is busy."):
        pass
