"""Reading what there is without running code, and writing files whole or not at all."""

import os
import re
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher
from wmateacher.files import load, read_metadata, read_texts, save, write_atomically
from wmateacher.posthoc import average_checkpoints, interpolate, model_stock


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


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_write_leaves_other_files_beside_it_alone(tmp_path, name):
    file, other = tmp_path / name, tmp_path / f"{name}.partial"
    other.write_bytes(b"mine")
    save({"w": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="not a tensor"):
        save({"w": torch.ones(3), "n": 3}, tmp_path / "a.safetensors")
    assert load(file)["w"].sum() == 3
    assert other.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.partial"]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    save({"w": torch.ones(3)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- what is not a checkpoint -------------------------------------------------------------------------


class Net(nn.Linear):
    """A class that no reader may import."""


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "saved", **options)
    return (tmp_path / "saved").read_bytes()


def as_safetensors(tmp_path):
    save({"w": torch.zeros(1000)}, tmp_path / "saved.safetensors")
    return (tmp_path / "saved.safetensors").read_bytes()


LEGACY = {"_use_new_zipfile_serialization": False}
NOT_CHECKPOINTS = {
    "empty": (lambda _: b"", "it is empty"),
    "a Git LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
        "it is a Git LFS pointer: fetch the file with `git lfs pull`",
    ),
    "a web page": (lambda _: b"<!DOCTYPE html><html><body>404</body>", "it is a web page"),
    "a web page in lower case": (lambda _: b"\n<html lang=en>", "it is a web page"),
    "text": (lambda _: b"hello world, this is no checkpoint", "it is damaged, or neither"),
    "noise": (lambda _: bytes(range(256)) * 8, "it is damaged, or neither"),
}
NOT_TORCH = {
    "half a file": (lambda p: saved(p, {"w": torch.zeros(1000)})[:2000], "it is damaged, or neither"),
    "half a file of the old format": (
        lambda p: saved(p, {"w": torch.zeros(1000)}, **LEGACY)[:2000],
        "it is damaged, or neither",
    ),
    "a module": (
        lambda p: saved(p, Net(2, 2)),
        r"holds objects of \S*Net, and .* save only the model's state_dict",
    ),
    "a module in the old format": (lambda p: saved(p, Net(2, 2), **LEGACY), "holds objects of"),
    "a function": (
        lambda p: saved(p, {"w": torch.zeros(1), "f": os.path.join}),
        "holds objects of posixpath.join",
    ),
    "safetensors": (as_safetensors, "it is damaged, or neither"),
    "a list": (lambda p: saved(p, [torch.zeros(1)]), "holds no state dict: no tensors by name but a list"),
    "a tensor": (lambda p: saved(p, torch.zeros(1)), "holds no state dict: no tensors by name but a Tensor"),
    "numbers": (
        lambda p: saved(p, {"epoch": 3, "lr": 0.1}),
        "holds no state dict: .* its keys are 'epoch', 'lr'",
    ),
    "an optimizer": (
        lambda p: saved(p, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1).state_dict()),
        "holds no state dict: it is the state of an optimizer",
    ),
}
CASES = [
    *((".safetensors", *case) for case in NOT_CHECKPOINTS.values()),
    (".safetensors", lambda p: as_safetensors(p)[:2000], "it is damaged, or neither"),
    (".safetensors", lambda p: as_safetensors(p)[:20], "it is damaged, or neither"),
    *((".pt", *case) for case in (NOT_CHECKPOINTS | NOT_TORCH).values()),
]


@pytest.mark.parametrize(("suffix", "content", "message"), CASES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_checkpoint_is_one_error_that_says_what_it_is(tmp_path, suffix, content, message):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content(tmp_path))
    for read in (load, lambda file: average_checkpoints([file])):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "mmap" not in str(caught.value)


def test_a_folder_with_the_name_of_a_file_is_an_error(tmp_path):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no model"):
        average_checkpoints([tmp_path / "a.pt"])


