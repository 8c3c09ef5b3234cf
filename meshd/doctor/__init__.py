"""Looks for faults of a device, its set-up and its connections, and says how to mend each: the checks of `meshd doctor`.

A check is a small function in one of these files. It takes a `Context` and gives results with a stable id. The daemon runs the
checks of itself; without a daemon, the command line runs those that need none.
"""

from meshd.doctor import broker, cluster, compute, files, firewall, host, identity, limits, model, network
from meshd.doctor.check import DEADLINE_S, Check

CHECKS: tuple[Check, ...] = (
    Check("interfaces", network.interfaces),
    Check("discovery", network.discovery),
    Check("multicast", network.multicast),
    Check("mdns-port", network.mdns_port),
    Check("link-port", network.link_port),
    Check("api-port", network.api_port),
    Check("api-guard", network.api_guard),
    Check("firewall", firewall.firewall),
    Check("peers", cluster.peers),
    Check("reach", cluster.reach, 3 * DEADLINE_S),
    Check("notice", cluster.notices),
    Check("broker", broker.broker),
    Check("cluster-key", identity.cluster_key),
    Check("identity", identity.identity),
    Check("state-folder", files.state_folder),
    Check("state-lock", files.state_lock),
    Check("disks", files.disks),
    Check("memory", limits.memory),
    Check("cgroup", limits.cgroup),
    Check("swap", limits.swap),
    Check("open-files", limits.open_files),
    Check("locked-memory", limits.locked_memory),
    Check("huge-pages", host.huge_pages),
    Check("cpu-quota", host.cores),
    Check("cpu-governor", host.governor),
    Check("temperature", host.temperature),
    Check("battery", host.battery),
    Check("clock", host.clock),
    Check("container", host.container),
    Check("python", host.python),
    Check("packages", host.packages),
    Check("backend", compute.backends, 3 * compute.NUMERICS_S),
    Check("speed", compute.speed),
    Check("models", model.stored),
    Check("model", model.model, model.LOOK_S),
)
"""All checks. `meshd/cli/doctor.py` sorts their results."""
