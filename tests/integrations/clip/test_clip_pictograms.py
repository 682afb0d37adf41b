"""Pictograms by several hands: reading them, drawing batches, and the recipe on several pre-trainings."""

import io
import json
import sys
import tarfile
from dataclasses import replace

import miniature_pictograms as miniature
import pytest
import torch
from PIL import Image

from wmateacher.integrations.clip import plots, recipes
from wmateacher.integrations.clip.data import emoji, pictograms
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.model import build

STYLES = ("twemoji", "sketch")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return miniature.write(tmp_path_factory.mktemp("emoji"))


@pytest.fixture
def own(tmp_path):
    return miniature.write(tmp_path / "own")


def test_parts_styles_classes_and_texts_are_read(root):
    source = pictograms.load(root, STYLES)
    assert source.classes == ("shape round", "shape square")
    assert {name: len(part) for name, part in source.parts.items()} == {
        "train": 8, "validation": 2, "test": 4,
    }  # fmt: skip
    train = source.parts["train"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.texts[0] == ("red ellipse", "shape round", "red", "round")
    assert list(train.images) == list(STYLES)
    pixels = train.images["twemoji"]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (8, 3, 16, 16))
    assert pixels[0, :, 8, 8].tolist() == [255, 0, 0]
    assert train.images["sketch"][0, :, 8, 8].tolist() == [255, 255, 255]


def damage_table(root, old, new):
    table = root / "pictograms.tsv"
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda r: (r / "pictograms.tsv").unlink(), FileNotFoundError, r"no table .*--data-root.*builds? it"),
        (
            lambda r: (r / "test/sketch/shape-round/brown-ellipse.png").unlink(),
            FileNotFoundError,
            "no picture .*brown-ellipse.png, which pictograms.tsv lists",
        ),
        (
            lambda r: Image.new("RGB", (9, 16)).save(r / "train/sketch/shape-round/blue-ellipse.png"),
            ValueError,
            r"blue-ellipse.png has \(16, 9\) pixels and red-ellipse.png has \(16, 16\)",
        ),
        (
            lambda r: (r / "train/sketch/shape-round/blue-ellipse.png").write_bytes(b"no image"),
            ValueError,
            "blue-ellipse.png cannot be read",
        ),
        (lambda r: damage_table(r, "keywords", "words"), ValueError, "has no column 'keywords'"),
        (
            lambda r: damage_table(r, "test\t", "tets\t"),
            ValueError,
            r"line 12: give part \(train, validation, ",
        ),
        (lambda r: damage_table(r, "validation\t", "test\t"), ValueError, "no row of part 'validation'"),
        (
            lambda r: damage_table(r, "test\tshape-round", "test\tshape-flat"),
            ValueError,
            r"class 'shape-flat' of purple-ellipse \(test\) has no training pictogram",
        ),
        (
            lambda r: (r / "train/sketch").rename(r / "train/drawn"),
            FileNotFoundError,
            "no style 'sketch' in .*, which has drawn, fluent, noto, openmoji, twemoji",
        ),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(own, damage, error, message):
    damage(own)
    with pytest.raises(error, match=message):
        pictograms.load(own, STYLES)


@pytest.fixture(scope="module")
def tokenizer():
    return build("tiny-vit-16", device="meta")[1]


