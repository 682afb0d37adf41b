"""Model folders, with weights in one file or in shards, are averaged and written like single files."""

import json
import os

import pytest
import torch

from wmateacher import cli, files, folders
from wmateacher.posthoc import average_checkpoints, interpolate, model_stock

INDEX = ".index.json"


def state(seed):
    torch.manual_seed(seed)
    return {f"layer{i}.w": torch.randn(10, 4) for i in range(5)} | {
        "n": torch.tensor(seed),
        "scale": torch.ones(()),
    }


def write_shards(folder, content, stem="model", suffix=".safetensors", count=3):
    """Write a model folder as other libraries do."""
    folder.mkdir()
    names = list(content)
    index = {}
    for i in range(count):
        part = {name: content[name] for name in names[i::count]}
        file = f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}"
        files.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}{INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"_name_or_path": int(content["n"])}))
    (folder / "tokenizer.model").write_bytes(b"words")
    return folder


def write_one(name):
    def write(folder, content):
        folder.mkdir()
        files.save(content, folder / name)
        return folder

    return write


KINDS = {
    "safetensors": write_one("model.safetensors"),
    "bin": write_one("pytorch_model.bin"),
    "adapter": write_one("adapter_model.safetensors"),
    "diffusers": write_one("diffusion_pytorch_model.safetensors"),
    "shards": write_shards,
    "bin shards": lambda folder, content: write_shards(folder, content, "pytorch_model", ".bin"),
    "diffusers shards": lambda folder, content: write_shards(folder, content, "diffusion_pytorch_model"),
    "an index": lambda folder, content: write_shards(folder, content) / f"model.safetensors{INDEX}",
}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def read(folder):
    with folders.open_source(folder) as opened:
        return {name: opened.read(name) for name in opened.specs}


