"""Small images of a few classes in the layouts of ImageNet and its shifts."""

import json

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

WNIDS = ImageNetInfo().label_names()
CHOSEN = {"imagenet": (1, 2, 9, 10, 999), "imagenet-r": (1, 2, 9), "imagenet-a": (6, 11)}
"""Indices of ImageNet's classes."""


def picture(file, shade, size=(40, 30), border=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    if border:
        framed = np.zeros((size[1] + 2 * border, size[0] + 2 * border, 3), np.uint8)
        framed[..., 0] = 255
        framed[border:-border, border:-border] = pixels
        pixels = framed
    Image.fromarray(pixels).save(file)


def by_wnid(folder, indices, each, suffix="JPEG"):
    for i in indices:
        for number in range(each):
            picture(folder / WNIDS[i] / f"{WNIDS[i]}_{number}.{suffix}", (i % 256, i // 256, 7))


def objectnet(folder):
    """Three objects: of one ImageNet class, of two, and of none."""
    names = {"alarm_clock": "Alarm clock", "bench": "Bench", "air_freshener": "Air freshener"}
    for i, name in enumerate(names):
        for number in range(2):
            picture(folder / "images" / name / f"{number}.png", (0, 10 + i, 0), border=2)
    mappings = folder / "mappings"
    mappings.mkdir()
    lines = [f"label {999 - i}" for i in range(1000)]  # in another order than the classes
    related = {"Bench": "label 703", "Alarm clock": "label 409; label 530"}
    line_of = {str(i): 999 - i for i in range(1000)}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(related))
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(line_of))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def everything(root):
    by_wnid(root / "imagenet/train", CHOSEN["imagenet"], 4)
    by_wnid(root / "imagenet/val", CHOSEN["imagenet"], 2)
    for i in CHOSEN["imagenet"]:
        picture(root / "imagenetv2-matched-frequency-format-val" / str(i) / "a.jpeg", (i % 256, i // 256, 7))
    by_wnid(root / "imagenet-r", CHOSEN["imagenet-r"], 2, "jpg")
    by_wnid(root / "imagenet-a", CHOSEN["imagenet-a"], 2, "jpg")
    by_wnid(root / "sketch", CHOSEN["imagenet"], 2)
    objectnet(root / "objectnet-1.0")
