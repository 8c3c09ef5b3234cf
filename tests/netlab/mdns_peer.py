"""One peer's mDNS and nothing else, in a host of a lab: PEER CLUSTER [LIFE_S]. Prints each sighting as a line of JSON.

SIGTERM ends it. With LIFE_S it is killed after so many seconds, and is back at once.
"""

import asyncio
import json
import os
import signal
import sys
import time

from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.sources import Sighting
from meshd.clock import SystemClock
from meshd.types import PeerId


def say(kind: str, **fields: object) -> None:
    print(json.dumps({"at": time.time(), "kind": kind, **fields}), flush=True)


def report(sighting: Sighting) -> None:
    say(type(sighting).__name__, peer=getattr(sighting, "peer", None), addresses=getattr(sighting, "addresses", ()))


async def main(peer: str, cluster: str) -> None:
    announcement = Announcement(peer=PeerId(peer), cluster=cluster, name=peer[:4], port=6375, protocol="1.0", version="0.1.0")
    mdns = MdnsDiscovery(announcement, report, clock=SystemClock())
    running = asyncio.create_task(mdns.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    say("started")
    await asyncio.wait([running])
    say("stopped", others=mdns.other_clusters())


def lose_a_life(life_s: float) -> None:
    """Return in a child, and here as soon as the child has been killed."""
    first = os.fork()
    if first:
        time.sleep(life_s)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        say("lost")


if __name__ == "__main__":
    peer, cluster, *life_s = sys.argv[1:]
    for each in life_s:
        lose_a_life(float(each))
    asyncio.run(main(peer, cluster))
