"""Keep every traffic plan of a model, one file each, so that the newest is found and none is lost.

`traffic/MODEL/000007.json` is the seventh plan. A change writes the next number, and only if nobody
else has: whoever decided on an older plan is refused. On an object store two changes within the
same instant may both be taken, and the later one stays. The highest number is in force.
"""

import json

from rayloop.errors import Corrupt, RequestError
from rayloop.logs import stage_logger
from rayloop.serve.traffic.plan import TrafficPlan, plan_from_json
from rayloop.storage import Storage

log = stage_logger("serve")

FOLDER = "traffic"


class StalePlan(RequestError):
    """The plan a change was made from is no longer the newest."""


class PlanStore:
    """The plans of one model.

    Args:
        storage: The root everything lives under.
        model: Name in the registry.
    """

    def __init__(self, storage: Storage, model: str) -> None:
        self._storage = storage
        self.model = model

    def numbers(self) -> list[int]:
        """Numbers of all plans, oldest first."""
        names = self._storage.names(f"{FOLDER}/{self.model}")
        return sorted(int(name[:-5]) for name in names if _is_plan(name))

    def newest(self) -> TrafficPlan | None:
        """The plan in force; None before the first one.

        Raises:
            Corrupt: It was damaged outside rayloop.
        """
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def after(self, number: int) -> TrafficPlan | None:
        """The newest plan after a number; None while there is none.

        It asks for one file, however long the history is.

        Raises:
            Corrupt: It was damaged outside rayloop.
        """
        newer = number
        while self._storage.exists(self._file(newer + 1)):
            newer += 1
        return None if newer == number else self.read(newer)

    def read(self, number: int) -> TrafficPlan:
        """One plan.

        Raises:
            DataMissing: There is none of that number.
            Corrupt: It was damaged outside rayloop.
        """
        file = self._storage.path(self._file(number))
        try:
            document = self._storage.read_json(self._file(number))
        except Corrupt as error:
            raise Corrupt(
                f"{file} is no traffic plan ({error}); the next change of the traffic replaces it."
            ) from None
        return plan_from_json(document, file)

    def newest_readable(self) -> tuple[TrafficPlan | None, int]:
        """The newest plan that is not damaged, and the highest number there is."""
        numbers = self.numbers()
        for number in reversed(numbers):
            try:
                return self.read(number), numbers[-1]
            except Corrupt as error:
                log.warning("%s", error)
        return None, numbers[-1] if numbers else 0

    def history(self) -> list[TrafficPlan]:
        """All plans that are not damaged, oldest first."""
        found = []
        for number in self.numbers():
            try:
                found.append(self.read(number))
            except Corrupt as error:
                log.warning("%s", error)
        return found

    def put(self, plan: TrafficPlan) -> None:
        """Make a plan the one in force.

        Raises:
            StalePlan: Another change came first.
        """
        numbers = self.numbers()
        newest = numbers[-1] if numbers else 0
        if plan.number != newest + 1 or not self._storage.create(
            self._file(plan.number), _as_bytes(plan)
        ):
            raise StalePlan(
                f"The traffic of {self.model!r} was changed meanwhile: this change was made from "
                f"plan {plan.number - 1}, and plan {max(newest, plan.number)} is in force. Look at "
                "it with rayloop traffic show, and decide again."
            )

    def _file(self, number: int) -> str:
        return f"{FOLDER}/{self.model}/{number:06d}.json"


def _is_plan(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isdigit()


def _as_bytes(plan: TrafficPlan) -> bytes:
    return json.dumps(plan.to_json(), indent=1, sort_keys=True).encode() + b"\n"
