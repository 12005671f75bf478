"""The door to the disk: what it refuses, keeps and leaves behind."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan._writing import WriteError, append, atomic_file, atomic_path, is_part, target_of, write
from fastgan.cli import main
from fastgan.training.recipes import recipes

ROOT = Path(fastgan.__file__).parent


def device_at(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError:
        pytest.skip("only root makes devices")


def pipe_at(path: Path) -> None:
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))  # a socket's name has at most 108 bytes


def folder_at(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [device_at, pipe_at, socket_at, folder_at])
@pytest.mark.parametrize("through", ["itself", "a link"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, kind, through):
    there = path = tmp_path / "there"
    kind(there)
    if through == "a link":
        path = tmp_path / "link"
        path.symlink_to(there)
    before = there.lstat()
    with pytest.raises(ValueError, match=r"must be a regular file or not exist yet, it is a (char|pipe|socket|folder)"):
        write(path, "content")
    after = there.lstat()
    assert (before.st_ino, before.st_mode, before.st_rdev) == (after.st_ino, after.st_mode, after.st_rdev)
    assert len(list(tmp_path.iterdir())) == 1 + (through == "a link")


def test_permissions_and_owner_of_what_is_replaced_are_kept(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    write(path, "new")
    after = path.stat()
    assert path.read_text() == "new" and before.st_ino != after.st_ino
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)


def test_a_new_file_has_the_permissions_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_links_are_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "far" / "later")
    write(link, "new")
    write(dangling, "born")
    assert link.is_symlink() and target.read_text() == "new"
    assert dangling.is_symlink() and (tmp_path / "far" / "later").read_text() == "born"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="its links lead in a circle"):
        write(tmp_path / "circle", "x")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="neither empty nor hold a NUL"):
        target_of(name)


def test_a_block_that_raises_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for door in (atomic_file, atomic_path):
        with pytest.raises(ZeroDivisionError), door(path) as inner:
            assert is_part(next(p for p in tmp_path.iterdir() if p != path))
            if door is atomic_file:
                inner.write(b"half of it")
            raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_part_is_named_after_its_suffix_and_never_too_long(tmp_path):
    path = tmp_path / ("x" * 250 + ".gif")
    with atomic_path(path) as part:
        assert part.suffix == ".gif" and is_part(part) and part.parent == tmp_path
        part.write_bytes(b"1")
    assert path.read_bytes() == b"1"
    with pytest.raises(ValueError, match="the name is too long"):
        write(tmp_path / ("x" * 300), "content")


def test_a_part_of_the_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, WriteError), match="a part of the path is a file"):
        write(tmp_path / "file" / "new", "content")


LIMITED = """
import resource, sys, torch
from fastgan._writing import append, write
from fastgan.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"step": 1, "x": torch.zeros(1_000_000)}
for call in (
    lambda: checkpoint.save(big, sys.argv[1]),
    lambda: write(sys.argv[1], bytes(200_000)),
    lambda: append(sys.argv[1], "x" * 200_000),
):
    try:
        call()
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_a_file_larger_than_the_limit_is_one_sentence(tmp_path):
    """torch's writer says "unexpected pos" of every failing write: the system's own words must come out."""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    said = f"WriteError output: {path} must be writable: it would be larger than a file may be here (ulimit -f)"
    assert [line.startswith(said) for line in done.stdout.splitlines()] == [True] * 3
    assert path.stat().st_size == 100_000  # what append had written; the other two left nothing
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_is_one_sentence(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        write(disk / "file", "old")
        for call in (
            lambda: save_large(disk / "file"),
            lambda: write(disk / "file", bytes(1 << 20)),
            lambda: append(disk / "log", "x" * (1 << 20)),
        ):
            with pytest.raises(WriteError, match="the disk is full; free some space or write elsewhere"):
                call()
        assert (disk / "file").read_text() == "old"
        assert sorted(p.name for p in disk.iterdir()) == ["file", "log"]
    finally:
        subprocess.run(["umount", disk], check=True)


def save_large(path: Path) -> None:
    from fastgan.training import checkpoint

    checkpoint.save({"step": 1, "x": torch.zeros(1_000_000)}, path)


def test_every_writer_uses_the_door():
    """No other file of the package opens, renames or writes one."""
    writing = re.compile(
        r"""\.write_text\(|\.write_bytes\(|os\.(replace|rename)\(|\.rename\(|\b(fd)?open\([^)]*["'][rb]*[wax+]|NamedTemporaryFile"""
    )
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name in ("_writing.py", "choice/cache.py"):  # the cache of races is not synced: losing it costs a race
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node) != "wave.open(file, 'wb')":  # file is memory
                assert not writing.search(ast.unparse(node)), f"{name}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("command", ["export --format pt2", "sample", "interpolate", "bench", "profile"])
def test_every_command_refuses_a_folder_before_it_works(tmp_path, capsys, command):
    """`fastgan export --out /dev/null` as root replaced the device by a file."""
    for suffix in (".png", ".json"):
        (tmp_path / f"taken{suffix}").mkdir()
    run = tmp_path / "run"  # sample asks it whether it takes a file or a folder
    run.mkdir()
    config = {"recipe": recipes()["dcgan-28"].to_dict(), "device": "cpu", "backend": "", "models": {}, "started": ""}
    (run / "config.json").write_text(json.dumps(config))
    verb, *rest = command.split()
    options = {
        "export": ["--run=x", f"--out={tmp_path}/taken.png"],
        "sample": [f"--run={run}", f"--out={tmp_path}/taken.png"],
        "interpolate": ["--run=x", f"--out={tmp_path}/taken.png"],
        "bench": [f"--json={tmp_path}/taken.json"],
        "profile": ["--recipe=dcgan-28", f"--trace={tmp_path}/taken.json"],
    }[verb]
    assert main([verb, *rest, *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "must be a regular file or not exist yet, it is a folder" in shown.err
