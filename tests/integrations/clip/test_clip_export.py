"""Model folders: what a run leaves, what loads them, what averages them, and what classifies with them."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import open_clip
import pytest
import torch
from PIL import Image

from wmateacher import cli, files
from wmateacher.integrations.clip import conversion, export, predict
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.model import (
    Classifier,
    Prompts,
    Towers,
    build,
    evaluation_view,
    head_of,
    towers_of,
)
from wmateacher.integrations.clip.recipes import get
from wmateacher.integrations.vision.digits import NARROW

WORDS = Prompts(
    ["cat", "dog", "a red fox"], ["a photo of a {}.", "the {}"], open_clip.get_tokenizer("tiny-vit-16")
)


class Kept(Experiment):
    """Keeps the networks of each run and their logits for some images in evaluation."""

    def _save(self, name, seed, end):
        super()._save(name, seed, end)
        self.kept = {**getattr(self, "kept", {}), name: end.networks}

    def logits(self, name, side, images):
        network = self.kept[name][side]
        towers, head = towers_of(network).eval(), head_of(network, self.prompts)
        with torch.no_grad():
            return towers.encode_image(images, normalize=True) @ head


def tiny(output, cache, **options):
    recipe = get("digits").with_steps(6).with_pretraining(30)
    small = {"batch_size": 32, "learning_rate": 1e-3}
    recipe = replace(
        recipe, model="tiny-vit-16", finetune=replace(recipe.finetune, **small),
        pretrain=replace(recipe.pretrain, batch_size=32),
    )  # fmt: skip
    experiment = Kept(recipe, output, cache=cache, progress=False, **options)
    experiment.data.tests, experiment.data.validation = {"id": experiment.data.tests["id"]}, {}
    experiment.pretrain()
    return experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a text and of a linear head, with the logits of its evaluation."""
    folder = tmp_path_factory.mktemp("run")
    experiment = tiny(folder / "out", folder / "cache", save_models=True)
    for name in ("tracer", "ft"):
        experiment.run(name)
    return experiment


@pytest.fixture(scope="module")
def images(run):
    return next(run.data._batches(run.data.source.test, NARROW))[0][:40]


