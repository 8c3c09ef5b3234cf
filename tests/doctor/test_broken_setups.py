"""`meshd doctor` names the fault and its mend in each of these set-ups, which the test makes.

`tests/netlab/test_doctor_netlab.py` makes those that need several hosts.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import broken_setups
from broken_setups import Break, Workshop
from meshd.agents.cluster_service import CheckResult, CheckStatus
from meshd.doctor.check import Context

SETUPS: tuple[tuple[Break, str, str, str], ...] = (
    (broken_setups.wrong_interface, "interfaces", "wlan9 (not here)", "--interface"),
    (broken_setups.no_interface, "interfaces", "no network interface is up", "--interface"),
    (broken_setups.no_way_to_find_peers, "discovery", "no way to find a peer", "--discovery mdns,static"),
    (broken_setups.nobody_at_the_named_peer, "peer-unreachable", "Connection refused", "meshd up"),
    (broken_setups.named_peer_without_address, "peer-unreachable", "its name is not known", "meshd up"),
    (broken_setups.container_with_its_own_network, "container", "a docker container with a network of its own", "--network host"),
    (broken_setups.lost_model_file, "models", "is gone or torn", "meshd pull tiny"),
    (broken_setups.torn_index_of_models, "models", "can't be read", "index.json"),
    (broken_setups.mdns_port_taken, "mdns-port", "UDP port 5353 can't be used", "meshd up --peer HOST:PORT"),
    (broken_setups.link_port_taken, "link-port", f"is in use by process {os.getpid()}", "--link 0.0.0.0:"),
    (broken_setups.api_port_taken, "api-port", f"is in use by process {os.getpid()}", "--api 127.0.0.1:"),
    (broken_setups.link_address_of_another_device, "link-port", "192.0.2.77:6375 can't be used", "--link 0.0.0.0:6375"),
    (broken_setups.links_on_loopback, "link-port", "from this machine only", "--link 0.0.0.0:"),
    (broken_setups.open_api_without_key, "api-guard", "without an API key", "meshd key api"),
    (broken_setups.full_disk, "state-disk", "is full", "df -h"),
    (broken_setups.no_inodes, "cache-disk", "is full", "--cache DIR"),
    (broken_setups.read_only_state, "state-disk", "read-only", "sudo mount -o remount,rw"),
    (broken_setups.little_room_for_models, "models-disk", "only 4.0 MiB are free", "meshd rm MODEL"),
    (broken_setups.torn_cluster_key, "cluster-key", "holds no join code", "meshd key join CODE"),
    (broken_setups.torn_identity_key, "identity", "holds no Ed25519 key", "rm "),
    (broken_setups.readable_key, "state-folder", "other users may read", "chmod 600"),
    (broken_setups.open_folder, "state-folder", "other users may read", "chmod 700"),
    (broken_setups.torn_record, "state-folder", "is torn", "rm "),
    (broken_setups.unfinished_write, "state-folder", "a write that did not end", "rm "),
    (broken_setups.copied_folder, "copied-folder", "is a copy of another peer's folder", "identity.key"),
    (broken_setups.certificate_of_another_cluster, "certificate", "was not signed by the authority", "identity.crt"),
    (broken_setups.certificate_of_another_key, "certificate", "is for another key", "identity.crt"),
    (broken_setups.expired_certificate, "certificate", "has expired", "identity.crt"),
    (broken_setups.clock_before_1970, "clock", "years behind", "sudo timedatectl set-ntp true"),
    (broken_setups.hanging_daemon, "state-lock", "does not answer", f"kill {os.getpid()}"),
    (broken_setups.little_memory, "memory", "bound by --memory", "raise --memory"),
    (
        broken_setups.tight_cgroup,
        "cgroup",
        "meshd.service allows 256 MiB",
        "sudo systemctl set-property meshd.service MemoryMax=4G",
    ),
    (broken_setups.tight_cgroup_of_version_1, "cgroup", "allows 300 MiB", "docker update --memory 4g"),
    (broken_setups.quota_of_half_a_core, "cpu-quota", "0.5 of a core", "docker update --cpus"),
    (broken_setups.unused_huge_pages, "huge-pages", "2.0 GiB of memory", "sudo sysctl vm.nr_hugepages=0"),
    (broken_setups.slow_governor, "cpu-governor", "lowest clock rate", "scaling_governor"),
    (broken_setups.broker_down, "broker", "connection refused", "sudo systemctl start mosquitto"),
    (broken_setups.broker_that_refuses, "broker", "does not allow this client in", "--mqtt mqtts://USER:PASSWORD@HOST"),
    (broken_setups.unknown_model, "model", "nosuch:1b", "meshd models"),
    (broken_setups.model_that_fits_nowhere, "model", "of memory are missing", "meshd up"),
)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    with ExitStack() as stack:
        yield Workshop(tmp_path, stack)


@pytest.mark.parametrize(("broken", "check", "found", "mend"), SETUPS, ids=[row[0].__name__ for row in SETUPS])
def test_the_fault_and_its_mend_are_named(
    broken: Break,
    check: str,
    found: str,
    mend: str,
    context: Context,
    shop: Workshop,
    diagnose: Callable[[Context], list[CheckResult]],
) -> None:
    if broken in broken_setups.MOUNTING and os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    results = diagnose(broken(context, shop))
    faults = [each for each in results if each.status in (CheckStatus.WRONG, CheckStatus.WARNING)]
    named = [each for each in faults if each.check == check and found in each.found and mend in each.mend]
    assert named, faults
    assert all(each.mend for each in faults)


def test_a_set_up_without_faults_gives_only_ok(context: Context, diagnose: Callable[[Context], list[CheckResult]]) -> None:
    """Without a daemon, only the peers can't be checked."""
    results = diagnose(context)
    bad = {each.check: each.status.value for each in results if each.status is not CheckStatus.OK}
    assert bad == {"peers": "unchecked", "reach": "unchecked"}
