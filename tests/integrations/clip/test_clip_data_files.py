"""Pairs from folders, tables and shards: what is read, in which order, and what is refused."""

import csv
import io
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from miniature import LEARNT, coloured, learnable, picture
from PIL import Image
from torchvision.transforms.functional import to_tensor

from wmateacher.integrations.clip.data import files, imagenet
from wmateacher.integrations.clip.data.files import Folder, Shards, Table
from wmateacher.integrations.clip.data.photos import PhotoPairs

COUNT = 10


def view(image):
    return to_tensor(image.resize((4, 4))) + 0 * torch.rand(1)


def noisy(image):
    return view(image) + torch.rand(1)


def tokenizer(texts):
    """Each text as its bytes."""
    return torch.tensor([list(text.encode().ljust(64)) for text in texts])


def text_of(tokens):
    return bytes(tokens.tolist()).decode().strip()


def paint(i):
    return (20 * i, 100, 0)


@pytest.fixture
def root(tmp_path):
    for i in range(COUNT):
        picture(tmp_path / f"images/{i}.png", paint(i))
    return tmp_path


def table(root, name="pairs.csv", delimiter=",", header=("filepath", "title", "label")):
    with (root / name).open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(header)
        for i in range(COUNT):
            writer.writerow([f"images/{i}.png", f"number {i}, of ten", i % 3][: len(header)])
    return root / name