@pytest.fixture
def shards(tmp_path):
    return [write_shards(tmp_path / f"model{i}", state(i)) for i in range(3)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_folders_give_the_result_of_their_state_dicts(tmp_path, kind):
    states = [state(i) for i in range(3)]
    sources = [kind(tmp_path / str(i), content) for i, content in enumerate(states)]
    for merge in (
        lambda s, **o: average_checkpoints(s, "beta(0.5,0.5)", **o),
        lambda s, **o: interpolate(s[0], s[1], 0.25, **o),
        lambda s, **o: model_stock(s[0], s[1:], **o),
    ):
        expected = merge(states)
        assert_equal(merge(sources), expected)
        assert_equal(merge([states[0], *sources[1:]]), expected)
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        merge(sources, output=out)
        assert_equal(read(out), expected)


def test_shards_are_of_bounded_size_and_other_files_are_the_last_models(shards, tmp_path):
    (shards[2] / "training_args.bin").write_bytes(b"x")
    (shards[2] / "trainer_state.json").write_text("{}")
    (shards[2] / "optimizer.pt").write_bytes(b"x")
    (shards[2] / "logs").mkdir()
    out = tmp_path / "made" / "out"
    average_checkpoints(shards, output=out, shard_bytes=400)
    assert sorted(os.listdir(out)) == [
        "config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        f"model.safetensors{INDEX}", "tokenizer.model",
    ]  # fmt: skip
    assert os.listdir(tmp_path / "made") == ["out"]
    assert json.loads((out / "config.json").read_text()) == {"_name_or_path": 2}
    index = json.loads((out / f"model.safetensors{INDEX}").read_text())
    assert index["metadata"]["total_size"] == 5 * 160 + 8 + 4
    for name, shard in index["weight_map"].items():
        assert name in files.load(out / shard)
    assert all(len(files.load(out / shard)) <= 4 for shard in index["weight_map"].values())


def test_a_folder_may_become_a_file_and_an_adapter_is_never_split(shards, tmp_path):
    average_checkpoints(shards, output=tmp_path / "a.safetensors")
    assert_equal(files.load(tmp_path / "a.safetensors"), average_checkpoints(shards))
    adapter = write_one("adapter_model.bin")(tmp_path / "adapter", state(1))
    average_checkpoints([adapter], output=tmp_path / "out", shard_bytes=100)
    assert os.listdir(tmp_path / "out") == ["adapter_model.safetensors"]


def test_wrapped_names_in_shards(shards, tmp_path):
    content = state(0)
    other = write_one("pytorch_model.bin")(tmp_path / "w", {f"module.{k}": v for k, v in content.items()})
    assert_equal(average_checkpoints([shards[1], other]), average_checkpoints([state(1), content]))


def test_a_failed_write_leaves_nothing(shards, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    save = files.save
    monkeypatch.setattr(folders, "save", lambda s, f, **o: save(s, f) if "00001" in f.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        average_checkpoints(shards, output=tmp_path / "out", shard_bytes=400)
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.undo()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_bytes(b"of somebody else")
    average_checkpoints(shards, output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out", "out.partial"])
    assert os.listdir(tmp_path / "out.partial") == ["half"]
    assert "half" not in os.listdir(tmp_path / "out")


def _missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _half_a_shard(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _tensor_that_is_not_there(folder):
    change_index(folder, lambda index: index.update({"layer9.w": "model-00001-of-00003.safetensors"}))


def _tensor_that_is_not_named(folder):
    change_index(folder, lambda index: index.pop("layer3.w"))


def _tensor_in_another_shard(folder):
    change_index(folder, lambda index: index.update({"layer3.w": "model-00003-of-00003.safetensors"}))


def _index_without_a_map(folder):
    (folder / f"model.safetensors{INDEX}").write_text("{}")


def _index_that_is_no_json(folder):
    (folder / f"model.safetensors{INDEX}").write_text("version https://git-lfs")


def _two_models(folder):
    files.save(state(1), folder / "adapter_model.safetensors")


def _no_model(folder):
    (folder / f"model.safetensors{INDEX}").unlink()


def change_index(folder, change):
    file = folder / f"model.safetensors{INDEX}"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


BROKEN = {
    _missing_shard: "the shard 'model-00002-of-00003.safetensors' that .* names is missing",
    _half_a_shard: "cannot read .*model-00002-of-00003.safetensors",
    _tensor_that_is_not_there: "'layer9.w' is in 'model-00001-of-00003.safetensors', but the shard does not have it",
    _tensor_that_is_not_named: "'layer3.w' is in 'model-00001-of-00003.safetensors', where the index does not",
    _tensor_in_another_shard: "do not fit together: 'layer3.w'",
    _index_without_a_map: "is not an index of shards: it has no weight_map",
    _index_that_is_no_json: "is not an index of shards",
    _two_models: "holds several models, model.safetensors.index.json, adapter_model.safetensors: pass one",
    _no_model: "holds no model: none of model.safetensors",
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.items(), ids=[f.__name__.strip("_") for f in BROKEN])
def test_broken_folders_are_refused_before_anything_is_written(shards, tmp_path, spoil, message):
    spoil(shards[1])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        average_checkpoints(shards, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_is_checked_before_any_work(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("wmateacher.posthoc.merging.combine", lambda *a: pytest.fail("worked"))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full.pt").mkdir()
    for sources, out, message in [
        (shards, shards[0], "exists and is not empty: choose another name, or delete it"),
        (shards, tmp_path / "file", "exists and is not empty"),
        (shards, tmp_path / "file" / "out", "'.*file' is not a folder that you may write to"),
        (shards, tmp_path / "file" / "out.pt", "is not a folder that you may write to"),
        ([state(0)], tmp_path / "out", "the output must be a file that ends in"),
        ([state(0)], tmp_path / "full.pt", "full.pt' is a folder: name a file in it"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            average_checkpoints(sources, output=out)


def test_the_command_line_reads_and_writes_folders(shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["average", *map(str, shards), "--output", str(out)]) == 0
    assert_equal(read(out), average_checkpoints(shards))
    assert cli.main(["interpolate", *map(str, shards[:2]), "--alpha", "1", "--output", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert (
        cli.main(["interpolate", *map(str, shards[:2]), "--alpha", "1", "--output", str(tmp_path / "empty")])
        == 0
    )
    assert_equal(read(tmp_path / "empty"), state(1))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "new.pt", "sub", "sub/new.pt", "sub/../../model1/new.pt"]
)
def test_an_output_inside_of_an_input_is_refused(shards, name, capsys):
    before = {file: file.read_bytes() for file in shards[1].iterdir()}
    index = shards[1] / f"model.safetensors{INDEX}"
    for sources in (shards[:2], [shards[1], shards[0]], [index, shards[0]]):
        with pytest.raises(
            ValueError, match="is inside of the input '.*model1', .* name a place outside of it"
        ):
            average_checkpoints(sources, output=shards[1] / name)
    arguments = ["average", *map(str, shards), "--output", str(shards[1] / name), "--force"]
    assert cli.main(arguments) == 2
    assert "is inside of the input" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in shards[1].iterdir()} == before


def test_the_metadata_of_the_last_input_is_kept(tmp_path):
    texts = {"format": "np", "license": "mit", "ss_base": "sd"}
    sources = [write_one("model.safetensors")(tmp_path / str(i), state(i)) for i in range(2)]
    files.save(state(1), sources[1] / "model.safetensors", {"step": 3}, texts=texts)
    expected = texts | {"format": "pt"}
    average_checkpoints(sources, output=tmp_path / "out")
    average_checkpoints(sources, output=tmp_path / "shards", shard_bytes=400)
    average_checkpoints([s / "model.safetensors" for s in sources], output=tmp_path / "a.safetensors")
    average_checkpoints([tmp_path / "shards"], output=tmp_path / "b.safetensors")
    for file in ("out/model.safetensors", "a.safetensors", "b.safetensors"):
        assert files.read_texts(tmp_path / file) == expected
        assert files.read_metadata(tmp_path / file) is None
    average_checkpoints([sources[0]], output=tmp_path / "c.safetensors")
    assert files.read_texts(tmp_path / "c.safetensors") == {"format": "pt"}