def test_batches_depend_on_seed_and_step_alone(root, tokenizer):
    train = pictograms.load(root, STYLES).parts["train"]

    def pairs(seed):
        return pictograms.PictogramPairs(
            pictograms.prepare(train.images["twemoji"], 16), train.labels, train.texts, ("a {}", "the {}"),
            tokenizer, batch_size=8, seed=seed,
        )  # fmt: skip

    stream, other = pairs(0), pairs(1)
    later = next(stream(3))
    for ours, theirs in zip(later, pairs(0).batch(3), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert not torch.equal(later.images, other.batch(3).images)
    assert not torch.equal(later.images, stream.batch(4).images)
    order = stream.epochs(3)
    assert sorted(order.tolist()) == list(range(8))
    assert torch.equal(later.labels, train.labels[order])
    decode = {int(row[row.argmax()]): None for row in later.tokens}
    assert len(decode) == 1  # every caption ends in the end token
    for image, row in zip(order.tolist(), later.caption.tolist(), strict=True):
        words = set(later.tokens[row].tolist())
        known = {t for text in (*train.texts[image], "a the ,") for t in tokenizer([text])[0].tolist()}
        assert words <= known


def test_changed_pictograms_stay_on_white_paper_and_are_moved_scaled_and_mirrored():
    white = pictograms.prepare(torch.full((4, 3, 16, 16), 255, dtype=torch.uint8), 16)
    random = torch.Generator().manual_seed(0)
    torch.testing.assert_close(pictograms._changed(white, random), white)
    dot = torch.full((64, 3, 17, 17), 255, dtype=torch.uint8)
    dot[:, :, 4:7, 4:7] = 0
    moved = white[0, 0, 0, 0] - pictograms._changed(pictograms.prepare(dot, 17), random)[:, 0]
    place = (moved * torch.arange(17.0)).sum((1, 2)) / moved.sum((1, 2))
    assert (place > 8).sum() > 16 < (place < 8).sum()  # mirrored or not
    ink = moved.sum((1, 2))
    assert ink.max() > 1.3 * ink.min()  # larger or smaller
    assert place.unique().numel() > 32


def test_smaller_towers_get_smaller_pictures(root):
    images = pictograms.load(root, STYLES).parts["test"].images["twemoji"]
    small = pictograms.prepare(images, 8)
    assert small.shape == (4, 3, 8, 8)
    assert small.max() == 0 > small.min() >= -1 / 0.3


# --- the recipe -----------------------------------------------------------------------------------


def small(**changes):
    recipe = replace(recipes.EMOJI.with_pretraining(2).with_steps(2), model="tiny-vit-16", **changes)
    return replace(
        recipe,
        pretrain=replace(recipe.pretrain, batch_size=8),
        finetune=replace(recipe.finetune, batch_size=8),
    )


def experiment(root, tmp_path, recipe=None, output="out"):
    return Experiment(
        recipe or small(), tmp_path / output, root=root, cache=tmp_path / "cache", progress=False
    )


def test_runs_from_two_pretrainings_are_recorded_apart_and_resumed(root, tmp_path):
    made = experiment(root, tmp_path)
    assert list(made.data.tests) == ["id", "noto", "openmoji", "sketch", "fluent"]
    starts = [made.pretrain(number) for number in (0, 1)]
    assert [s.earlier for s in starts] == [False, False]
    assert starts[0].describe().startswith("pre-trained for 2 steps, ")
    first, second = (dict(s.towers.named_parameters()) for s in starts)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for number in (0, 1):
        assert made.pretrain(number) is starts[number]
        made.run("tracer")
        made.run("flyp")
    runs = made.results["methods"]["tracer"]["runs"]
    assert [(run["pretraining"], run["seed"]) for run in runs] == [(0, 0), (1, 0)]
    files = sorted(f.name for f in (tmp_path / "out/gaps").iterdir())
    assert files == ["tracer-0.csv", "tracer-p1-0.csv"]
    assert "mean OOD in each pre-training" in plots.compared(made.results)

    again = experiment(root, tmp_path)
    start = again.pretrain(1)
    assert start.earlier
    assert "pre-trained earlier (2 steps, " in start.describe()
    assert f"read from {start.file}" in start.describe()
    assert all(torch.equal(p, second[name]) for name, p in start.towers.named_parameters())
    assert again.run("tracer") == runs[1]
    assert len(json.loads((tmp_path / "out/results.json").read_text())["methods"]["tracer"]["runs"]) == 2


def test_what_changes_pretrained_towers_changes_their_file(root, own, tmp_path, monkeypatch):
    def file(root, recipe=None, number=0):
        made = experiment(root, tmp_path, recipe, output=f"out-{len(found)}")
        return made.cache_file(number)

    found = []
    found.append(file(root))
    assert file(root) == found[0]
    assert file(root, replace(small(), finetune=replace(small().finetune, learning_rate=1e-4))) == found[0]
    found.append(file(root, number=1))
    found.append(file(root, small(shifts=("sketch", "noto"))))
    for name, value in (("seed", 5), ("learning_rate", 1e-4), ("batch_size", 4)):
        found.append(file(root, replace(small(), pretrain=replace(small().pretrain, **{name: value}))))
    Image.new("RGB", (16, 16), "pink").save(own / "train/sketch/shape-round/blue-ellipse.png")
    found.append(file(own))
    damage_table(own, "blue|round", "azure|round")
    found.append(file(own))
    monkeypatch.setattr(torch, "__version__", "0.0")
    found.append(file(root))
    assert len(set(found)) == len(found)


def test_the_fine_tuning_sees_one_style_and_class_names(root, tmp_path):
    data = experiment(root, tmp_path).data
    settings = small().finetune
    assert len(data.pairs(settings).images) == 8
    assert len(data.anchors(settings).images) == 40
    assert set(data.pairs(settings).texts) == {("shape round",), ("shape square",)}
    assert data.prompts.classes == ("shape round", "shape square")


def test_bad_recipes_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"needs the folder of pictograms, got root=None: .*--data-root DIR"):
        Experiment(small(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"shifts must be styles other than 'twemoji', each once"):
        small(shifts=("sketch", "twemoji"))


# --- building the folder from packages --------------------------------------------------------------


def pack(file, contents):
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def picture(colour, kind="PNG"):
    image = Image.new("RGBA", (64, 64))
    image.paste(colour, (16, 16, 48, 48))
    stream = io.BytesIO()
    image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def write_packages(folder):
    """Nine birds, of which one hand has drawn eight, seven bugs, a clock and a flag."""
    entries = [
        {"hexcode": f"1F4{n:02X}-FE0F", "label": f"bird {n}", "tags": ["wing"], "group": 3, "subgroup": 7}
        for n in range(9)
    ]
    entries += [{"hexcode": f"2F4{n:02X}", "label": f"bug {n}", "group": 3, "subgroup": 8} for n in range(7)]
    entries += [{"hexcode": f"3F4{n:02X}", "label": "clock", "group": 4, "subgroup": 9} for n in range(9)]
    entries += [{"hexcode": f"4F4{n:02X}", "label": "flag", "group": 9, "subgroup": 10} for n in range(9)]
    entries += [{"hexcode": "1F3FB", "label": "no group"}]
    groups = {
        "groups": {"3": "animals-nature", "4": "travel-places", "9": "flags"},
        "subgroups": {"7": "animal-bird", "8": "animal-bug", "9": "time", "10": "country-flag"},
    }
    codes = [entry["hexcode"] for entry in entries]
    plain = [code.lower().removesuffix("-fe0f") for code in codes]
    pack(
        folder / "emojibase-data-17.0.0.tgz",
        {"en/data.json": json.dumps(entries).encode(), "meta/groups.json": json.dumps(groups).encode()},
    )
    for name, colour in (("twitter", "red"), ("google", "green")):
        pack(
            folder / f"emoji-datasource-{name}-16.0.0.tgz",
            {f"img/{name}/64/{c.lower()}.png": picture(colour) for c in codes},
        )
    drawn = {f"{kind}/svg/{c}.svg": picture("blue") for kind in ("color", "black") for c in codes}
    pack(folder / "openmoji-17.0.0.tgz", drawn)
    fluent = {f"assets/{c}.webp": picture("black", "WEBP") for c in plain if c != "1f408"}
    pack(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", fluent)


def test_the_folder_is_built_from_packages(tmp_path, monkeypatch):
    packages, output = tmp_path / "packages", tmp_path / "emoji"
    packages.mkdir()
    write_packages(packages)
    for name in ("openmoji", "sketch"):  # CairoSVG is an optional package
        monkeypatch.setitem(emoji.STYLES, name, replace(emoji.STYLES[name], read=emoji._raster))
    monkeypatch.setattr(emoji, "held_out", lambda: {"1f400": "test", "1f401": "validation"})
    found = emoji.build(packages, output)
    assert [p.name for p in found] == [f"bird {n}" for n in range(8)]
    source = pictograms.load(output, list(emoji.STYLES))
    assert source.classes == ("animal bird",)
    assert {name: len(part) for name, part in source.parts.items()} == {
        "train": 6, "validation": 1, "test": 1,
    }  # fmt: skip
    test = source.parts["test"]
    assert test.texts == (("bird 0", "animal bird", "wing"),)
    for style, colour in {"twemoji": [255, 0, 0], "noto": [0, 128, 0], "fluent": [0, 0, 0]}.items():
        image = test.images[style][0]
        assert tuple(image.shape) == (3, 48, 48)
        assert image[:, 24, 24].tolist() == colour
        assert image[:, 2, 2].tolist() == [255, 255, 255]
    with pytest.raises(FileExistsError, match="is not empty: give a new one"):
        emoji.build(packages, output)
    (packages / "openmoji-17.0.0.tgz").unlink()
    with pytest.raises(FileNotFoundError, match="0 files openmoji-VERSION.tgz in .*: fetch one version"):
        emoji.build(packages, tmp_path / "other")


def test_the_recorded_split_is_part_of_the_package():
    parts = emoji.held_out()
    assert {name: list(parts.values()).count(name) for name in ("validation", "test")} == {
        "validation": 119, "test": 294,
    }  # fmt: skip
    assert parts["1f425"] == "test"


def test_drawings_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(ImportError, match="pip install cairosvg"):
        emoji._drawing(b"<svg/>")
