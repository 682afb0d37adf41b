"""Writing files whole or not at all."""

import os
import re
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from wmateacher.files import load, save, write_atomically


@contextmanager
def full_disk(at=20_000):
    """Let no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "a" / "b" / "c.txt"
    with write_atomically(file) as stream:
        stream.write(b"first")
        assert not file.exists()
    with write_atomically(str(file)) as stream:
        stream.write(b"second")
        assert file.read_bytes() == b"first"
    assert file.read_bytes() == b"second"
    assert os.listdir(file.parent) == ["c.txt"]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), RuntimeError("mine")])
def test_an_error_in_the_block_is_raised_as_it_is_and_keeps_the_old_file(tmp_path, error):
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, write_atomically(file) as stream:  # noqa: PT012
        stream.write(b"half")
        raise error
    assert caught.value is error
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_is_on_the_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with write_atomically(tmp_path / "a") as stream:
        stream.write(b"12345")
    assert calls == [5, "replace"]


def raw(state, file):
    with write_atomically(file) as stream:
        stream.write(state["w"].numpy().tobytes())


@pytest.mark.parametrize(("name", "write"), [("a.bin", raw), ("a.pt", save), ("a.safetensors", save)])
def test_a_full_disk_is_one_error_that_says_whether_there_is_an_old_file(tmp_path, name, write):
    file = tmp_path / name
    state = {"w": torch.zeros(100_000)}
    message = rf"cannot write {re.escape(str(file))} \(.*File too large.*\); %s. Check that .* free space"
    with full_disk(), pytest.raises(OSError, match=message % "there was no old file"):
        write(state, file)
    assert os.listdir(tmp_path) == []
    write({"w": torch.ones(10)}, file)
    before = file.read_bytes()
    with full_disk(), pytest.raises(OSError, match=message % "the old file is unchanged"):
        write(state, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_a_parent_that_is_a_file_is_the_same_error(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(
        OSError, match=r"cannot write .*a/b.pt \(File exists\); .* Check that .*a is a folder"
    ):
        save({"w": torch.ones(1)}, tmp_path / "a" / "b.pt")


def test_a_killed_write_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    file = tmp_path / "a.pt"
    save({"w": torch.ones(3)}, file)
    (tmp_path / "a.pt.partial").write_bytes(b"half")
    assert load(file)["w"].sum() == 3
    save({"w": torch.zeros(3)}, file)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load(file)["w"].sum() == 0
