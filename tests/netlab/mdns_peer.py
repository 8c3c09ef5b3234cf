"""Run only the mDNS discovery of one peer, on a host of a lab. Print each sighting as a line of JSON.

    python tests/netlab/mdns_peer.py PEER CLUSTER [LIFE_S ...]

SIGTERM ends the script. For each LIFE_S, a process runs the discovery for this many seconds and is killed; then the next process
starts at once. The last one runs until SIGTERM.
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


def fork_and_kill(life_s: float) -> None:
    """Fork a child and kill it after `life_s`. Returns in the child at once, and in the parent after the kill."""
    child = os.fork()
    if child:
        time.sleep(life_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        say("lost")


if __name__ == "__main__":
    peer, cluster, *life_s = sys.argv[1:]
    for each in life_s:
        fork_and_kill(float(each))
    asyncio.run(main(peer, cluster))
