import pytest
import torch

from wmateacher import WMATeacher
from wmateacher.integrations.dino.masks import Masks
from wmateacher.integrations.dino.model import MLP, Head, MultiCrop
from wmateacher.integrations.vision import backbones

VIT = "vit_tiny_patch16_224(patch_size=4,embed_dim=16,depth=1,num_heads=2)"


def test_the_head_has_the_papers_shape():
    head = Head(384)
    shapes = [tuple(p.shape) for n, p in head.named_parameters() if "mlp" in n and "weight" in n]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert head.last.weight.shape == (65536, 256)
    assert head.last.bias is None
    torch.testing.assert_close(head.last.weight.norm(dim=1), torch.ones(65536))


def test_logits_are_cosines_times_the_norms_of_the_rows():
    head = Head(8, 5, hidden=6, bottleneck=4)
    assert head(torch.randn(3, 7, 8)).shape == (3, 7, 5)
    assert head(100 * torch.randn(50, 8)).abs().max() <= 1 + 1e-5
    trained = {n for n, p in head.named_parameters() if not p.requires_grad}
    assert trained == {"last.parametrizations.weight.original0"}
    assert all(p.requires_grad for p in Head(8, 5, hidden=6, bottleneck=4, unit_norm=False).parameters())


def test_a_held_last_layer_does_not_move_and_the_rest_does():
    head = Head(8, 5, hidden=6, bottleneck=4)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], weight_decay=0.1)
    head(torch.randn(4, 8)).square().sum().backward()
    head.hold_last_layer()
    optimizer.step()
    moved = {n for n, p in head.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(name.startswith("mlp") for name in moved)


def test_features_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"built for features of width 8, got 9: give Head\(width=9\)"):
        Head(8, 5)(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="Head: outputs must be at least 1, got 0"):
        Head(8, 0)


@pytest.mark.parametrize("spec", [VIT, "test_efficientnet_gn", "test_convnext", "test_resnet"])
def test_crops_of_one_size_go_through_together_and_come_out_in_order(spec):
    backbone = backbones.build(spec, 64).eval()
    network = MultiCrop(backbone, Head(backbone.num_features, 5, hidden=6, bottleneck=4)).eval()
    crops = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]
    output = network(crops)
    assert output.logits.shape == (3, 2, 5)
    for i, crop in enumerate(crops):
        torch.testing.assert_close(output.features[i], backbone(crop), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.logits[i], network.head(backbone(crop)), rtol=1e-4, atol=1e-5)


def masked_network():
    backbone = backbones.build(VIT, 16).eval()
    head = Head(backbone.num_features, 5, hidden=6, bottleneck=4)
    network = MultiCrop(backbone, head, patch_head=Head(backbone.num_features, 7, hidden=6, bottleneck=4))
    with torch.no_grad():
        network.mask_token.normal_()
    return network.eval()


def test_the_student_does_not_see_masked_patches_and_the_teacher_does():
    network = masked_network()
    first, second, small = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[0, [0, 5]] = hidden[3, 15] = True
    masks = Masks.of(hidden)
    changed = first.clone()
    changed[0, :, :4, :4] += 1  # patch 0
    student, other = (network([x, second, small], masks) for x in (first, changed))
    torch.testing.assert_close(other.logits, student.logits)
    assert student.patches.shape == (3, 7)
    plain = network([first, second, small])
    assert plain.patches is None
    torch.testing.assert_close(student.logits[0, 1], plain.logits[0, 1])  # nothing of it is hidden
    torch.testing.assert_close(student.logits[2], plain.logits[2])  # local crops have no masks
    assert (student.logits[0, 0] - plain.logits[0, 0]).abs().max() > 1e-4
    teacher = network([first, second], masks, hide=False)
    torch.testing.assert_close(teacher.logits, plain.logits[:2])
    tokens = [network.backbone.forward_features(x)[:, 1:] for x in (first, second)]
    expected = network.patch_head(torch.stack([tokens[0][0, 0], tokens[0][0, 5], tokens[1][1, 15]]))
    torch.testing.assert_close(teacher.patches, expected)
    assert not network.backbone.patch_embed._forward_hooks


def test_global_and_local_crops_of_one_size_are_told_apart():
    network, crops = masked_network(), list(torch.randn(3, 2, 3, 16, 16))
    masks = Masks.of(torch.ones(4, 16, dtype=torch.bool))
    torch.testing.assert_close(network(crops, masks).logits[2], network(crops).logits[2])


def test_convolutions_cannot_be_masked():
    backbone = backbones.build("test_resnet", 16)
    head = Head(backbone.num_features, 5, hidden=6, bottleneck=4)
    with pytest.raises(
        ValueError, match="vision transformer of timm, got a backbone of class ResNet: choose"
    ):
        MultiCrop(backbone, head, patch_head=head)


def test_rows_in_several_dimensions_are_one_batch():
    network = MLP([3, 4, 2], batch_norm=True, activation=torch.nn.ReLU)
    rows = torch.randn(5, 6, 3)
    torch.testing.assert_close(network(rows), network(rows.flatten(0, 1)).unflatten(0, (5, 6)))


def test_a_teacher_averages_directions_and_shares_the_held_norms():
    backbone = backbones.build(VIT, 16)
    student = MultiCrop(backbone, Head(backbone.num_features, 5, hidden=6, bottleneck=4))
    teacher = WMATeacher(student, "ema(0.5)")
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(1)
    teacher.update()
    ours, theirs = (m.head.last.parametrizations.weight for m in (student, teacher.module))
    assert theirs.original0 is ours.original0
    torch.testing.assert_close(theirs.original1, ours.original1 - 0.5)


def test_backbones_by_spec():
    assert backbones.build("test_resnet", 32, channels=1, classes=7)(torch.zeros(2, 1, 32, 32)).shape == (
        2,
        7,
    )
    vit = backbones.build(VIT, 16).eval()
    assert vit(torch.zeros(1, 3, 8, 8)).shape == vit(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet19", "unknown backbone 'resnet19'; did you mean 'resnet18'"),
        ("test_resnet(3)", r"give arguments by name, as in test_resnet\(depth=4\)"),
        ("test_resnet(colour=3)", "timm does not build backbone .*for images of 16 pixels"),
        ("vit_tiny_patch16_224(embed_dim=10)", "timm does not build backbone"),
    ],
)
def test_backbones_that_cannot_be_built(spec, message):
    with pytest.raises(ValueError, match=message):
        backbones.build(spec, 16)
