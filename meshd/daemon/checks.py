"""Runs the checks of `meshd doctor` on a running daemon."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from meshd.agents.admin.view import ClusterView
from meshd.agents.cluster_service import CheckStep, DoctorRequest
from meshd.clock import Clock
from meshd.config import Config
from meshd.doctor import CHECKS
from meshd.doctor.check import Context, LivePeer, Runner
from meshd.errors import Overloaded
from meshd.peer.peer import Peer


class DaemonChecks:
    """The checks of this daemon, one run of them at a time."""

    def __init__(self, config: Config, peer: Peer, clock: Clock) -> None:
        """Nothing runs yet."""
        self._config = config
        self._peer = peer
        self._clock = clock
        self._runner = Runner(CHECKS)

    async def run(self, request: DoctorRequest, view: ClusterView) -> AsyncGenerator[CheckStep, None]:
        """Run the checks. Yields: a step whenever a check is done. Raises: Overloaded if they run already."""
        if self._runner.running:
            raise Overloaded("another `meshd doctor` runs on this daemon", hint="try again when it has ended", retry_after_s=10.0)
        context = Context(config=self._config, clock=self._clock, model=request.model, peer=self._live_peer(view))
        async with aclosing(self._runner.run(context)) as steps:
            async for step in steps:
                yield step

    def _live_peer(self, view: ClusterView) -> LivePeer:
        membership, links = self._peer.membership, self._peer.links
        return LivePeer(
            id=links.id,
            cluster=links.identity.fingerprint,
            link=membership.link_address,
            api=membership.publisher.api_address,
            linked=links.peers,
            rows=view.peers,
            notices=membership.notices.items,
            reach=self._peer.reach.check,
            dial=links.reach,
            plan=view.plan,
        )
