"""The checks of `meshd doctor` on a daemon."""

from contextlib import aclosing
from typing import cast

import pytest

from meshd.agents.admin.view import ClusterView
from meshd.agents.cluster_service import DoctorRequest
from meshd.clock import SystemClock
from meshd.config import Config
from meshd.daemon.checks import DaemonChecks
from meshd.doctor import CHECKS
from meshd.errors import Overloaded
from meshd.peer.peer import Peer


class _NoRows:
    """A view of a peer that knows no other."""

    def peers(self) -> list[dict[str, object]]:
        return []

    plan = None


VIEW = cast("ClusterView", _NoRows())


async def test_every_check_runs_and_a_second_doctor_waits_for_its_turn(local_config: Config, peer: Peer) -> None:
    checks = DaemonChecks(local_config, peer, SystemClock())
    async with aclosing(checks.run(DoctorRequest(), VIEW)) as steps:
        ran = [(await anext(steps)).check]
        with pytest.raises(Overloaded, match="another `meshd doctor` runs"):
            await anext(checks.run(DoctorRequest(), VIEW))
        ran += [step.check async for step in steps]
    assert sorted(ran) == sorted(check.id for check in CHECKS)
    async with aclosing(checks.run(DoctorRequest(), VIEW)) as steps:
        assert (await anext(steps)).done == 1
