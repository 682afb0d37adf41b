"""Your own images as one task: what is read, how it is divided, and what is refused."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from wmateacher.integrations.clip.data import task as tasks
from wmateacher.integrations.clip.data.classes import clean, read_classes
from wmateacher.integrations.clip.data.images import read_image
from wmateacher.integrations.clip.data.templates import read_templates

RED, WHITE = (200, 30, 40), (255, 255, 255)


def save(file, colour=RED, size=(8, 6), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


def tree(root, **classes):
    for name, count in classes.items():
        for i in range(count):
            save(root / name / f"{i:02}.png", (i, len(name), 9))
    return root


def names(pairs):
    return [pairs.name(i) for i in range(len(pairs))]


def labels_by_name(pairs):
    return dict(zip(names(pairs), pairs.labels.tolist(), strict=True))


# --- images -----------------------------------------------------------------------------------------


def odd_images():
    """Pairs of an image file's content, and its pixels in RGB as a viewer shows them."""
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    rgb = np.stack([grey, 2 * grey, 255 - grey], -1)
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[:3] = 0
    seen = rgb.copy()
    seen[:3] = 255

    def content(image, kind="PNG", **options):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([10, 20, 30, 200, 30, 40])
    palette.paste(1, (0, 3, 8, 6))
    shown = np.full((6, 8, 3), 255)
    shown[3:] = RED
    wide = (grey.astype(np.uint16) * 257).copy()
    return {
        "grey": (content(Image.fromarray(grey)), np.stack([grey] * 3, -1)),
        "RGBA": (content(Image.fromarray(np.dstack([rgb, alpha]))), seen),
        "grey with alpha": (
            content(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])),
            np.where(alpha[..., None] > 0, np.stack([grey] * 3, -1), 255),
        ),
        "palette with a transparent colour": (content(palette, transparency=0), shown),
        "palette with transparencies": (content(palette, transparency=b"\x00\xff"), shown),
        "16 bits": (content(Image.fromarray(wide)), np.stack([grey] * 3, -1)),
        "CMYK": (content(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "TIFF"), np.full((6, 8, 3), (255, 0, 0))),
        "turned": (content(Image.fromarray(rgb), exif=exif), np.rot90(rgb, -1)),
        "damaged EXIF": (content(Image.fromarray(rgb), exif=b"Exif\x00\x00II*\x00nonsense"), rgb),
        "black and white": (content(Image.fromarray(grey > 20)), np.stack([255 * (grey > 20)] * 3, -1)),
        "animation": (
            content(Image.new("L", (8, 6), 7), "GIF", save_all=True, append_images=[Image.new("L", (8, 6))]),
            np.full((6, 8, 3), 7),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(odd_images()))
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path, kind):
    content, expected = odd_images()[kind]
    (tmp_path / "x.jpg").write_bytes(content)  # the suffix need not be that of the format
    for where in (str(tmp_path / "x.jpg"), io.BytesIO(content)):
        image = read_image(where)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_what_cannot_be_read_is_an_os_error(tmp_path):
    whole, _ = odd_images()["RGBA"]
    floating = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(floating, "TIFF")
    for content in (b"", b"no image", whole[: len(whole) // 2], floating.getvalue()):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(OSError, match=r"x.png cannot be read as an image"):
            read_image(str(tmp_path / "x.png"))


# --- what is listed ---------------------------------------------------------------------------------


def test_class_folders_with_all_that_may_lie_in_them(tmp_path):
    root = tmp_path / "train"
    save(root / "fire_engine/a.JPG")
    save(root / "fire_engine/deep/er/b.WebP")
    save(root / "fire_engine/.hidden.png")
    save(root / "fire_engine/.thumbnails/c.png")
    save(root / ".git/d.png")
    (root / "fire_engine/notes.txt").write_text("no image")
    (root / "fire_engine/deep/again").symlink_to(root / "fire_engine")  # a circle
    save(tmp_path / "elsewhere/e.tiff")
    save(tmp_path / "f.bmp")
    (root / "linked__sea").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/g.bmp").symlink_to(tmp_path / "f.bmp")
    save(root / "stray.png")
    task = tasks.load(str(root), [("test", str(tree(tmp_path / "test", fire_engine=1)))], validation=0)
    assert task.classes == ("fire engine", "linked sea")
    expected = {
        "fire_engine/a.JPG": 0,
        "fire_engine/deep/er/b.WebP": 0,
        "linked__sea/e.tiff": 1,
        "linked__sea/g.bmp": 1,
    }
    assert labels_by_name(task.train) == {str(root / name): label for name, label in expected.items()}
    (note,) = task.notes
    assert note.startswith(f"left out of {root}: 2 that are no images of a class, such as {root}/stray.png")
    for name, label in expected.items():
        image, found = task.train[sorted(expected).index(name)]
        assert (image.getpixel((0, 0)), found) == (pytest.approx(RED, abs=6), label)


def test_tables_and_shards_name_their_classes(tmp_path):
    tree(tmp_path / "images", a=6)
    rows = [
        "filepath,title,label",
        *(f"images/a/0{i}.png,text {i},big_{'cat' if i % 2 else 'dog'}" for i in range(6)),
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    (tmp_path / "labels.TSV").write_text("\n".join("\t".join(r.split(",")[::2]) for r in rows))
    with webdataset.ShardWriter(str(tmp_path / "pairs-%d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(6):
            content = (tmp_path / f"images/a/0{i}.png").read_bytes()
            writer.write(
                {"__key__": f"{i}", "png": content, "cls": ("Big cat" if i % 2 else "big_dog").encode()}
            )
    for train, test, texts in (
        ("pairs.csv", "pairs-{0..1}.tar", [f"text {i}" for i in range(6)]),
        ("pairs-{0..1}.tar", "labels.TSV", [""] * 6),
        ("labels.TSV", "pairs-{0..1}.tar", [""] * 6),
    ):
        task = tasks.load(train, [("test", test)], root=tmp_path, validation=0)
        assert tuple(c.lower() for c in task.classes) == ("big cat", "big dog")
        for pairs in (task.train, task.tests["test"]):
            assert pairs.labels.tolist() == [1, 0] * 3
            assert [pairs[i][0].getpixel((0, 0))[0] for i in range(6)] == list(range(6))
        assert [task.train.read(i)[1] for i in range(6)] == texts
        assert task.train.templated == (not any(texts))


def test_captions_without_labels_need_a_list_of_classes(tmp_path):
    tree(tmp_path / "images", cat=4)
    (tmp_path / "pairs.csv").write_text(
        "filepath,title\n" + "".join(f"images/cat/0{i}.png,t{i}\n" for i in range(3))
    )
    with pytest.raises(ValueError, match=r"pairs.csv has captions and no labels, .*--classes FILE"):
        tasks.load("pairs.csv", root=tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    given = {"root": tmp_path, "classes": "classes.txt"}
    with pytest.raises(ValueError, match="nothing to measure the accuracy on: name a test set"):
        tasks.load("pairs.csv", **given)
    save(tmp_path / "test/dog/x.png")
    task = tasks.load("pairs.csv", [("test", "test")], **given)
    assert task.train.labels is None
    assert task.validation is None
    assert task.notes == ("nothing is held out for validation, because training images have no labels",)
    assert "captions only" in task.table()
    with pytest.raises(ValueError, match="--shots 2 needs labels, pairs.csv has captions only"):
        tasks.load("pairs.csv", [("test", "test")], **given, shots=2)


def test_classes_listed_in_a_file(tmp_path):
    def read(text, name="classes.txt"):
        (tmp_path / name).write_text(text)
        return read_classes(tmp_path / name)

    plain = read("tench\n\nfire_engine \n")
    assert plain.names == ("tench", "fire_engine")
    written = ("0", "001", "Fire engine", "fire__engine", "TENCH", "2", "shark")
    assert [plain.label(text, "") for text in written] == [0, 1, 1, 1, 0, -1, -1]
    labelled = read("n01440764\ttench, Tinca tinca\nn02\tcat\nn03\tcat\n")
    assert labelled.names == ("tench, Tinca tinca", "cat")
    assert [labelled.label(text, "") for text in ("n01440764", "n02", "n03", "cat")] == [0, 1, 1, -1]
    assert read('0,"a, b"\n1,c\n', "classes.csv").names == ("a, b", "c")
    for text, message in (
        ("", "lists no classes"),
        ("cat\nCat\n", "line 2: 'Cat' is there already"),
        ("0\tcat\n1\tCat\n", "'cat' and 'Cat' are one class name to CLIP"),
        ("0\tcat\ndog\n", "has labels on 1 of 2 lines"),
        ("a\tb\tc\n", "line 1: give a class name, or a label and a class name"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(text)
    with pytest.raises(FileNotFoundError, match="no file .*--classes names a text file"):
        read_classes(tmp_path / "none.txt")


def test_a_listed_class_may_have_no_training_images(tmp_path):
    tree(tmp_path / "train", cat=4)
    (tmp_path / "train/dog").mkdir()
    tree(tmp_path / "test", dog=2)
    with pytest.raises(ValueError, match=r"no images in class folders '.*dog' .*--classes FILE"):
        tasks.load("train", root=tmp_path)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    task = tasks.load("train", [("test", "test")], root=tmp_path, classes="classes.txt")
    assert task.classes == ("dog", "cat")
    assert task.tests["test"].labels.tolist() == [0, 0]
    assert "'dog': no training images" in task.notes


def test_templates(tmp_path):
    import open_clip

    assert len(read_templates(["openai"])) == 80
    assert read_templates(["simple"])[0] == open_clip.SIMPLE_IMAGENET_TEMPLATES[0]("{}")
    (tmp_path / "own.txt").write_text("a map of {}\n\n{}, from above\n")
    own = ("a map of {}", "{}, from above")
    assert read_templates([str(tmp_path / "own.txt")]) == own
    assert read_templates(["own.txt", "a {}", "a {}"], tmp_path) == (*own, "a {}")
    with pytest.raises(ValueError, match="'opnai' is neither a caption .* nor openai or simple, nor a file"):
        read_templates(["opnai"])
    with pytest.raises(ValueError, match=r"templates must be captions with one \{\} for the class, got"):
        read_templates(["{} and {}"])
    with pytest.raises(ValueError, match="give at least one caption"):
        read_templates([])


# --- how it is divided ------------------------------------------------------------------------------


def test_validation_is_stratified_and_the_same_every_time(tmp_path):
    root = str(tree(tmp_path, a=20, b=40, c=1))
    task = tasks.load(root, validation=0.2)
    assert task.validation.labels.bincount(minlength=3).tolist() == [4, 8, 0]
    assert task.train.labels.bincount().tolist() == [16, 32, 1]
    assert sorted(names(task.train) + names(task.validation)) == sorted(map(str, tmp_path.rglob("*.png")))
    for pairs in (task.train, task.validation):
        assert all(
            task.classes[label] == Path(name).parent.name for name, label in labels_by_name(pairs).items()
        )
    again = tasks.load(root, validation=0.2)
    assert names(again.validation) == names(task.validation) != sorted(names(task.train))[:12]
    assert again.digest == task.digest != tasks.load(root, validation=0.3).digest
    # However much is held out, every class keeps an image.
    assert tasks.load(root, validation=0.99).train.labels.bincount().tolist() == [1, 1, 1]


def test_a_few_images_of_each_class(tmp_path):
    root = str(tree(tmp_path, a=20, b=30, c=3))
    whole, task = tasks.load(root), tasks.load(root, shots=4)
    assert task.train.labels.bincount().tolist() == [4, 4, 3]
    assert names(task.validation) == names(whole.validation)
    assert set(names(task.train)) < set(names(whole.train))
    assert task.notes == ("fewer than 4 training images: 'c (3)'",)
    assert names(tasks.load(root, shots=4).train) == names(task.train)
    assert names(tasks.load(root, shots=4, seed=1).train) != names(task.train)


# --- what is refused --------------------------------------------------------------------------------


def test_names_that_clip_cannot_tell_apart_or_understand(tmp_path):
    assert clean("__hot__dog_") == "hot dog"
    for first, second in (("hot_dog", "hot dog"), ("Cat", "cat")):
        root = tree(tmp_path / first, **{first: 1, second: 1})
        with pytest.raises(
            ValueError, match=rf"'{first}' and '{second}' are one class name to CLIP|'{second}' and '{first}'"
        ):
            tasks.load(str(root))
    for number in ("7", "n01440764"):
        root = tree(tmp_path / f"numbers{number}", **{number: 2})
        with pytest.raises(ValueError, match=rf"are numbers, such as '{number}', .*--classes FILE"):
            tasks.load(str(root))


def test_test_sets_of_other_classes_or_of_training_images(tmp_path):
    train = str(tree(tmp_path / "train", cat=3, dog=3))
    test = tree(tmp_path / "test", cat=1, dgo=2)
    with pytest.raises(
        ValueError,
        match=r"'dgo' of 2 images, such as .*dgo/00.png, is not a class of the training images; did you mean 'dog'",
    ):
        tasks.load(train, [("test", str(test))])
    (test / "dgo").rename(test / "dog")
    (test / "dog/00.png").unlink()
    (test / "dog/00.png").symlink_to(tmp_path / "train/dog/01.png")
    with pytest.raises(
        ValueError, match=r"test set 'test': 1 of its 3 images are training images, too, such as .*00.png"
    ):
        tasks.load(train, [("test", str(test))])
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="--tests: give each test set a name of its own"):
            tasks.load(train, [(name, str(test))])


def test_what_is_missing_or_damaged(tmp_path):
    tree(tmp_path / "train", cat=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    save(tmp_path / "flat/x.png")
    (tmp_path / "x.parquet").write_text("")
    table = tmp_path / "t.csv"
    for train, content, error, message in (
        ("", "", ValueError, "--train is missing: name a folder of class folders"),
        ("none", "", FileNotFoundError, "--train: there is no .*none"),
        ("empty", "", ValueError, "empty has no class folders with images"),
        ("flat", "", ValueError, "flat has no class folders with images: make one folder for each class"),
        ("x.parquet", "", ValueError, "cannot tell what .*x.parquet is"),
        ("t.csv", "filepath,label\ntrain/cat/00.png,cat\nno.png,cat", FileNotFoundError, r"1 of 2 image files of .*t.csv are missing, such as .*no.png: a table's paths are relative"),
        ("t.csv", "filepath,label\ntrain/cat/00.png, \n", ValueError, r"t.csv, line 2: the label is empty"),
        ("t.csv", "filepath,title,label\ntrain/cat/00.png, ,cat\n", ValueError, r"1 captions are empty, such as that of .*00.png"),
        ("t.csv", "filepath,text\ntrain/cat/00.png,x\n", ValueError, r"t.csv has no column 'title' or 'caption'"),
    ):  # fmt: skip
        table.write_text(content)
        with pytest.raises(error, match=message):
            tasks.load(train, root=tmp_path)
    (tmp_path / "train/cat/99.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 4 image files .* are missing, .*a link may be broken"):
        tasks.load("train", root=tmp_path)


def test_images_that_cannot_be_read_are_for_the_reader_to_count(tmp_path):
    tree(tmp_path, cat=3)
    task = tasks.load(str(tmp_path))
    pairs = task.train
    assert (len(pairs), len(task.validation)) == (2, 1)  # a tenth, but at least one
    (Path(pairs.name(0))).write_bytes(b"")
    assert pairs.labels.dtype == torch.int64
    with pytest.raises(OSError, match=r"cat/0.\.png cannot be read"):
        pairs[0]
