"""Turn a new traffic plan in the storage into the one in force in this replica.

Each replica looks for itself, so that one that starts later, starts again or lost its controller
follows as well, and a change needs nobody but the storage.
"""

import asyncio

from rayloop.clock import Clock
from rayloop.logs import stage_logger
from rayloop.serve.repository import Repository
from rayloop.serve.service import ModelService

log = stage_logger("serve")

RETRY_S = 10.0
"""Pause before a plan that could not be put in force is tried again."""


class PlanFollower:
    """Follows the plans of one model.

    Args:
        service: Its plan is replaced.
        repository: Loads what a plan needs.
        poll_s: Pause between two looks.
        clock: Measures pauses.
    """

    def __init__(
        self, service: ModelService, repository: Repository, poll_s: float, clock: Clock
    ) -> None:
        self._service, self._repository = service, repository
        self._poll_s, self._clock = poll_s, clock
        self.refused = 0
        """Number of the plan that cannot be put in force here; 0 for none."""
        self.reason = ""
        self._retry_at = 0.0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            await self.look()

    async def look(self) -> None:
        """Put the newest plan in force, if there is a newer one."""
        number = self._service.plan.number
        try:
            plan = await asyncio.to_thread(self._service.shelf.newer_plan, number)
        except Exception as error:  # the plan in force stays, whatever is wrong with the storage
            if not self.reason:
                log.error("the traffic plans cannot be read: %s", error)
            self.reason = str(error)
            return
        if plan is None:
            self.refused, self.reason = 0, ""
            return
        if plan.number == self.refused and not self._may_retry():
            return
        try:
            await self._repository.follow(plan)
        except Exception as error:  # nor does a plan that cannot be put in force change anything
            self._refuse(plan.number, error)
            return
        log.info("traffic plan %d is in force: %s", plan.number, plan.told())
        self.refused, self.reason = 0, ""

    def _may_retry(self) -> bool:
        return self._clock.monotonic() >= self._retry_at

    def _refuse(self, number: int, error: Exception) -> None:
        if number != self.refused:
            log.error("traffic plan %d stays out: %s", number, error)
        self.refused, self.reason = number, str(error)
        self._retry_at = self._clock.monotonic() + RETRY_S
