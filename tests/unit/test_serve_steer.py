"""What operators ask of the traffic, and the registry's aliases beside it."""

import shutil
from pathlib import Path

import pytest

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig
from rayloop.errors import ConfigError, Corrupt, DataMissing
from rayloop.registry.store import Registry, open_registry
from rayloop.serve.traffic.plan import LowConfidence
from rayloop.serve.traffic.steer import Steering
from rayloop.serve.traffic.store import StalePlan
from rayloop.storage import Storage
from tests.releases import MODEL, register_all


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with five versions, the first of which is champion and the second challenger."""
    root = tmp_path_factory.mktemp("template")
    register_all(root, 5, odd="5")
    return root


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Storage:
    shutil.copytree(template, tmp_path / "home")
    return Storage(str(tmp_path / "home"))


@pytest.fixture
def registry(storage: Storage) -> Registry:
    return open_registry(storage, RegistryConfig(), SYSTEM_CLOCK)


@pytest.fixture
def steering(storage: Storage, registry: Registry) -> Steering:
    return Steering(storage, registry, MODEL, SYSTEM_CLOCK, by="tester")


def split_of(steering: Steering) -> dict[str, tuple[str, float]]:
    plan = steering.current()
    assert plan is not None
    return {v.name: (v.version, v.share) for v in plan.variants}


def test_from_the_first_plan_over_a_split_and_a_promotion_to_a_rollback(steering, registry) -> None:
    assert steering.current() is None
    assert steering.opening("@champion").told() == "champion (version 1) 1"
    steering.split({"champion": 0.9, "challenger": 0.1}, shadows=("3",))
    assert split_of(steering) == {"champion": ("1", 0.9), "challenger": ("2", 0.1)}
    assert registry.aliases(MODEL)["shadow"] == "3"

    promoted = steering.promote()
    assert split_of(steering) == {"champion": ("2", 1.0)}
    assert promoted.shadows == ("3",)
    assert registry.aliases(MODEL) == {"champion": "2", "previous": "1", "shadow": "3"}
    with pytest.raises(DataMissing, match="no alias 'challenger'"):
        steering.promote()

    steering.rollback()
    assert split_of(steering) == {"champion": ("1", 1.0)}
    assert registry.aliases(MODEL) == {"champion": "1", "shadow": "3"}

    told = [(plan.number, plan.by, plan.why) for plan in steering.plans.history()]
    assert told == [
        (1, "tester", "serve @champion"),
        (2, "tester", "set champion=0.9 challenger=0.1"),
        (3, "tester", "promote"),
        (4, "tester", "rollback"),
    ]
    assert all(plan.time.endswith("Z") for plan in steering.plans.history())


def test_a_promotion_that_died_halfway_is_finished_by_the_next_one(
    steering, registry, monkeypatch
) -> None:
    steering.opening("@champion")

    def dies(model: str, version: str) -> str:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "promote", dies)
        with pytest.raises(RuntimeError):
            steering.promote()
    assert split_of(steering) == {"champion": ("2", 1.0)}
    assert registry.aliases(MODEL)["champion"] == "1"
    number = steering.promote().number
    assert registry.aliases(MODEL) == {"champion": "2", "previous": "1"}
    assert number == 2


def test_a_version_is_deployed_by_number_or_alias_and_becomes_champion(steering, registry) -> None:
    steering.deploy(":3")
    assert split_of(steering) == {"champion": ("3", 1.0)}
    assert registry.aliases(MODEL)["champion"] == "3"
    assert registry.aliases(MODEL)["previous"] == "1"
    assert steering.deploy("@challenger").variants[0].version == "2"
    with pytest.raises(DataMissing, match="no version '9'"):
        steering.deploy(":9")


def test_a_split_names_versions_by_number_too_and_keeps_what_it_is_not_told(steering) -> None:
    low = LowConfidence(below=0.5, fallback="@challenger", max_share=0.2)
    first = steering.split({"champion": 0.5, "3": 0.5}, low_confidence=low, shadows=("4",))
    assert split_of(steering) == {"champion": ("1", 0.5), "version-3": ("3", 0.5)}
    assert first.low_confidence.fallback == "2"
    second = steering.split({"champion": 0.4, ":3": 0.6})
    assert (second.low_confidence, second.shadows) == (first.low_confidence, ("4",))
    assert second.salt == first.salt
    third = steering.split({"champion": 0.4, "3": 0.6}, salt="new", shadows=())
    assert (third.salt, third.shadows) == ("new", ())
    assert steering.split({"champion": 0.4, "3": 0.6}) == third  # nothing to change, no new plan


def test_what_cannot_be_is_refused_and_the_plan_in_force_stays(steering, storage) -> None:
    before = steering.opening("@champion")
    low = LowConfidence(fallback="1")
    for shares, others, kind, sentence in (
        ({"champion": 0.9}, {}, ConfigError, "sum to 0.9, not 1; use e.g. champion=1"),
        ({"champion": 0.9, "nobody": 0.1}, {}, DataMissing, "no alias 'nobody'"),
        ({"champion": 0.9, "77": 0.1}, {}, DataMissing, "no version '77'"),
        ({"champion": 0.9, "5": 0.1}, {}, ConfigError, "takes images of 6x6x3"),
        ({"champion": 1.0}, {"shadows": ("5",)}, ConfigError, "takes images of 6x6x3"),
        ({"champion": 1.0}, {"shadows": ("x",)}, DataMissing, "no alias 'x'"),
        ({"champion": 1.0}, {"low_confidence": low}, ConfigError, "fall back to itself"),
        ({"champion": 1.0}, {"base": 0}, StalePlan, "decided on plan 0, and plan 1"),
    ):
        with pytest.raises(kind, match=sentence):
            steering.split(shares, **others)
    storage.write("models/classifier/2/model.onnx", b"damaged")
    for act in (steering.promote, lambda: steering.split({"champion": 0.5, "2": 0.5})):
        with pytest.raises(Corrupt, match="digest"):
            act()
    assert steering.current() == before


def test_the_way_back_is_open_while_the_champion_is_damaged(steering, storage) -> None:
    steering.opening("@champion")
    steering.promote()
    storage.write("models/classifier/2/model.onnx", b"damaged")
    assert steering.rollback().variants[0].version == "1"


def test_a_damaged_shadow_or_fallback_does_not_bar_the_way_back(
    steering, storage, registry
) -> None:
    steering.opening("@champion")
    steering.promote()
    low = LowConfidence(fallback="4")
    steering.split({"champion": 1.0}, shadows=("3",), low_confidence=low)
    for version in ("3", "4"):
        storage.write(f"models/classifier/{version}/model.onnx", b"damaged")
    back = steering.rollback()
    assert (back.variants[0].version, back.shadows, back.low_confidence.fallback) == ("1", (), "")
    assert "shadow" not in registry.aliases(MODEL)


def test_a_damaged_plan_is_passed_over_and_the_next_change_counts_on(steering, storage) -> None:
    steering.opening("@champion")
    steering.split({"champion": 0.5, "challenger": 0.5})
    storage.write("traffic/classifier/000002.json", b"{")
    assert steering.current().number == 1
    assert [plan.number for plan in steering.plans.history()] == [1]
    assert steering.promote().number == 3
    assert split_of(steering) == {"champion": ("2", 1.0)}


def test_a_challenger_that_changed_meanwhile_stays_challenger(steering, registry) -> None:
    steering.opening("@champion")
    registry.move_alias(MODEL, "challenger", "3")
    assert registry.promote(MODEL, "2") == "2"
    assert registry.aliases(MODEL) == {"champion": "2", "challenger": "3", "previous": "1"}


def test_two_changes_from_one_plan_are_one_change(steering, storage, registry) -> None:
    steering.opening("@champion")
    other = Steering(storage, registry, MODEL, SYSTEM_CLOCK, by="other")
    steering.split({"champion": 0.5, "challenger": 0.5}, base=1)
    with pytest.raises(StalePlan, match="decide again"):
        other.split({"champion": 0.9, "challenger": 0.1}, base=1)
    assert split_of(steering)["challenger"] == ("2", 0.5)


def test_a_server_opens_with_the_plan_in_force_and_with_where_aliases_point_now(
    steering, registry
) -> None:
    steering.opening("@champion")
    steering.split({"champion": 0.9, "challenger": 0.1})
    assert steering.opening("@champion").number == 2
    registry.move_alias(MODEL, "champion", "3")
    opened = steering.opening("@champion")
    assert opened.told() == "champion (version 3) 0.9, challenger (version 2) 0.1"
    assert opened.why == "aliases have moved"
    assert steering.opening(":4").told() == "champion (version 4) 1"


def test_a_fallback_that_becomes_champion_is_no_fallback_any_more(steering, registry) -> None:
    steering.split({"champion": 1.0}, low_confidence=LowConfidence(fallback="2"))
    assert steering.promote().low_confidence.fallback == ""
    steering.split({"champion": 1.0}, low_confidence=LowConfidence(fallback="3"))
    registry.move_alias(MODEL, "champion", "3")
    assert steering.opening("@champion").low_confidence.fallback == ""
