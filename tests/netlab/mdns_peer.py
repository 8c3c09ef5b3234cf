"""One peer's mDNS and nothing else, in a host of a lab: PEER CLUSTER. Prints each sighting as a line of JSON; SIGTERM ends it."""

import asyncio
import json
import signal
import sys
import time

from meshd.agents.discovery import MdnsDiscovery
from meshd.agents.mdns import Announcement
from meshd.agents.sources import Sighting
from meshd.clock import SystemClock
from meshd.types import PeerId


def say(kind: str, **fields: object) -> None:
    print(json.dumps({"at": time.time(), "kind": kind, **fields}), flush=True)


def tell(sighting: Sighting) -> None:
    say(type(sighting).__name__, peer=getattr(sighting, "peer", None), addresses=getattr(sighting, "addresses", ()))


async def main(peer: str, cluster: str) -> None:
    announcement = Announcement(peer=PeerId(peer), cluster=cluster, name=peer[:4], port=6375, protocol="1.0", version="0.1.0")
    mdns = MdnsDiscovery(announcement, tell, clock=SystemClock())
    running = asyncio.create_task(mdns.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    say("started")
    await asyncio.wait([running])
    say("stopped", others=mdns.other_clusters())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
