import json
import logging
from dataclasses import replace

import open_clip
import pytest
import torch
from torch.nn import functional as F

from wmateacher import WMATeacher
from wmateacher.integrations.clip.model import Prompts, build, zero_shot_head
from wmateacher.integrations.clip.recipes import get

SMALL = {"tiny-conv-32": 32, "tiny-vit-16": 16, "tiny-resnet-32": 32, "light-vit-28": 28}


@pytest.mark.parametrize("name", SMALL)
def test_small_towers_embed_pairs(name):
    towers, tokenizer = build(name)
    assert towers.image_size == SMALL[name]
    tokens = tokenizer(["a photo of the digit three", "a photo of the digit four"])
    images = torch.randn(3, 3, SMALL[name], SMALL[name])
    image, text, scale = towers.eval()(images, tokens, torch.tensor([0, 1, 0]))
    assert image.shape == text.shape
    assert torch.equal(text[0], text[2])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert scale.shape == ()
    d = image.shape[1]
    assert towers.image_projection.shape[1] == towers.text_projection.shape[1] == d
    assert towers.image_projection.requires_grad


@pytest.mark.parametrize("name", ["tiny-vit-16", "tiny-resnet-32", "tiny-conv-32"])
def test_the_image_projection_is_the_last_linear_map(name):
    """Scaling the projection scales the unnormalised features: it is the map to the embedding."""
    towers, _ = build(name)
    towers.eval()
    images = torch.randn(2, 3, towers.image_size, towers.image_size)
    with torch.no_grad():
        before = towers.encode_image(images)
        bias = getattr(getattr(towers.clip.visual, "attnpool", None), "c_proj", None)
        if bias is not None:
            bias.bias.zero_()
            before = towers.encode_image(images)
        towers.image_projection.mul_(2)
        torch.testing.assert_close(towers.encode_image(images), 2 * before)


def test_published_towers_are_buildable_by_name():
    """CLIP's own ViT-B/16, without its weights: 149.6M parameters in 302 tensors."""
    towers, _ = build("ViT-B-16")
    assert sum(p.numel() for p in towers.parameters()) == 149_620_737
    assert len(list(towers.parameters())) == 302
    assert towers.image_projection.shape == (768, 512)
    assert towers.text_projection.shape == (512, 512)


def test_pretrained_files_are_loaded(tmp_path):
    towers, _ = build("tiny-vit-16")
    torch.save(towers.clip.state_dict(), tmp_path / "clip.pt")
    again, _ = build("tiny-vit-16", str(tmp_path / "clip.pt"))
    assert torch.equal(again.image_projection, towers.image_projection)


def folder(where, towers, **changes):
    where.mkdir()
    config = {**open_clip.get_model_config("tiny-vit-16"), **changes}
    (where / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(towers.clip.state_dict(), where / "open_clip_pytorch_model.bin")
    return f"local-dir:{where}"


def test_the_weights_of_a_folder_are_loaded_as_model_or_as_weights(tmp_path):
    towers, _ = build("tiny-vit-16")
    own = folder(tmp_path / "own", towers)
    for model, pretrained in ((own, None), ("tiny-vit-16", own), (own, own)):
        again, tokenizer = build(model, pretrained)
        assert torch.equal(again.image_projection, towers.image_projection)
        assert tokenizer(["a"]).shape == (1, 16)
    folders = replace(get("folders"), model=own)
    assert folders.adjust().pretrained is None
    assert replace(folders, pretrained="laion2b").adjust().pretrained == "laion2b"
    assert build(own, device="meta")[0].width == towers.width == 64
    with pytest.raises(
        ValueError, match=r"'local-dir:.*' holds weights of another architecture than 'tiny-vit-16': pass it"
    ):
        build("tiny-vit-16", folder(tmp_path / "other", towers, quick_gelu=True))
    with pytest.raises(ValueError, match=r"unknown weights '.*own' for .*; for a folder pass local-dir:"):
        build("tiny-vit-16", str(tmp_path / "own"))
    with pytest.raises(
        FileNotFoundError, match=r"no model in .*none: local-dir:DIR needs DIR/open_clip_config.json"
    ):
        build("tiny-vit-16", f"local-dir:{tmp_path}/none")
    (tmp_path / "own/open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="cannot read the weights of 'local-dir:"):
        build(own, own)


def test_weights_of_another_activation_are_refused():
    for model, tag, other in (
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "OpenAI", "ViT-B-32-quickgelu"),
        ("ViT-B-16", "metaclip_400m", "ViT-B-16-quickgelu"),
    ):
        with pytest.raises(
            ValueError, match=f"{tag!r} were trained with QuickGELU, {model!r} .*: pass --model {other}"
        ):
            build(model, tag)


def test_zero_shot_head_is_the_normalised_mean_over_templates():
    towers, tokenizer = build("tiny-vit-16")
    classes, templates = ["one", "two", "three"], ["the digit {}", "a {}"]
    head = zero_shot_head(towers, Prompts(classes, templates, tokenizer))
    with torch.no_grad():
        columns = []
        for name in classes:
            texts = F.normalize(towers.encode_text(tokenizer([t.format(name) for t in templates])), dim=-1)
            columns.append(F.normalize(texts.mean(0), dim=0) * towers.clip.logit_scale.exp())
    torch.testing.assert_close(head, torch.stack(columns, 1))


def test_freezing_the_text_tower_shares_it_with_the_teacher():
    towers, _ = build("tiny-vit-16")
    towers.freeze_text()
    trained = {n for n, p in towers.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in towers.named_parameters() if n.startswith("clip.visual.")} | {
        "clip.logit_scale"
    }
    teacher = WMATeacher(towers, "uniform")
    assert teacher.module.clip.token_embedding.weight is towers.clip.token_embedding.weight


def test_no_warning_about_random_weights_and_logging_is_as_before(caplog):
    logging.disable(logging.NOTSET)
    build("tiny-vit-16")
    assert not caplog.records
    assert logging.root.manager.disable == logging.NOTSET


def test_bad_models_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'tiny-vit-61'; did you mean 'tiny-vit-16'"):
        build("tiny-vit-61")
    with pytest.raises(
        ValueError,
        match="unknown weights 'opnai' for 'ViT-B-32': neither a file nor a tag; did you mean 'openai'",
    ):
        build("ViT-B-32", "opnai")
    with pytest.raises(ValueError, match="neither a file nor a tag; open_clip has no weights for it$"):
        build("tiny-vit-16", "openai")
    with pytest.raises(ValueError, match=r"has a logit bias \(SigLIP\)"):
        build("ViT-B-16-SigLIP")


def test_towers_without_a_projection_say_so():
    towers, _ = build("tiny-vit-16")
    towers.clip.visual.proj = None
    with pytest.raises(ValueError, match="has no linear projection to regularise: set cross_frobenius"):
        _ = towers.image_projection


def test_the_tiny_configurations_do_not_shadow_open_clips():
    assert set(SMALL) <= set(open_clip.list_models())
    assert "ViT-B-16" in open_clip.list_models()


def test_a_file_that_holds_no_weights_is_named(tmp_path):
    for name, content in (("pairs.csv", b"filepath,title\n"), ("empty.pt", b""), ("junk.pt", b"junk")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read weights .*{name}.* for 'tiny-vit-16'"):
            build("tiny-vit-16", str(tmp_path / name))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="cannot read weights .*other.pt"):
        build("tiny-vit-16", str(tmp_path / "other.pt"))
