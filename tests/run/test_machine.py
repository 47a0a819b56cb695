"""The memory that a process can still take is that of its cgroups, where they allow less than the machine has."""

from pathlib import Path

import pytest

from lmoe.run.machine import Memory, disk, gpu_models, memory

GIB = 1024**3
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
NEW = ("memory.max", "memory.current", "inactive_file")


def machine(
    folder: Path, cgroup: str, limits: dict[str, tuple[object, int, int]], names: tuple[str, str, str]
) -> Memory:
    """Memory of a machine of 16 GiB with 8 free, in a cgroup; limits by its folder: limit, use, what is given back."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for place, values in limits.items():
        (groups / place).mkdir(parents=True, exist_ok=True)
        (groups / place / names[0]).write_text(f"{values[0]}\n")
        (groups / place / names[1]).write_text(f"{values[1]}\n")
        (groups / place / "memory.stat").write_text(f"anon 1\n{names[2]} {values[2]}\n")
    return memory(proc, groups)


@pytest.mark.parametrize(
    ("cgroup", "limits", "names", "free", "limit"),
    [
        ("0::/\n", {}, NEW, 8, None),
        ("0::/\n", {".": ("max", 2 * GIB, 0)}, NEW, 8, None),
        ("0::/\n", {".": (4 * GIB, 3 * GIB, 0)}, NEW, 1, 4),
        ("0::/\n", {".": (4 * GIB, 3 * GIB, 2 * GIB)}, NEW, 3, 4),
        ("0::/\n", {".": (12 * GIB, GIB, 0)}, NEW, 8, 12),
        ("0::/\n", {".": (2 * GIB, 3 * GIB, 0)}, NEW, 0, 2),
        ("0::/job/step\n", {"job": (4 * GIB, 3 * GIB, 0), "job/step": (6 * GIB, GIB, 0)}, NEW, 1, 4),
        ("4:memory:/job\n0::/\n", {"memory/job": (4 * GIB, 3 * GIB, GIB)}, OLD, 2, 4),
        ("4:memory:/\n", {"memory": (9223372036854771712, GIB, 0)}, OLD, 8, None),
        ("0::/\n", {".": ("nonsense", 0, 0)}, NEW, 8, None),
    ],
)
def test_free_memory_is_the_least_that_machine_and_cgroups_allow(tmp_path, cgroup, limits, names, free, limit):
    found = machine(tmp_path, cgroup, limits, names)
    expected = None if limit is None else limit * GIB
    assert found == Memory(total=16 * GIB, free=free * GIB, limit=expected)


def test_a_system_without_proc_tells_all_memory_and_not_what_is_free(tmp_path):
    found = memory(tmp_path / "proc", tmp_path / "cgroup")
    assert found.total > 0
    assert (found.free, found.limit) == (None, None)


def test_the_disk_of_a_folder_that_is_not_there_is_that_of_its_nearest_parent(tmp_path):
    assert disk(tmp_path / "not" / "yet").free == pytest.approx(disk(tmp_path).free, rel=0.1)
    assert disk(tmp_path / "not" / "yet").writable
    (tmp_path / "file").write_text("")
    assert not disk(tmp_path / "file" / "below").writable


def test_gpus_are_named_as_the_driver_does_and_none_where_there_is_none(tmp_path):
    assert gpu_models(tmp_path) == []
    for number, name in enumerate(("NVIDIA H200", "NVIDIA A100-SXM4-80GB")):
        folder = tmp_path / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 28\n", encoding="utf-8")
    assert gpu_models(tmp_path) == ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"]
