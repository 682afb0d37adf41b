import open_clip
import pytest
import torch
from miniature import CHOSEN, WNIDS, everything, picture
from torchvision.transforms.functional import center_crop, to_tensor

from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.evaluation import score_set


@pytest.fixture
def root(tmp_path):
    everything(tmp_path)
    return tmp_path


def shade(image):
    """The class that the miniature drew: PNG exactly, JPEG within a little."""
    red, green, _ = image.getpixel((20, 15))
    return red, green


def test_classes_and_templates_are_openais():
    assert len(imagenet.class_names()) == imagenet.CLASSES == 1000
    assert len(set(imagenet.openai_templates())) == 80
    assert all(t.count("{}") == 1 for t in imagenet.openai_templates())
    assert (imagenet.class_names()[0], imagenet.class_names()[999]) == ("tench", "toilet paper")
    filled = [t("tench") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [t.format("tench") for t in imagenet.openai_templates()] == filled


@pytest.mark.parametrize("name", ["imagenet-train", "imagenet", "imagenet-v2", "imagenet-sketch"])
def test_sets_of_all_classes_have_imagenets_labels(root, name):
    found = imagenet.load(name, root)
    assert found.classes == 1000
    assert sorted(found.images.labels.unique().tolist()) == list(CHOSEN["imagenet"])
    for image, label in found.images:
        assert shade(image)[0] == pytest.approx(label % 256, abs=4)
    logits = torch.randn(3, 1000)
    assert torch.equal(found.logits_of(logits), logits)


def test_numbered_folders_are_read_as_numbers(root):
    """Sorted as text, 10 would come before 2 and 9."""
    images = imagenet.load("imagenet-v2", root).images
    named = {file.split("/")[-2]: int(label) for file, label in zip(images.files, images.labels, strict=True)}
    assert named == {"1": 1, "2": 2, "9": 9, "10": 10, "999": 999}


@pytest.mark.parametrize(("name", "first"), [("imagenet-r", 1), ("imagenet-a", 6)])
def test_subsets_are_scored_among_their_200_classes(root, name, first):
    found = imagenet.load(name, root)
    picked = found.logits_of(torch.arange(1000.0)[None])[0].long().tolist()
    assert found.classes == len(picked) == len(set(picked)) == 200
    assert picked == sorted(picked)
    assert picked[0] == first
    for image, label in found.images:
        assert shade(image)[0] == pytest.approx(picked[label] % 256, abs=4)
    assert {picked[label] for label in found.images.labels.tolist()} == set(CHOSEN[name])


def test_objectnet_keeps_its_border_unless_it_is_to_be_cut_off(root):
    """The published figures are of whole images; ObjectNet's authors ask to cut off 2 pixels."""
    for image, _ in imagenet.load("objectnet", root).images:
        assert image.size == (44, 34)
        assert image.getpixel((1, 1)) == image.getpixel((43, 33)) == (255, 0, 0)


def test_objectnet_takes_the_largest_mapped_logit_and_loses_its_border(root):
    found = imagenet.load("objectnet", root, crop_border=True)
    assert found.classes == 2  # of the three objects one has no ImageNet class
    assert len(found.images) == 4
    for image, label in found.images:
        assert image.size == (40, 30)
        assert all(image.getpixel(corner) == (0, 10 + label, 0) for corner in ((0, 0), (39, 29)))
    logits = torch.randn(5, 1000)
    expected = torch.stack([torch.maximum(logits[:, 409], logits[:, 530]), logits[:, 703]], 1)
    assert torch.equal(found.logits_of(logits), expected)


@pytest.mark.parametrize("name", imagenet.SETS)
def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*expected it in .*get "):
        imagenet.load(name, tmp_path)


def test_wrong_folders_and_files_are_named(root):
    with pytest.raises(ValueError, match="unknown data set 'imagenet-v3'; did you mean 'imagenet-v2'"):
        imagenet.load("imagenet-v3", root)
    picture(root / "imagenet-r" / WNIDS[0] / "x.jpg", 0)
    with pytest.raises(ValueError, match=f"{WNIDS[0]} is not a class of imagenet-r"):
        imagenet.load("imagenet-r", root)
    picture(root / "imagenetv2-matched-frequency-format-val" / "1000" / "x.jpg", 0)
    with pytest.raises(ValueError, match="1000 is not a class of imagenet-v2"):
        imagenet.load("imagenet-v2", root)
    mapping = root / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json"
    mapping.write_text('{"Bench": "label 1000"}')
    with pytest.raises(ValueError, match="the mappings in .* do not match each other"):
        imagenet.load("objectnet", root)
    mapping.write_text('{"Bench": ')
    with pytest.raises(ValueError, match="is not the JSON of objectnet-1.0.zip"):
        imagenet.load("objectnet", root)
    mapping.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no .*objectnet_to_imagenet_1k.json: unpack all of objectnet-1.0.zip"
    ):
        imagenet.load("objectnet", root)