def shards(root, labels=True):
    with webdataset.ShardWriter(str(root / "pairs-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(COUNT):
            content = io.BytesIO()
            Image.fromarray(np.full((6, 6, 3), paint(i), np.uint8)).save(content, "PNG")
            sample = {"__key__": f"{i:03}", "png": content.getvalue(), "txt": f"number {i}, of ten"}
            writer.write({**sample, "cls": i % 3} if labels else sample)
    return str(root / "pairs-{000..002}.tar")


def stream(data, batch_size=4, seed=0, transform=view, classes=("a", "b", "c"), **options):
    return PhotoPairs(
        data, transform, tokenizer, batch_size=batch_size, seed=seed, classes=classes,
        templates=("{}", "x {}"), **options,
    )  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.fixture(params=["csv", "tsv", "tabbed", "shards"])
def data(root, request):
    if request.param == "shards":
        return Shards(shards(root))
    name = "pairs.tsv" if request.param == "tsv" else "pairs.csv"
    return Table(table(root, name, "," if request.param == "csv" else "\t"))


def test_images_texts_and_labels_stay_together(data):
    assert len(data) == COUNT
    assert data.labels.tolist() == [i % 3 for i in range(COUNT)]
    for i in range(COUNT):
        image, text = data.read(i)
        assert image.mode == "RGB"
        assert image.getpixel((2, 2)) == paint(i)
        assert text == f"number {i}, of ten"
    for batch in islice(stream(data)(0), 5):
        shade = (255 * batch.images[:, 0, 0, 0] / 20).round().long()
        texts = [text_of(t) for t in batch.tokens[batch.caption]]
        assert texts == [f"number {i}, of ten" for i in shade.tolist()]
        assert torch.equal(batch.labels, shade % 3)
        assert batch.unreadable == 0


def test_marks_of_order_blank_lines_and_lines_in_quotes_are_read(root):
    (root / "pairs.csv").write_bytes(
        b'\xef\xbb\xbffilepath,title\r\nimages/0.png,"two\nlines, {braces}"\r\n\r\nimages/1.png,\xc3\xa9t\xc3\xa9\r\n\r\n'
    )
    data = Table(root / "pairs.csv")
    assert data.captions == ["two\nlines, {braces}", "été"]
    assert data.files == ["images/0.png", "images/1.png"]


def test_without_labels(root):
    for data in (Table(table(root, header=("image", "caption"))), Shards(shards(root, labels=False))):
        assert data.labels is None
        assert next(iter(stream(data)(0))).labels is None


def test_an_epoch_shows_all_and_a_step_is_always_the_same_whatever_reads_it(data):
    made = stream(data, transform=noisy)
    assert made.order.steps_per_epoch == 3
    whole = list(islice(made(0), 6))
    seen = [text_of(t) for batch in whole[:3] for t in batch.tokens[batch.caption]]
    assert len(set(seen)) == COUNT
    assert all(
        same(a, b) for a, b in zip(whole[2:], islice(stream(data, transform=noisy)(2), 4), strict=True)
    )
    assert not same(whole[0], next(iter(stream(data, seed=1, transform=noisy)(0))))


def test_workers_give_the_same_batches(root):
    data = Table(table(root))
    alone, shared = (list(islice(stream(data, transform=noisy, workers=n)(1), 3)) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_class_folders_get_a_template_for_each_image_and_step(tmp_path):
    learnable(tmp_path)
    data = Folder("imagenet-train", tmp_path)
    names = imagenet.class_names()
    drawn = set()
    for batch in islice(stream(data, batch_size=32, classes=names)(0), 6):
        texts = [text_of(t) for t in batch.tokens[batch.caption]]
        for image, text, label in zip(batch.images, texts, batch.labels.tolist(), strict=True):
            assert label in LEARNT
            torch.testing.assert_close(
                255 * image[:, 0, 0], torch.tensor(coloured(label)).float(), atol=6, rtol=0
            )
            assert text in (names[label], f"x {names[label]}")
            drawn.add(text)
    assert len(drawn) == 2 * len(LEARNT)


def test_balanced_batches_have_no_twins(root):
    for batch in islice(stream(Table(table(root)), batch_size=3, sampling="balanced")(0), 10):
        assert sorted(batch.labels.tolist()) == [0, 1, 2]
    unlabelled = Table(table(root, header=("filepath", "title")))
    with pytest.raises(ValueError, match="sampling='balanced' needs labels, the data has captions only"):
        stream(unlabelled, sampling="balanced")


def test_the_next_image_stands_in_for_one_that_cannot_be_read_and_is_counted(root):
    (root / "images/3.png").write_bytes(b"no image")
    (root / "images/4.png").unlink()
    made = stream(Table(table(root)), batch_size=10)
    with pytest.warns(
        UserWarning, match=r"images/[34].png cannot be read: the next image replaces it"
    ) as caught:
        batches = list(islice(made(0), 3))
    assert len(caught) == 1
    for batch in batches:
        assert batch.unreadable == 2
        texts = sorted(text_of(t) for t in batch.tokens[batch.caption])
        assert texts == sorted(f"number {i}, of ten" for i in (0, 1, 2, 5, 5, 5, 6, 7, 8, 9))
        assert sorted(batch.labels.tolist()) == sorted(i % 3 for i in (0, 1, 2, 5, 5, 5, 6, 7, 8, 9))


def test_a_wrong_path_is_not_read_for_ever(root):
    made = Table(table(root))
    for file in (root / "images").iterdir():
        file.unlink()
    with (
        pytest.raises(
            OSError, match=r"images/\d.png and the 19 images after it cannot be read: check the paths"
        ),
        warnings.catch_warnings(),
    ):
        next(iter(stream(made)(0)))


def test_a_truncated_table_is_named_by_its_line(root):
    file = table(root)
    text = file.read_text()
    file.write_text(text[: text.rindex('"number')])
    with pytest.raises(
        ValueError, match=r"pairs.csv, line 11: 2 columns where the first line has 3; it is cut off"
    ):
        Table(file)
    file.write_text(text + 'images/0.png,"a caption that is c')
    with pytest.raises(
        ValueError, match=r"pairs.csv, line 12: unexpected end of data: it is cut off there, or a quo"
    ):
        Table(file)
    file.write_text(text.replace(",2\r\n", ",two\r\n", 1).replace(",2\n", ",two\n", 1))
    with pytest.raises(ValueError, match="pairs.csv, line 4: label must be a whole number, got 'two'"):
        Table(file)
    file.write_bytes(text.encode() + b"\xff\xfe,x,1\n")
    with pytest.raises(ValueError, match=r"pairs.csv is not text in UTF-8 .*get it again"):
        Table(file)
    file.write_text("file,words\na.png,x\n")
    with pytest.raises(
        ValueError, match=r"no column 'filepath' or 'image', got 'file', 'words': name the columns"
    ):
        Table(file)
    file.write_text("filepath,title\n")
    with pytest.raises(ValueError, match="has no rows: give at least one image with a caption"):
        Table(file)
    with pytest.raises(FileNotFoundError, match="no table of captions .*none.csv: give an existing"):
        Table(root / "none.csv")


def test_a_truncated_shard_is_named(root):
    pattern = shards(root)
    last = root / "pairs-002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])
    with pytest.raises(
        ValueError, match=r"pairs-002.tar cannot be read as an uncompressed tar .*get it again"
    ):
        Shards(pattern)
    last.write_bytes(whole[: whole.index(b"number 9")])  # behind a member
    with pytest.raises(ValueError, match=r"pairs-002.tar cannot be read"):
        Shards(pattern)
    last.write_bytes(whole.rstrip(b"\0").ljust(-(-len(whole.rstrip(b"\0")) // 512) * 512, b"\0"))
    assert last.stat().st_size < len(whole)
    with pytest.raises(
        ValueError, match=r"pairs-002.tar cannot be read .*it has no end mark, so it is cut off"
    ):
        Shards(pattern)
    last.write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match=r"pairs-002.tar cannot be read as an uncompressed tar"):
        Shards(pattern)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard .*pairs-002.tar: give existing .tar files"):
        Shards(pattern)
    with webdataset.TarWriter(str(last)) as writer:
        writer.write({"__key__": "a", "txt": "only a text"})
    with pytest.raises(
        ValueError, match=r"no pairs in .*: each needs an image .* and a .txt of the same name"
    ):
        Shards(str(last))
    with webdataset.TarWriter(str(last)) as writer:
        writer.write({"__key__": "b", "txt": "b", "png": np.zeros((2, 2, 3), np.float32)})
    with pytest.raises(ValueError, match="8 of 9 pairs in .* have a .cls: give all one, or none"):
        Shards(pattern)


def test_a_class_that_is_no_number_is_named(root):
    pattern = shards(root)
    with webdataset.TarWriter(str(root / "pairs-002.tar")) as writer:
        sample = {"__key__": "cat", "txt": "x", "cls": b"cat", "png": (root / "images/1.png").read_bytes()}
        writer.write(sample)
    with pytest.raises(
        ValueError, match=r"cat.cls in .*pairs-002.tar: label must be a whole number, got 'cat'"
    ):
        Shards(pattern)


def test_odd_images_are_read_or_stood_in_for(root):
    Image.new("CMYK", (5, 5)).save(root / "images/0.jpg")
    Image.new("RGBA", (5, 5)).save(root / "images/1.png")
    Image.new("I;16", (5, 5)).save(root / "images/2.png")
    bomb = bytearray((root / "images/3.png").read_bytes())
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2  # its width and height
    (root / "images/3.png").write_bytes(bomb)
    (root / "pairs.csv").write_text(
        "filepath,title\nimages/0.jpg,0\n" + "".join(f"images/{i}.png,{i}\n" for i in (1, 2, 3))
    )
    data = Table(root / "pairs.csv")
    assert [data.read(i)[0].mode for i in (0, 1, 2)] == ["RGB"] * 3
    with pytest.raises(OSError, match=r"3.png cannot be read as an image"):
        data.read(3)


def test_sets_of_other_classes_are_not_trained_on(tmp_path):
    learnable(tmp_path)
    for name in ("imagenet-r", "imagenet-a", "objectnet"):
        with pytest.raises(
            ValueError, match=f"'{name}' has .* classes, with indices of its own, and is a test set: train"
        ):
            files.load(name, tmp_path)
    assert isinstance(files.load("imagenet-v2", tmp_path), Folder)


def test_pairs_by_name(root):
    table(root)
    shards(root)
    assert isinstance(files.load("pairs.csv", root), Table)
    table(root, "PAIRS.TSV", "\t")
    assert isinstance(files.load("PAIRS.TSV", root), Table)
    assert isinstance(files.load("pairs-{000..002}.tar", root), Shards)
    assert isinstance(files.load(str(root / "pairs.csv"), None), Table)
    with pytest.raises(ValueError, match="cannot tell what pairs 'pairs.parquet' are: give a .csv"):
        files.load("pairs.parquet", root)
    with pytest.raises(ValueError, match=r"'imagenet-train' needs the folder that holds it: pass root=DIR"):
        files.load("imagenet-train", None)
    with pytest.raises(FileNotFoundError, match="no imagenet-train in"):
        files.load("imagenet-train", root)


def test_labels_number_the_classes(root):
    with pytest.raises(ValueError, match=r"labels must be in 0 ... 1, got 2 of .*2.png, and 2 more outside"):
        files.check_labels(Table(table(root)), 2)
    files.check_labels(Table(table(root)), 3)
    files.check_labels(Table(table(root, header=("filepath", "title"))), 2)
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 10 training pairs, got 11"):
        stream(Table(table(root)), batch_size=11)
