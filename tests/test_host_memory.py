"""Available host memory: that of the machine, of cgroups, and of several ranks."""

from __future__ import annotations

import os

import pytest

from fastdino import distributed, host_memory

V1, V2 = "7:cpu,cpuacct:/job\n4:{}memory:/job/step\n", "0::/job/step\n"
STAT = "active_file 100\ninactive_file 200\ntotal_active_file 1000\ntotal_inactive_file 2000\n"


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A function that writes the files of a system; a cgroup is (limit, use)."""

    def write(meminfo: str, cgroup: str, cgroups: dict[str, tuple[object, int]]) -> None:
        (tmp_path / "meminfo").write_text(meminfo)
        (tmp_path / "cgroup").write_text(cgroup)
        old = "memory:" in cgroup
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        for path, values in cgroups.items():
            folder = tmp_path / "sys" / ("memory" if old else ".") / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.stat").write_text(STAT)
            for name, value in zip(names, values, strict=True):
                (folder / f"memory.{name}").write_text(f"{value}\n")

    for name, file in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "cgroup"), ("CGROUPS", "sys")):
        monkeypatch.setattr(host_memory, name, str(tmp_path / file))
    return write


MACHINE = "MemTotal:  90 kB\nMemAvailable:   80 kB\n"


@pytest.mark.parametrize("cgroup", ["", "7:cpu:/\n", V2, "0::/\n"])
def test_without_limits_it_is_that_of_the_machine(system, cgroup):
    system(MACHINE, cgroup, {"": ("max", 10), "job/step": ("max", 20)})
    assert host_memory.available_memory() == 80 * 1024


@pytest.mark.parametrize("limited", ["", "job", "job/step"])
@pytest.mark.parametrize(
    ("cgroup", "files"), [(V2, 300), (V1.format(""), 3000), (V1.format("pids,"), 3000)]
)
def test_the_limit_of_any_enclosing_cgroup_counts(system, cgroup, files, limited):
    """Cached files are available; version 1 has their sum over inner cgroups under other names."""
    unlimited = "max" if cgroup == V2 else 2**63 - 4096
    cgroups = dict.fromkeys(("", "job", "job/step"), (unlimited, 9000))
    system(MACHINE, cgroup, cgroups | {limited: (20_000, 9000)})
    assert host_memory.available_memory() == 11_000 + files
    system(MACHINE, cgroup, cgroups | {limited: (20_000, 30_000)})
    assert host_memory.available_memory() == 0


@pytest.mark.parametrize(("cgroup", "files"), [(V2, 300), (V1.format(""), 3000)])
def test_a_container_may_only_see_its_own_cgroup(system, cgroup, files):
    system(MACHINE, cgroup, {"": (20_000, 9000)})
    assert host_memory.available_memory() == 11_000 + files


@pytest.mark.parametrize(
    ("cgroup", "stat"),
    [
        (V2, None),
        (V2, ""),
        (V2, "inactive_file 200\n"),
        (V2, "active_file 100\ninactive_file\n"),
        (V2, b"active_file 100\ninactive_file \xff\n"),
        (V1.format(""), None),
        (V1.format(""), "active_file 100\ninactive_file 200\n"),
    ],
    ids=str,
)
def test_a_limit_counts_without_known_cached_files(system, tmp_path, cgroup, stat):
    system(MACHINE, cgroup, {"job": (1000, 400)})
    file = next(tmp_path.rglob("memory.stat"))
    file.unlink()
    if stat is not None:
        file.write_bytes(stat if isinstance(stat, bytes) else stat.encode())
    assert host_memory.available_memory() == 600


@pytest.mark.parametrize("use", [None, "", "?"])
def test_a_limit_counts_without_a_known_use(system, tmp_path, use):
    system(MACHINE, V2, {"job": (1000, 400)})
    file = next(tmp_path.rglob("memory.current"))
    file.unlink()
    if use is not None:
        file.write_text(use)
    assert host_memory.available_memory() == 1000


@pytest.mark.parametrize(
    ("most", "high", "available"),
    [
        ("max", "max", 80 * 1024),
        ("max", "20000", 11_300),
        ("20000", "max", 11_300),
        ("20000", "15000", 6_300),
        ("15000", "20000", 6_300),
        ("20000", "8000", 0),
    ],
)
def test_the_limit_above_which_a_cgroup_is_slowed_down_counts(
    system, tmp_path, most, high, available
):
    system(MACHINE, V2, {"job": (most, 9000)})
    (tmp_path / "sys/job/memory.high").write_text(f"{high}\n")
    assert host_memory.available_memory() == available


@pytest.mark.parametrize("line", ["", "0", "0:", "nonsense", "7:cpu", "::::", "0::\0"])
def test_malformed_lines_are_left_out(system, line):
    system(f"{MACHINE}\nnonsense\n", f"{line}\n{V2}", {"job": (20_000, 9000)})
    assert host_memory.available_memory() == 11_300


@pytest.mark.parametrize("limited", [True, False])
def test_names_of_cgroups_may_have_any_bytes(system, tmp_path, limited):
    folder = tmp_path / "sys" / os.fsdecode(b"caf\xe9\x85")
    system(MACHINE, "", {"job": (20_000, 9000)})
    if limited:
        (tmp_path / "sys/job").rename(folder)
    (tmp_path / "cgroup").write_bytes(b"5:pids:/\xff\n0::/caf\xe9\x85\n")
    assert host_memory.available_memory() == (11_300 if limited else 80 * 1024)


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 90 kB\n", "MemAvailable: much\n", "?"])
def test_it_is_infinite_if_the_system_reports_nothing(system, monkeypatch, meminfo):
    system(meminfo, V2, {"job": ("?", 1)})
    assert host_memory.available_memory() == float("inf")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", "/missing/cgroup")
    monkeypatch.setattr(host_memory, "MEMINFO", "/missing/meminfo")
    assert host_memory.available_memory() == float("inf")


@pytest.mark.parametrize(
    ("ranks", "share"),
    [
        ([("a", 80)], 80),
        ([("a", 80), ("a", 60)], 30),
        ([("a", 80), ("b", 60), ("a", 80)], 40),
        ([("a", 80), ("b", 30), ("a", 80)], 30),
    ],
)
def test_ranks_of_a_machine_share_its_memory_and_the_least_share_counts(monkeypatch, ranks, share):
    sent = []
    monkeypatch.setattr(distributed, "gather", lambda own: sent.append(own) or ranks)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 7.0)
    monkeypatch.setattr(host_memory.socket, "gethostname", lambda: "me")
    assert host_memory.memory_per_rank() == share
    assert sent == [("me", 7.0)]
