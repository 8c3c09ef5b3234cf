"""Makes set-ups that `meshd doctor` finds a fault in: each function takes one without faults, breaks it, and returns it."""

import datetime
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from in_process.clusters import make_card
from meshd.agents.membership.interfaces import Interface, InterfaceKind
from meshd.clock import SystemClock
from meshd.doctor.check import Context
from meshd.errors import DoesNotFit
from meshd.models.files.disk import stamp_of
from meshd.models.store.index import Index, StoredModel
from meshd.protocol.identity import CERTIFICATE_FILE, CLUSTER_FILE, IDENTITY_FILE, ClusterKey, load_cluster_key, load_private_key
from meshd.state import StateFolder, lock_state
from meshd.types import ModelId
from meshd.values import Address, parse_broker


@dataclass
class Workshop:
    """Where a test breaks a set-up; what is open is closed at the end."""

    folder: Path
    stack: ExitStack

    def mount(self, path: Path, options: str) -> None:
        """Mount a small file system in memory at a folder."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
        self.stack.callback(subprocess.run, ["umount", "-l", str(path)], check=False)


def change(context: Context, **values: object) -> Context:
    return replace(context, config=replace(context.config, **values))  # type: ignore[arg-type]


def wrong_interface(context: Context, shop: Workshop) -> Context:
    return change(context, interfaces=("wlan9",), discovery=("mdns", "static"))


def no_interface(context: Context, shop: Workshop) -> Context:
    return replace(change(context, discovery=("mdns", "static")), interfaces=list)


def no_way_to_find_peers(context: Context, shop: Workshop) -> Context:
    return change(context, peers=())


def nobody_at_the_named_peer(context: Context, shop: Workshop) -> Context:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return change(context, peers=(Address("127.0.0.1", port),))


def named_peer_without_address(context: Context, shop: Workshop) -> Context:
    return change(context, peers=(Address("nosuch.invalid", 6375),))


def container_with_its_own_network(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    (root / ".dockerenv").touch()
    inside = Interface(name="eth0", index=2, kind=InterfaceKind.VIRTUAL, up=True, multicast=True, networks=("172.17.0.2/16",))
    return replace(context, root=root, interfaces=lambda: [inside])


def lost_model_file(context: Context, shop: Workshop) -> Context:
    folder, path = context.config.models_dir, shop.folder / "tiny.gguf"
    folder.mkdir()
    path.write_bytes(b"GGUF")
    stamp = stamp_of(path)
    assert stamp is not None
    Index(folder).put(
        StoredModel(
            name="tiny", ref="file:/x", id=ModelId("5a" * 16), sha256="5a" * 32, path=path, in_place=False, stamp=stamp, created=1
        )
    )
    path.unlink()
    return context


def torn_index_of_models(context: Context, shop: Workshop) -> Context:
    context.config.models_dir.mkdir()
    (context.config.models_dir / "index.json").write_text('{"models": [')
    return context


def mdns_port_taken(context: Context, shop: Workshop) -> Context:
    owner = shop.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    try:
        owner.bind(("", 5353))
    except OSError:
        pytest.skip("port 5353 is in use here already")
    return change(context, discovery=("mdns",))


def link_port_taken(context: Context, shop: Workshop) -> Context:
    shop.stack.enter_context(socket.create_server((context.config.link.host, context.config.link.port)))
    return context


def api_port_taken(context: Context, shop: Workshop) -> Context:
    shop.stack.enter_context(socket.create_server((context.config.api.host, context.config.api.port)))
    return context


def link_address_of_another_device(context: Context, shop: Workshop) -> Context:
    return change(context, link=Address("192.0.2.77", 6375))


def links_on_loopback(context: Context, shop: Workshop) -> Context:
    return change(context, link=Address("127.0.0.1", context.config.link.port))


def open_api_without_key(context: Context, shop: Workshop) -> Context:
    return change(context, api=Address("0.0.0.0", context.config.api.port))


def full_disk(context: Context, shop: Workshop) -> Context:
    state = context.config.state
    shop.mount(state, "size=16k,mode=700")
    with pytest.raises(OSError, match="No space"):
        (state / "filler").write_bytes(bytes(1 << 20))
    return context


def no_inodes(context: Context, shop: Workshop) -> Context:
    shop.mount(context.config.cache, "nr_inodes=2,mode=700")
    (context.config.cache / "last").touch()
    return context


def read_only_state(context: Context, shop: Workshop) -> Context:
    shop.mount(context.config.state, "ro,mode=700")
    return context


def little_room_for_models(context: Context, shop: Workshop) -> Context:
    models = shop.folder / "models"
    models.mkdir()
    shop.mount(models, "size=4m")
    return change(context, models_dir=models)


def torn_cluster_key(context: Context, shop: Workshop) -> Context:
    path = context.config.state / CLUSTER_FILE
    path.write_bytes(path.read_bytes()[:20])
    return context


def torn_identity_key(context: Context, shop: Workshop) -> Context:
    path = context.config.state / IDENTITY_FILE
    path.write_bytes(path.read_bytes()[:-40])
    return context


def readable_key(context: Context, shop: Workshop) -> Context:
    (context.config.state / "api.key").write_text("secret")
    (context.config.state / "api.key").chmod(0o644)
    return context


def open_folder(context: Context, shop: Workshop) -> Context:
    context.config.state.chmod(0o755)
    return context


def torn_record(context: Context, shop: Workshop) -> Context:
    path = context.config.state / "placements.json"
    path.write_text('[{"model": ')
    path.chmod(0o600)
    return context


def unfinished_write(context: Context, shop: Workshop) -> Context:
    path = context.config.state / ".placements.json.ab12cd34"
    path.touch(0o600)
    return context


def copied_folder(context: Context, shop: Workshop) -> Context:
    copy = shop.folder / "copy"
    shutil.copytree(context.config.state, copy)
    copy.chmod(0o700)
    return change(context, state=copy)


def certificate_of_another_cluster(context: Context, shop: Workshop) -> Context:
    """The cluster's key was replaced by hand."""
    path = context.config.state / CLUSTER_FILE
    path.write_text(ClusterKey.generate(os.urandom).code)
    return context


