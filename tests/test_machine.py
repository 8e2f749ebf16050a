"""What the machine and its control groups leave to a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pronghorn import machine
from pronghorn.machine import free_memory, groups, processors_of, room_of, usable_processors


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, of which this process is in /a/b by version 2, and in /v by version 1."""
    for folder in ("a/b", "cpu/v", "memory/v"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own").write_text("5:cpu,cpuacct:/v\n4:memory:/v\n1:name=systemd:/a\n0::/a/b\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return tmp_path


def test_groups_are_found_from_within_outwards(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups("cpu") == [tree / "cpu/v", tree / "cpu", tree / "a/b", tree / "a", tree]
    assert groups("memory")[:2] == [tree / "memory/v", tree / "memory"]
    monkeypatch.setattr(machine, "OWN", tree / "none")
    assert groups("cpu") == []


def test_a_quota_anywhere_above_counts(tree: Path) -> None:
    """`systemd-run -p CPUQuota=150%` sets one where the process is, and not at the root."""
    assert usable_processors() == 16
    (tree / "cpu.max").write_text("1000000 100000\n")
    assert usable_processors() == 10
    (tree / "a/cpu.max").write_text("400000 100000\n")
    (tree / "a/b/cpu.max").write_text("max 100000\n")
    assert usable_processors() == 4
    (tree / "a/b/cpu.max").write_text("150000 100000\n")
    assert usable_processors() == 2
    (tree / "cpu/v/cpu.cfs_quota_us").write_text("20000\n")  # version 1
    (tree / "cpu/v/cpu.cfs_period_us").write_text("100000\n")
    assert usable_processors() == 1
    (tree / "cpu/v/cpu.cfs_quota_us").write_text("-1\n")
    assert usable_processors() == 2
    for broken in ("", "x", "0 0", "100"):
        (tree / "a/b/cpu.max").write_text(broken)
        assert processors_of(tree / "a/b") == float("inf")


def test_a_control_group_counts_no_files(tmp_path: Path) -> None:
    """What it holds of files makes room when it is wanted."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 350\nactive_file 250\nshmem 7\n")
    assert room_of(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert room_of(tmp_path) == float("inf")
    (tmp_path / "memory.limit_in_bytes").write_text("2000\n")  # version 1
    (tmp_path / "memory.usage_in_bytes").write_text("900\n")
    (tmp_path / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 50\ntotal_active_file 25\n")
    assert room_of(tmp_path) == 1175
    assert room_of(tmp_path / "none") == float("inf")


def test_the_least_room_counts(tree: Path) -> None:
    assert 2**20 < free_memory() < 2**50
    for folder, room in (("a", 5000), ("memory/v", 6000)):
        (tree / folder / "memory.max").write_text(f"{room}\n")
        (tree / folder / "memory.current").write_text("1000\n")
        (tree / folder / "memory.stat").write_text("")
    assert free_memory() == 4000
