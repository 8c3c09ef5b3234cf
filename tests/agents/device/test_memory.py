import errno
import sys
from pathlib import Path

import pytest

from meshd.agents.device.memory import MemoryLimit, cgroup_cpu_limit, cgroup_memory_limits, measure_memory, tightest, usable_cores

GIB = 2**30
V1_NONE = 9223372036854771712


class Tree:
    """A fake `/proc` and `/sys`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def processes(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", mountinfo)

    def v2(self, folder: str, limit: object, usage: int, cache: int = 0, high: object = "max") -> None:
        base = f"sys/fs/cgroup/{folder}"
        self.write(f"{base}/memory.max", limit)
        self.write(f"{base}/memory.high", high)
        self.write(f"{base}/memory.current", usage)
        self.write(f"{base}/memory.stat", f"anon 1\nfile {cache}\ninactive_file {cache}\nslab 7")

    def v1(self, folder: str, limit: int, usage: int, cache: int = 0) -> None:
        base = f"sys/fs/cgroup/memory/{folder}"
        self.write(f"{base}/memory.limit_in_bytes", limit)
        self.write(f"{base}/memory.usage_in_bytes", usage)
        self.write(f"{base}/memory.stat", f"cache {cache}\ntotal_inactive_file {cache}")


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_CPU_MOUNT = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_limits_of_every_level_of_cgroup_v2_are_read(tree: Tree) -> None:
    tree.processes("0::/user.slice/app.slice/meshd.service", V2_MOUNT)
    tree.v2("user.slice/app.slice/meshd.service", "max", GIB)
    tree.v2("user.slice/app.slice", 4 * GIB, 3 * GIB)
    tree.v2("user.slice", 8 * GIB, 3 * GIB)
    assert cgroup_memory_limits(tree.root) == [
        MemoryLimit("cgroup app.slice", 4 * GIB, GIB),
        MemoryLimit("cgroup user.slice", 8 * GIB, 5 * GIB),
    ]


def test_memory_high_is_a_limit_and_reclaimable_cache_is_free(tree: Tree) -> None:
    tree.processes("0::/meshd", V2_MOUNT)
    tree.v2("meshd", 4 * GIB, 3 * GIB, cache=2 * GIB, high=2 * GIB)
    assert cgroup_memory_limits(tree.root) == [MemoryLimit("cgroup meshd", 2 * GIB, GIB)]


def test_inside_a_container_the_mount_is_the_process_own_cgroup(tree: Tree) -> None:
    tree.processes("0::/", V2_MOUNT)
    tree.v2("", 2 * GIB, GIB)
    assert [(limit.total_bytes, limit.free_bytes) for limit in cgroup_memory_limits(tree.root)] == [(2 * GIB, GIB)]


def test_page_cache_in_use_and_reclaimable_slab_are_free(tree: Tree) -> None:
    statistics = {
        "inactive_file": GIB // 2,
        "active_file": 2 * GIB,
        "slab_reclaimable": GIB // 4,
        "anon": GIB // 2,
        "shmem": GIB // 4,
    }
    text = "".join(f"{name} {size}\ntotal_{name} {size}\n" for name, size in statistics.items())
    tree.processes("4:memory:/box\n0::/box", f"{V1_MOUNT}\n{V2_MOUNT}")
    tree.v2("box", 4 * GIB, 7 * GIB // 2)
    tree.v1("box", 4 * GIB, 7 * GIB // 2)
    tree.write("sys/fs/cgroup/box/memory.stat", text)
    tree.write("sys/fs/cgroup/memory/box/memory.stat", text)
    v2, v1 = cgroup_memory_limits(tree.root)
    assert v2.free_bytes == 4 * GIB - (7 * GIB // 2 - 11 * GIB // 4)
    assert v1.free_bytes == 4 * GIB - (7 * GIB // 2 - 5 * GIB // 2)  # v1 shows no reclaimable slab


def test_a_limit_that_cannot_be_read_for_lack_of_descriptors_does_not_count_as_no_limit(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.processes("0::/meshd", V2_MOUNT)
    tree.v2("meshd", 2 * GIB, GIB)

    def read_text(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(OSError, match="Too many open files"):
        cgroup_memory_limits(tree.root)


def test_cgroup_v1_without_limits_is_no_limit(tree: Tree) -> None:
    tree.processes("4:memory:/user\n0::/", V1_MOUNT)
    tree.v1("user", V1_NONE, GIB)
    tree.v1("", V1_NONE, GIB)
    assert cgroup_memory_limits(tree.root) == []


def test_limits_of_every_level_of_cgroup_v1_are_read(tree: Tree) -> None:
    tree.processes("9:cpu,cpuacct:/\n4:memory:/jobs/one", V1_MOUNT)
    tree.v1("jobs/one", 3 * GIB, 2 * GIB, cache=GIB)
    tree.v1("jobs", 2 * GIB, GIB)
    tree.v1("", V1_NONE, GIB)
    assert cgroup_memory_limits(tree.root) == [
        MemoryLimit("cgroup one", 3 * GIB, 2 * GIB),
        MemoryLimit("cgroup jobs", 2 * GIB, GIB),
    ]


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/elsewhere"])
def test_a_container_that_sees_the_hosts_path_reads_its_own_mount(tree: Tree, path: str) -> None:
    tree.processes(f"4:memory:{path}", V1_MOUNT.replace(" / /sys", " /docker/0123abcd /sys"))
    tree.v1("", 2 * GIB, GIB)
    assert [limit.free_bytes for limit in cgroup_memory_limits(tree.root)] == [GIB]


def test_limits_of_both_cgroup_versions_are_read_together(tree: Tree) -> None:
    tree.processes("4:memory:/one\n0::/two", f"{V1_MOUNT}\n{V2_MOUNT.replace('/sys/fs/cgroup ', '/sys/fs/cgroup/unified ')}")
    tree.v1("one", 3 * GIB, GIB)
    tree.v2("unified/two", 5 * GIB, GIB)
    assert {limit.total_bytes for limit in cgroup_memory_limits(tree.root)} == {3 * GIB, 5 * GIB}


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"), [("", ""), ("garbage", "more garbage"), ("0::/x", "1 2 3 - cgroup2"), ("0::/x", V2_MOUNT)]
)
def test_files_that_cannot_be_read_set_no_limit(tree: Tree, cgroup: str, mountinfo: str) -> None:
    tree.processes(cgroup, mountinfo)
    tree.write("sys/fs/cgroup/x/memory.max", "many")
    assert cgroup_memory_limits(tree.root) == []
    assert cgroup_cpu_limit(tree.root) is None


def test_a_system_without_proc_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_memory_limits(tmp_path) == []
    assert cgroup_cpu_limit(tmp_path) is None


def test_the_tightest_limit_binds() -> None:
    memory = tightest(
        [
            MemoryLimit("system", 16 * GIB, 5 * GIB),
            MemoryLimit("cgroup a", 4 * GIB, 3 * GIB),
            MemoryLimit("--memory", 8 * GIB, 8 * GIB),
        ]
    )
    assert (memory.total_bytes, memory.free_bytes, memory.bound_by) == (4 * GIB, 3 * GIB, "cgroup a")


def test_free_memory_is_never_negative() -> None:
    assert tightest([MemoryLimit("cgroup a", GIB, -GIB)]).free_bytes == 0


def test_the_taken_part_of_a_cap_is_not_free(tmp_path: Path) -> None:
    memory = measure_memory(cap_bytes=3 * 2**20, taken_bytes=2**20, root=tmp_path)
    assert (memory.total_bytes, memory.free_bytes, memory.bound_by) == (3 * 2**20, 2 * 2**20, "--memory")


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_AS")
def test_an_address_space_limit_binds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (2**40, 2**40))
    assert measure_memory(root=tmp_path).bound_by == "system"
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1, 1))
    memory = measure_memory(root=tmp_path)
    assert (memory.free_bytes, memory.bound_by) == (0, "ulimit -v")


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("100000", None), ("50000 0", None)])
def test_the_cpu_quota_of_cgroup_v2_is_read(tree: Tree, quota: str, cores: float | None) -> None:
    tree.processes("0::/meshd", V2_MOUNT)
    tree.write("sys/fs/cgroup/meshd/cpu.max", quota)
    assert cgroup_cpu_limit(tree.root) == cores


def test_the_tightest_cpu_quota_of_all_levels_is_used(tree: Tree) -> None:
    tree.processes("3:cpu,cpuacct:/jobs/one", V1_CPU_MOUNT)
    for folder, quota in (("jobs/one", -1), ("jobs", 300000), ("", -1)):
        tree.write(f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_quota_us", quota)
        tree.write(f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_period_us", 100000)
    assert cgroup_cpu_limit(tree.root) == 3.0


def test_half_a_core_is_still_one_thread(tree: Tree) -> None:
    tree.processes("0::/meshd", V2_MOUNT)
    tree.write("sys/fs/cgroup/meshd/cpu.max", "50000 100000")
    assert usable_cores(tree.root) == 1


def test_this_device_has_memory_and_cores() -> None:
    memory = measure_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert usable_cores() >= 1