def test_a_fresh_process_classifies_bit_for_bit_as_the_evaluation(run, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    folders = [("tracer", "student"), ("tracer", "teacher"), ("ft", "student")]
    program = f"""
import json, sys, torch, open_clip
torch.set_num_threads({torch.get_num_threads()})
images = torch.load({str(tmp_path / "images.pt")!r})
found = []
for folder in {[str(run.models(name, 0) / side) for name, side in folders]}:
    from wmateacher.integrations.clip import export
    model = export.load(folder)
    found.append(model.logits(images))
    # The same with open_clip alone, from the class names in the folder.
    clip, _, view = open_clip.create_model_and_transforms("local-dir:" + folder)
    known = json.load(open(folder + "/classes.json"))
    if known["head"] == "text":
        tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
        head = open_clip.build_zero_shot_classifier(clip.eval(), tokenizer, known["classes"], known["templates"])
        with torch.no_grad():
            found.append(clip.encode_image(images, normalize=True) @ (head * clip.logit_scale.exp()))
    else:
        found.append(found[-1])
torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for i, (name, side) in enumerate(folders):
        expected = run.logits(name, side, images)
        assert expected.unique().numel() > 100
        assert torch.equal(found[2 * i], expected), (name, side)
        assert torch.equal(found[2 * i + 1], expected), (name, side)


def test_student_and_teacher_are_the_weights_of_the_run(run):
    names = [("tracer", "student"), ("tracer", "teacher"), ("ft", "student")]
    assert sorted(p.name for p in run.models("tracer", 0).iterdir()) == ["student", "teacher"]
    assert sorted(p.name for p in run.models("ft", 0).iterdir()) == ["student"]
    states = [files.load(run.models(name, 0) / side / export.WEIGHTS) for name, side in names]
    for (name, side), state in zip(names, states, strict=True):
        own = towers_of(run.kept[name][side]).clip.state_dict()
        assert state.keys() == own.keys()
        assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    head = files.load(run.models("ft", 0) / "student" / export.HEAD)["head"]
    assert torch.equal(head, run.kept["ft"]["student"].weight)


def test_images_are_prepared_as_in_the_run(run):
    drawn = next(run.data._batches(run.data.source.test, NARROW))[0][0] * 0.25 + 0.5
    pixels = (drawn * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    model = export.load(run.models("tracer", 0) / "student")
    assert torch.equal(model.transform(image), (pixels / 255 - 0.5) / 0.25)
    answer = model.classify([image])[0]
    probabilities = run.logits("tracer", "student", model.transform(image)[None]).softmax(-1)[0]
    assert answer == (run.prompts.classes[int(probabilities.argmax())], probabilities.max().item())


def test_missing_models_are_written_from_the_checkpoints_and_whole_or_not_at_all(run, tmp_path, monkeypatch):
    out, cache = tmp_path / "out", run.cache
    experiment = tiny(out, cache)
    record = experiment.run("tracer")
    assert not (out / "models").exists()
    said = []
    again = tiny(out, cache, save_models=True, say=said.append)

    def full(state, file, **options):
        if "teacher" in str(file):
            raise OSError("no space left")
        write(state, file, **options)

    write = files.save
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", full)
        with pytest.raises(OSError, match="no space left"):
            again.run("tracer")
    assert list((out / "models").iterdir()) == []
    assert again.run("tracer") == record
    for side in ("student", "teacher"):
        expected = files.load(run.models("tracer", 0) / side / export.WEIGHTS)
        found = files.load(out / "models/tracer-0" / side / export.WEIGHTS)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    # Without its checkpoint, a finished run is not trained again.
    (out / "models/tracer-0").rename(tmp_path / "moved")
    (out / "checkpoints/tracer-0.pt").unlink()
    assert again.run("tracer") == record
    assert not (out / "models/tracer-0").exists()
    assert "tracer-0.pt is missing" in said[-1]


@pytest.mark.parametrize("name", ["tiny-vit-16", "tiny-conv-32", "tiny-resnet-32"])
def test_every_kind_of_towers_comes_back(name, tmp_path):
    """ViT, timm's image towers, and CLIP's ResNet with its running statistics; by QuickGELU and custom text."""
    config = {**open_clip.get_model_config(name), "quick_gelu": True, "custom_text": True}
    (tmp_path / "odd.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "odd.json")
    torch.manual_seed(0)
    towers, _ = build("odd")
    pixels = torch.randn(8, 3, towers.image_size, towers.image_size)
    with torch.no_grad():
        towers.train()(pixels, WORDS.tokenizer(["a", "b"] * 4))  # moves running statistics
    export.save(towers, tmp_path / "model", WORDS)
    again = export.load(tmp_path / "model")
    with torch.no_grad():
        expected = towers.eval().encode_image(pixels, normalize=True) @ head_of(towers, WORDS)
    assert torch.equal(again.logits(pixels), expected)
    assert list(again.prompts.classes) == WORDS.classes
    assert torch.equal(
        open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(WORDS.classes),
        WORDS.tokenizer(WORDS.classes),
    )


@pytest.mark.parametrize(("gelu", "custom"), [(True, False), (False, True)])
def test_transformers_computes_the_same_logits(gelu, custom, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    config = {**open_clip.get_model_config("tiny-vit-16"), "quick_gelu": gelu, "custom_text": custom}
    config["vision_cfg"] = {**config["vision_cfg"], "mlp_ratio": 3.0}
    (tmp_path / "odd.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "odd.json")
    torch.manual_seed(0)
    towers, tokenizer = build("odd")
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # no bias and no gain is trivial
    export.save(towers, tmp_path / "model", WORDS)
    model, loaded = CLIPModel.from_pretrained(tmp_path / "model/transformers", output_loading_info=True)
    assert not any(loaded.values())
    texts = ["a photo of a cat", "The digit THREE, drawn!", "it's 42", "naïve café"]
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        image = towers.eval().encode_image(pixels, normalize=True)
        text = towers.encode_text(tokenizer(texts), normalize=True)
        expected = towers.logit_scale * image @ text.T
        found = model.eval()(pixel_values=pixels, input_ids=tokenizer(texts)).logits_per_image
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if custom:
            return
        processor = CLIPProcessor.from_pretrained(tmp_path / "model/transformers")
        tokens = processor(text=texts, return_tensors="pt", padding="max_length", truncation=True)
        assert torch.equal(model(pixel_values=pixels, **tokens).logits_per_image, found)
    gray = Image.effect_noise((16, 16), 60).convert("RGB")
    prepared = processor(images=[gray], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepared, evaluation_view(towers)(gray))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-32", None),
        ("ViT-B-16-quickgelu", None),
        ("ViT-L-14", None),
        ("ViT-L-14-336-quickgelu", None),
        ("ViT-H-14", None),
        ("ViT-bigG-14", None),
        ("RN50", "its image tower is a ResNet"),
        ("convnext_base", "its image tower 'convnext_base' is from timm"),
        ("roberta-ViT-B-32", "its text tower or tokenizer is another one"),
        ("coca_ViT-B-32", "CLIPModel has no multimodal_cfg"),
        ("ViT-B-16-SigLIP", "is from timm"),
        ("MobileCLIP-B", "is from timm"),
        ("ViT-B-32-plus-256", None),
    ],
)
def test_what_transformers_has_is_known_by_the_configuration(name, reason):
    found = conversion.why_not(open_clip.get_model_config(name), {"mean": (0,) * 3, "std": (1,) * 3})
    assert found is None if reason is None else reason in found


def test_averages_of_model_folders_are_model_folders(run, images, tmp_path, capsys):
    sides = [run.models("tracer", 0) / side for side in ("student", "teacher")]
    assert cli.main(["average", *map(str, sides), "--output", str(tmp_path / "mean")]) == 0
    states = [files.load(side / export.WEIGHTS) for side in sides]
    mean = export.load(tmp_path / "mean")
    towers, tokenizer = build("tiny-vit-16")
    towers.clip.load_state_dict(
        {key: (states[0][key].double() / 2 + states[1][key].double() / 2).float() for key in states[0]}
    )
    prompts = replace(run.prompts, tokenizer=tokenizer)
    expected = towers.eval().encode_image(images, normalize=True) @ head_of(towers, prompts)
    # The zero-shot head is that of the averaged text tower, not an average.
    torch.testing.assert_close(mean.logits(images), expected.detach(), rtol=1e-5, atol=1e-5)

    # A linear head is averaged with its tower.
    linear = run.models("ft", 0) / "student"
    other = tmp_path / "other"
    export.save(Classifier(build("tiny-vit-16")[0], run.prompts), other, run.prompts, run.data.preprocessing)
    given = ["interpolate", str(linear), str(other), "--alpha", "0.25", "--output"]
    assert cli.main([*given, str(tmp_path / "wise")]) == 0
    heads = [files.load(f / export.HEAD)["head"].double() for f in (linear, other)]
    wise = export.load(tmp_path / "wise")
    assert wise.linear
    torch.testing.assert_close(wise.head, (0.75 * heads[0] + 0.25 * heads[1]).float())

    fewer, quick = tmp_path / "fewer", tmp_path / "quick"
    export.save(Classifier(build("tiny-vit-16")[0], WORDS), fewer, WORDS, run.data.preprocessing)
    towers.config = {**towers.config, "quick_gelu": True}
    export.save(towers, quick, run.prompts, run.data.preprocessing)
    for sources, message in (
        ([sides[0], linear], "head ('text', 'linear')"),
        ([fewer, linear], "differ in classes (['cat', 'dog', 'a red fox'], ['zero', 'one',"),
        ([quick, sides[0]], "differ in model_cfg.quick_gelu (True, None)"),
        ([run.output], "pass a folder inside, models/ft-0/student"),
        ([run.models("tracer", 0)], "pass a folder inside, student, "),
    ):
        assert cli.main(["average", *map(str, sources), "--output", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err


def picture(file, hue):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), hue).save(file)


def test_a_folder_of_images_is_classified_to_csv(run, tmp_path, capsys):
    folder, model = tmp_path / "images", run.models("tracer", 0) / "student"
    for i, name in enumerate(("b/1.png", "a.JPG", "b/c/2.webp", "d.png")):
        picture(folder / name, (60 * i, 250 - 60 * i, 40))
    (folder / "notes.txt").write_text("not an image")
    assert predict.main([str(model), str(folder), "--batch-size", "3", "--device", "cpu"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["path"] for row in rows] == ["a.JPG", "b/1.png", "b/c/2.webp", "d.png"]
    one = export.load(model).classify([folder / "b/1.png"])[0]
    assert rows[1]["class"] == one.label
    assert float(rows[1]["confidence"]) == pytest.approx(one.confidence, rel=1e-5)

    (folder / "b/0.png").write_bytes(b"broken")
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    (tmp_path / "templates.txt").write_text("a {} thing\n")
    given = ["--classes", str(tmp_path / "classes.txt"), "--templates", str(tmp_path / "templates.txt")]
    out = tmp_path / "new/out.csv"
    assert predict.main([str(model), str(folder), *given, "--output", str(out), "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0.png cannot be read as an image" in shown.err
    assert "1 of 5 images cannot be read and were skipped" in shown.err
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 4
    assert {row["class"] for row in rows} <= {"red", "green"}
    assert all(float(row["confidence"]) >= 0.5 for row in rows)


def test_files_are_read_as_in_training_on_ones_own_images(run, tmp_path):
    """Turned by a camera, or with transparent parts: what the model sees is what a viewer shows."""
    upright = Image.new("RGB", (40, 30), "red")
    upright.paste("blue", (0, 0, 15, 30))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    clear = upright.convert("RGBA")
    clear.paste((0, 0, 0, 0), (20, 0, 40, 30))
    clear.save(tmp_path / "clear.PNG")
    upright.save(tmp_path / "first.gif")
    on_white = upright.copy()
    on_white.paste("white", (20, 0, 40, 30))
    model = export.load(run.models("tracer", 0) / "student")
    seen = model.classify([tmp_path / "turned.png", tmp_path / "clear.PNG"])
    assert seen == model.classify([upright, on_white])
    assert seen != model.classify([upright.rotate(180), upright])
    assert len(predict.images_in(tmp_path)) == 3


def test_wrong_folders_and_options_are_explained(run, tmp_path):
    images, model = tmp_path / "images", run.models("tracer", 0) / "student"
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\n")
    (tmp_path / "bad.txt").write_text("no place\n")
    (tmp_path / "empty").mkdir()
    picture(images / "a.png", "red")
    bare = tmp_path / "bare"
    export.save(build("tiny-vit-16")[0], bare, WORDS)
    (bare / export.CLASSES).unlink()
    assert export.load(bare, classes=["cat", "dog"]).head.shape == (64, 2)
    headless = tmp_path / "headless"
    export.save(Classifier(build("tiny-vit-16")[0], WORDS), headless, WORDS)
    (headless / export.HEAD).unlink()
    for arguments, message in (
        ([model, tmp_path / "none"], "there is no folder .*none': give a folder of images"),
        ([model, tmp_path / "empty"], "no images in .*empty' or its subfolders: their names must end in"),
        ([tmp_path / "none", images], "there is no folder .*none': give a model folder"),
        ([run.models("tracer", 0), images], "is not a model folder.*; it holds student, teacher: give one"),
        ([images, images], "is not a model folder.*; give one that a run wrote"),
        ([bare, images], r"has no classes.json, .*--classes FILE"),
        ([headless, images], "its head.safetensors is missing"),
        ([run.models("ft", 0) / "student", images, "--classes", classes], "trained for its own 10 classes"),
        (
            [model, images, "--templates", tmp_path / "bad.txt"],
            r"captions with one {} for the class, got \['no place'\]",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predict.main([*map(str, arguments), "--device", "cpu"])
    (bare / export.WEIGHTS).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot read the weights of"):
        export.load(bare, classes=["cat"])
    (bare / export.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="cannot read the weights of"):
        export.load(bare, classes=["cat"])
    with pytest.raises(ValueError, match="has its own weights, got pretrained='openai': pass None"):
        build(f"local-dir:{model}", "openai")
    with pytest.raises(ValueError, match="this recipe pre-trains its own"):
        replace(get("digits"), model=f"local-dir:{model}")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export.save(build("tiny-vit-16")[0], images, WORDS)
    with pytest.raises(ValueError, match="do not know the configuration"):
        export.save(
            Towers(open_clip.create_model("tiny-vit-16", load_weights=False)), tmp_path / "new", WORDS
        )
    assert not (tmp_path / "new").exists()


def test_a_saved_model_is_where_a_run_starts(run):
    """Towers named by a model folder have its weights, not random ones."""
    folder = run.models("tracer", 0) / "student"
    towers, _ = build(f"local-dir:{folder}")
    own = towers_of(run.kept["tracer"]["student"]).clip.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in towers.clip.state_dict().items())


def test_the_last_lines_of_a_run_say_how_to_use_its_model(run, tmp_path, capsys):
    lines = export.how_to_use(run.models("tracer", 0)).splitlines()
    folder = run.models("tracer", 0) / "student"
    picture(tmp_path / "image.png", "red")
    program = "\n".join(line.strip() for line in lines[1:4])
    exec(program.replace("image.png", str(tmp_path / "image.png")))
    assert capsys.readouterr().out == f"{export.load(folder).classify([tmp_path / 'image.png'])}\n"
    assert lines[-1].endswith(f"predict {folder} IMAGES")
    assert any(str(folder / "transformers") in line for line in lines)
