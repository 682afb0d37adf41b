import subprocess
import sys
from dataclasses import replace

import pytest
from miniature import everything

from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.check import check, check_pairs, main


@pytest.fixture
def root(tmp_path):
    everything(tmp_path)
    return tmp_path


def test_counts_and_what_is_less_than_published(root):
    found = check("imagenet", root)
    assert (found.where, found.images, found.classes) == (root / "imagenet/val", 10, 5)
    assert found.problems[0].startswith("5 of 1000 classes have images; get ILSVRC2012_img_val.tar")
    assert found.problems[1] == "10 images where the published set has 50,000"


def test_a_whole_set_is_ok(root, monkeypatch):
    whole = replace(imagenet.SETS["objectnet"], classes=2, images=4)
    monkeypatch.setattr(imagenet, "SETS", {**imagenet.SETS, "objectnet": whole})
    assert check("objectnet", root).problems == ()


def test_corrupt_images_are_found_by_reading(root):
    file = sorted((root / "sketch").glob("*/*"))[3]
    file.write_bytes(file.read_bytes()[:200])
    assert not any("cannot be read" in p for p in check("imagenet-sketch", root).problems)
    assert f"cannot be read as an image: {file}" in check("imagenet-sketch", root, read=True).problems


def test_tables_and_shards_are_looked_at_too(root):
    files = sorted((root / "imagenet/train").rglob("*.JPEG"))
    lines = [f"{file.relative_to(root)},a picture,{i % 3}" for i, file in enumerate(files)]
    (root / "pairs.csv").write_text(
        "\n".join(["filepath,title,label", *lines, "gone.png,a picture,0"]) + "\n"
    )
    found = check_pairs("pairs.csv", root, read=True)
    assert (found.images, found.classes) == (21, 3)
    assert found.problems == (f"cannot be read as an image: {root / 'gone.png'}",)
    assert check_pairs("pairs.csv", root).problems == ()
    (root / "pairs.csv").write_text("filepath,title\nx.png\n")
    (problem,) = check_pairs("pairs.csv", root).problems
    assert "pairs.csv, line 2: 1 columns where the first line has 2" in problem
    (problem,) = check_pairs("shards-{0..1}.tar", root).problems
    assert "no shard" in problem
    assert check_pairs("shards-{0..1}.tar", root).where is None
    assert "cannot tell what pairs 'pairs.txt' are" in check_pairs("pairs.txt", root).problems[0]


def test_the_command_lists_everything_and_fails_if_something_is_wrong(root, capsys):
    (root / "imagenet-a").rename(root / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        main([str(root)])
    assert ended.value.code == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "imagenet-train 20 5 look below" in lines
    assert "imagenet-a missing" in lines
    assert "no imagenet-a in" in lines
    assert "get imagenet-a.tar of https://github.com/hendrycks/natural-adv-examples" in lines
    (root / "pairs.csv").write_text("filepath,title\nx.png,x\n")
    with pytest.raises(SystemExit) as ended:
        main([str(root), "--sets", "--pairs", "pairs.csv"])
    assert ended.value.code == 0
    assert "pairs.csv 1 ok" in " ".join(capsys.readouterr().out.split())


def test_the_command_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "wmateacher.integrations.clip.data.check", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere: give the folder that holds the data sets" in done.stderr