def test_sets_without_images_are_refused(tmp_path):
    (tmp_path / "imagenet-a").mkdir()
    with pytest.raises(ValueError, match="has no folders of images: imagenet-a has one for each class"):
        imagenet.load("imagenet-a", tmp_path)
    (tmp_path / "imagenet-a" / WNIDS[6]).mkdir()
    with pytest.raises(ValueError, match="has no images of imagenet-a's classes"):
        imagenet.load("imagenet-a", tmp_path)


@pytest.mark.parametrize(
    ("model", "millions"),
    [("ViT-B-16-quickgelu", 149.62), ("ViT-L-14-quickgelu", 427.62), ("RN50-quickgelu", 102.01)],
)
def test_the_published_towers_have_their_published_sizes(model, millions):
    with torch.device("meta"):
        towers = open_clip.create_model(model, device="meta")
    assert sum(p.numel() for p in towers.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


class Shades(torch.nn.Module):
    """Reads the class that the miniature drew off an image's red."""

    def encode_image(self, images, normalize=False):
        red = (255 * images[:, 0, 8, 8]).round().long()
        return torch.nn.functional.one_hot(red, 1000).float()


def transform(image):
    return to_tensor(center_crop(image, [16, 16]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-v2"])
def test_sets_are_scored_among_their_classes(root, name, workers):
    found = imagenet.load(name, root)
    own = found.logits_of(torch.arange(1000)[None])[0]  # of each label of the set, ImageNet's
    right = [shade(image)[0] == own[label] for image, label in found.images]  # JPEG moves some shades
    assert sum(right) > 0
    scores = score_set(Shades(), 50 * torch.eye(1000), found, transform, batch_size=4, workers=workers)
    assert scores.accuracy == pytest.approx(100 * sum(right) / len(right))


def test_an_image_that_is_all_border_cannot_be_read(root):
    found = imagenet.load("objectnet", root, crop_border=True).images
    picture(root / "objectnet-1.0/images/bench/0.png", 0, size=(4, 9))
    with pytest.raises(OSError, match="4 x 9 pixels, nothing but its border"):
        found[found.files.index(str(root / "objectnet-1.0/images/bench/0.png"))]


def test_a_batch_none_of_which_can_be_read_is_left_out(root):
    found = imagenet.load("imagenet-v2", root)
    for file in found.images.files[:2]:
        with open(file, "wb") as stream:
            stream.write(b"no image")
    with pytest.warns(UserWarning, match="2 of 5 images"):
        scores = score_set(Shades(), torch.eye(1000), found, transform, batch_size=1)
    assert sum(share for *_, share in scores.reliability) == pytest.approx(1)


def test_images_that_cannot_be_read_are_left_out_and_counted(root):
    found = imagenet.load("imagenet-v2", root)
    for file in found.images.files[:2]:
        with open(file, "wb") as stream:
            stream.write(b"no image")
    with pytest.warns(UserWarning, match="2 of 5 images cannot be read and are left out, such as .*a.jpeg"):
        scores = score_set(Shades(), torch.eye(1000), found, transform, batch_size=2)
    assert 0 <= scores.accuracy <= 100
