"""Small images of a few classes in the layouts of ImageNet and its shifts."""

import colorsys
import json

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

WNIDS = ImageNetInfo().label_names()
CHOSEN = {"imagenet": (1, 2, 9, 10, 999), "imagenet-r": (1, 2, 9), "imagenet-a": (6, 11)}
"""Indices of ImageNet's classes."""
LEARNT = (1, 2, 6, 9, 11, 409, 703, 999)
"""Those of the miniature that can be learnt: of all sets, in colours of their own."""


def shaded(i):
    return (i % 256, i // 256, 7)


def coloured(i):
    hue = LEARNT.index(i) / len(LEARNT)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 1, 1))


def picture(file, shade, size=(40, 30), border=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    if border:
        framed = np.zeros((size[1] + 2 * border, size[0] + 2 * border, 3), np.uint8)
        framed[..., 0] = 255
        framed[border:-border, border:-border] = pixels
        pixels = framed
    Image.fromarray(pixels).save(file)


def by_wnid(folder, indices, each, suffix="JPEG", paint=shaded):
    for i in indices:
        for number in range(each):
            picture(folder / WNIDS[i] / f"{WNIDS[i]}_{number}.{suffix}", paint(i))


def objectnet(folder, shades=((0, 10, 0), (0, 11, 0), (0, 12, 0))):
    """Three objects: of two ImageNet classes, of one, and of none."""
    names = {"alarm_clock": "Alarm clock", "bench": "Bench", "air_freshener": "Air freshener"}
    for name, shade in zip(names, shades, strict=True):
        for number in range(2):
            picture(folder / "images" / name / f"{number}.png", shade, border=2)
    mappings = folder / "mappings"
    mappings.mkdir()
    lines = [f"label {999 - i}" for i in range(1000)]  # in another order than the classes
    related = {"Bench": "label 703", "Alarm clock": "label 409; label 530"}
    line_of = {str(i): 999 - i for i in range(1000)}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(related))
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(line_of))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def everything(root, chosen=CHOSEN, paint=shaded, each=4):
    by_wnid(root / "imagenet/train", chosen["imagenet"], each, paint=paint)
    by_wnid(root / "imagenet/val", chosen["imagenet"], 2, paint=paint)
    for i in chosen["imagenet"]:
        picture(root / "imagenetv2-matched-frequency-format-val" / str(i) / "a.jpeg", paint(i))
    by_wnid(root / "imagenet-r", chosen["imagenet-r"], 2, "jpg", paint)
    by_wnid(root / "imagenet-a", chosen["imagenet-a"], 2, "jpg", paint)
    by_wnid(root / "sketch", chosen["imagenet"], 2, paint=paint)
    objectnet(root / "objectnet-1.0")


def learnable(root):
    """The same in colours that tell the classes apart, and captions of the training images as a table."""
    everything(root, {**CHOSEN, "imagenet": LEARNT}, coloured)
    for name, i in (("alarm_clock", 409), ("bench", 703)):
        for number in range(2):
            picture(root / f"objectnet-1.0/images/{name}/{number}.png", coloured(i), border=2)
    files = sorted((root / "imagenet/train").rglob("*.JPEG"))
    rows = [f"{file.relative_to(root)},picture number {i}" for i, file in enumerate(files)]
    (root / "anchors.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")


TINY = (
    "imagenet-vit-b-16", "--model", "tiny-vit-16", "--pretrained", "None", "--anchors", "anchors.csv",
    "--templates", "a photo of a {}.", "a {}", "--finetune.batch-size", "8", "--finetune.precision", "fp32",
    "--finetune.warmup", "1",
)  # fmt: skip
"""Arguments of the example that make its recipe a small one."""