def certificate_of_another_key(context: Context, shop: Workshop) -> Context:
    key = load_cluster_key(StateFolder(context.config.state))
    assert key is not None
    other = key.certify(Ed25519PrivateKey.generate().public_key())
    (context.config.state / CERTIFICATE_FILE).write_bytes(other.public_bytes(serialization.Encoding.PEM))
    return context


def expired_certificate(context: Context, shop: Workshop) -> Context:
    folder = StateFolder(context.config.state)
    key, public = load_cluster_key(folder), load_private_key(folder).public_key()
    assert key is not None
    usual, now = key.certify(public), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(usual.issuer, usual.subject, public, 1, now - datetime.timedelta(2), now - datetime.timedelta(1))
    ).sign(key.authority, None)
    (context.config.state / CERTIFICATE_FILE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return context


def clock_before_1970(context: Context, shop: Workshop) -> Context:
    class Reset(SystemClock):
        def wall(self) -> float:
            return 12.0

    return replace(context, clock=Reset())


def hanging_daemon(context: Context, shop: Workshop) -> Context:
    shop.stack.enter_context(lock_state(context.config.state))
    return context


def little_memory(context: Context, shop: Workshop) -> Context:
    return change(context, memory_bytes=100 << 20)


def tight_cgroup(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    (root / "proc/self/cgroup").write_text("0::/system.slice/meshd.service\n")
    (root / "proc/self/mountinfo").write_text("1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    group = root / "sys/fs/cgroup/system.slice/meshd.service"
    group.mkdir(parents=True)
    for name, value in {"memory.max": 256 << 20, "memory.current": 200 << 20}.items():
        (group / name).write_text(f"{value}\n")
    return replace(context, root=root)


def tight_cgroup_of_version_1(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    (root / "proc/self/cgroup").write_text("4:memory:/docker/ab12\n")
    (root / "proc/self/mountinfo").write_text("1 0 0:1 /docker/ab12 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    for name, value in {"memory.limit_in_bytes": 300 << 20, "memory.usage_in_bytes": 1 << 20}.items():
        (group / name).write_text(f"{value}\n")
    return replace(context, root=root)


def quota_of_half_a_core(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/self/mountinfo").write_text("1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    return replace(context, root=root)


def unused_huge_pages(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    (root / "proc/meminfo").write_text("HugePages_Total: 1024\nHugePages_Free: 1024\nHugepagesize: 2048 kB\n")
    return replace(context, root=root)


def slow_governor(context: Context, shop: Workshop) -> Context:
    root = _system(shop)
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("powersave\n")
    (folder / "scaling_driver").write_text("cpufreq-dt\n")
    return replace(context, root=root)


def broker_down(context: Context, shop: Workshop) -> Context:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return _with_broker(context, f"mqtt://127.0.0.1:{port}")


def broker_that_refuses(context: Context, shop: Workshop) -> Context:
    """It answers CONNACK with return code 5."""
    server = shop.stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        with server.accept()[0] as client:
            client.recv(1024)
            client.sendall(b"\x20\x02\x00\x05")

    threading.Thread(target=serve, daemon=True).start()
    return _with_broker(context, f"mqtt://user:secret@127.0.0.1:{server.getsockname()[1]}")


def unknown_model(context: Context, shop: Workshop) -> Context:
    return replace(context, model="nosuch:1b")


def model_that_fits_nowhere(context: Context, shop: Workshop) -> Context:
    """The planner's own error, from a real search over a cluster of one small device."""
    from meshd.doctor.model import fits_alone

    async def plan(request: object) -> dict[str, Any]:
        fits_alone(make_card(30), 100 << 20)
        raise AssertionError("it fits")

    live = SimpleNamespace(
        id="p" * 52, cluster="", link="127.0.0.1:1", api="", linked=list, rows=list, notices=list, plan=plan, dial=_refuse_to_dial
    )
    return replace(context, model="tiny", peer=cast("Any", live))


async def _refuse_to_dial(host: str, port: int) -> Any:
    raise DoesNotFit("not of interest here", missing_bytes=0)


def _with_broker(context: Context, url: str) -> Context:
    return replace(context, config=replace(context.config, mqtt=parse_broker(url), discovery=("static", "mqtt")))


def _system(shop: Workshop) -> Path:
    root = shop.folder / "root"
    (root / "proc/self").mkdir(parents=True)
    return root


Break = Callable[[Context, Workshop], Context]


MOUNTING = (full_disk, no_inodes, read_only_state, little_room_for_models)
"""Set-ups that need root."""