def test_the_format_before_torch_1_6_is_read(tmp_path):
    state = {"w": torch.arange(4.0), "n": torch.tensor(3)}
    torch.save(state, tmp_path / "a.pt", **LEGACY)
    torch.save({"model": state}, tmp_path / "b.pt", **LEGACY)
    for file in ("a.pt", "b.pt"):
        assert torch.equal(load(tmp_path / file)["w"], state["w"])
    assert torch.equal(average_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"])["w"], state["w"])


# --- which state dict ---------------------------------------------------------------------------------


def state(value):
    return {"layer.w": torch.full((2,), float(value)), "layer.n": torch.tensor(int(value))}


def run_checkpoint(value):
    """The checkpoint of a run, with everything that is not its student."""
    return {
        "format": 3,
        "identity": {"kernel": "uniform"},
        "parts": {
            "student": state(value),
            "objective": {"scale": torch.zeros(2)},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
            "teacher": teacher_state(value + 100),
        },
        "random": torch.get_rng_state(),
        "series": {"loss": torch.zeros(9, dtype=torch.float64)},
    }


def teacher_state(value):
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.register_parameter("w", nn.Parameter(torch.full((2,), float(value))))
    return WMATeacher(model, "uniform", 10).state_dict()


LIGHTNING = {
    "state_dict": state(5),
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    "callbacks": {
        "ModelCheckpoint": {
            "best_model_score": torch.tensor(0.5),
            "best_k_models": {"a.ckpt": torch.tensor(0.5)},
        },
        "TeacherCallback": {"total_steps": 10, "teacher": teacher_state(100)},
    },
    "loops": {"seed": {"rng": torch.zeros(8, dtype=torch.uint8)}},
}
TWO = {"model": {"student": state(5), "ema": state(9)}, "step": torch.tensor(3)}
FLAT = {f"{net}.{k}": v for net, n in (("student", 5), ("head", 9)) for k, v in state(n).items()}
FOUND = {
    "a run's student": (run_checkpoint(5), None),
    "the model of a Lightning checkpoint": (LIGHTNING, None),
    "nested alone": ({"checkpoint": {"model": state(5)}, "epoch": 3}, None),
    "itself, beside an entry of its own": (state(5) | {"layer._extra_state": {"scale": torch.ones(2)}}, None),
    "scalars alone": ({"model": {"layer.w": torch.tensor(5.0), "layer.n": torch.tensor(5)}}, None),
    "one of two": (TWO, "model.student"),
    "a part of a run": (run_checkpoint(9) | {"parts": {"ema": state(5), "student": state(1)}}, "parts.ema"),
    "the beginning of names": (FLAT, "student"),
    "the beginning of names in an entry": ({"state_dict": FLAT, "ema": FLAT}, "state_dict.student"),
    "a teacher's average": (teacher_state(5), "module"),
    "the average of a teacher in a run": (run_checkpoint(-95), "parts.teacher.module"),
    "a key with a dot": ({"net.v1": state(5), "net": state(9)}, "net.v1"),
    "itself, though it has others": (state(5) | {"ema": state(9)}, "."),
}


@pytest.mark.parametrize("how", ["file", "mapping"])
@pytest.mark.parametrize(("content", "key"), FOUND.values(), ids=FOUND)
def test_the_models_state_dict_is_found(tmp_path, content, key, how):
    source = tmp_path / "a.pt"
    torch.save(content, source)
    source = source if how == "file" else content
    for result in (
        average_checkpoints([source, source], key=key),
        interpolate(source, source, 0.5, key=key),
        model_stock(source, [source, source], key=key),
    ):
        assert (result["layer.w"] == 5).all()


ASKED = {
    "two": (
        TWO,
        "holds several state dicts, 'model.student', 'model.ema': pass one of them, as key='model.student'",
    ),
    "two of which one is deeper": (
        {"ema": state(1), "a": {"b": state(2)}},
        "several state dicts, 'ema', 'a.b'",
    ),
    "itself and another": (state(5) | {"ema": state(9)}, r"several state dicts, '\.', 'ema'"),
    "a teacher": (
        teacher_state(5),
        "it is the state of a teacher; for the averaged weights in it, pass key='module'",
    ),
    "a teacher alone in a file": (
        {"total_steps": 9, "teacher": teacher_state(5)},
        "pass key='teacher.module'",
    ),
    "nothing": ({}, "holds no state dict: no tensors by name; its keys are none"),
}


@pytest.mark.parametrize(("content", "message"), ASKED.values(), ids=ASKED)
def test_an_unclear_checkpoint_is_an_error_that_lists_the_keys(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    for source in (tmp_path / "a.pt", content):
        with pytest.raises(ValueError, match=message):
            average_checkpoints([source])


def test_an_unknown_key_lists_those_that_there_are(tmp_path):
    torch.save(run_checkpoint(5), tmp_path / "a.pt")
    message = "no state dict under 'student'; keys with a state dict: 'parts.student', 'parts.objective', 'parts.teacher.module'"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.pt", key="student")
    for key in ("epoch", "layer.w", "lay"):
        with pytest.raises(ValueError, match=f"under '{key}'"):
            average_checkpoints([state(3) | {"epoch": 3}], key=key)


def test_a_key_selects_names_in_a_safetensors_file(tmp_path):
    save(FLAT, tmp_path / "a.safetensors")
    assert (average_checkpoints([tmp_path / "a.safetensors"], key="student")["layer.w"] == 5).all()
    assert load(tmp_path / "a.safetensors", key="head").keys() == {"layer.w", "layer.n"}
    with pytest.raises(ValueError, match="holds no tensors under 'stud'"):
        load(tmp_path / "a.safetensors", key="stud")


@pytest.mark.parametrize("text", ["step 3", "{", "[" * 10_000])
def test_metadata_that_is_no_json_is_named(tmp_path, text):
    file = tmp_path / "a.safetensors"
    save({"w": torch.ones(1)}, file, texts={"wmateacher": text})
    with pytest.raises(
        ValueError, match=r"the metadata 'wmateacher' of .*a.safetensors' is not JSON"
    ) as caught:
        read_metadata(file)
    assert len(str(caught.value)) < 500
    assert read_texts(file) == {"format": "pt"}


def test_what_killed_runs_left_of_a_file_is_removed_once_it_is_old(tmp_path):
    old, new, mine = (
        tmp_path / f"state.pt.{part}" for part in ("0123abcd.partial", "0123abce.partial", "partial")
    )
    for file in (old, new, mine):
        file.write_text("half")
        os.utime(file, (0, 0) if file is not new else None)
    with write_atomically(tmp_path / "state.pt") as stream:
        stream.write(b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "state.pt", new, mine])
