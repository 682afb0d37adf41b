import math
import warnings
from dataclasses import replace

import pytest
import torch

from wmateacher.integrations.dino.crops import DrawnCrops
from wmateacher.integrations.dino.model import Head
from wmateacher.integrations.dino.recipes import PAPER_KERNEL, Crops, Settings
from wmateacher.integrations.dino.training import Pretraining, fit
from wmateacher.integrations.engine.collapse import CollapseWarning
from wmateacher.integrations.vision import backbones, digits
from wmateacher.integrations.vision.digits import WIDE

SETTINGS = Settings(
    steps=6, batch_size=8, warmup=2, hold_last=2, learning_rate=0.1, outputs=8, hidden=12, bottleneck=6,
    temperature_warmup=3, checkpoint_every=2,
)  # fmt: skip
VIT = "vit_tiny_patch16_224(patch_size=4,embed_dim=16,depth=1,num_heads=2,drop_path_rate=0.3)"


class Stopped(Exception):
    pass


def run(settings=SETTINGS, kernel=PAPER_KERNEL, backbone=VIT, stop_after=None, **options):
    torch.manual_seed(7)
    network = backbones.build(backbone, 16)
    stream = DrawnCrops(digits.load("digits").val, WIDE, 16, Crops(16, 8, 2), settings.batch_size, 3)

    def stop(step):
        if step == stop_after:
            raise Stopped

    return fit(network, stream, settings, kernel, progress=False, after_step=stop, **options)


def assert_same(a, b):
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


@pytest.mark.parametrize("kernel", [PAPER_KERNEL, "beta(0.5,0.5)", "uniform"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"centering": "sinkhorn", "koleo": 0.1}, {"precision": "bf16"}, {"ibot": 1.0},
        {"objective": "byol"}, {"objective": "moco-v3", "precision": "bf16"},
    ],
)  # fmt: skip
def test_any_kernel_trains(kernel, options):
    fitted = run(replace(SETTINGS, **options), kernel)
    assert len(fitted.history.values("loss")) == 6
    assert all(map(math.isfinite, fitted.history.values("loss")))
    assert fitted.teacher.step == fitted.teacher.total_steps == 6
    assert fitted.history.values("gap")[-1] > 0


def test_schedules_are_the_papers():
    settings = Settings(steps=1000, batch_size=512, warmup=100, hold_last=10, temperature_warmup=300)
    assert settings.learning_rate_at(99) == pytest.approx(0.001)
    assert settings.learning_rate_at(999) == pytest.approx(1e-6, abs=1e-8)
    assert settings.weight_decay_at(0) == pytest.approx(0.04)
    assert settings.weight_decay_at(1000) == pytest.approx(0.4)
    assert settings.teacher_temperature_at(0) == 0.04
    assert settings.teacher_temperature_at(150) == pytest.approx(0.055)
    assert settings.teacher_temperature_at(300) == 0.07


def task():
    network = backbones.build("test_resnet", 16)
    stream = DrawnCrops(digits.load("digits").val, WIDE, 16, Crops(16, 8, 2), 8, 3)
    return Pretraining(network, stream, SETTINGS, PAPER_KERNEL)


def test_the_last_layer_is_held_for_its_steps():
    pretraining = task()
    direction = pretraining.student.head.last.parametrizations.weight.original1
    start, moved = direction.detach().clone(), []
    for step in range(4):
        pretraining.train_step(step)
        moved.append(not torch.equal(direction, start))
    assert moved == [False, False, True, True]


@pytest.mark.parametrize(("kind", "heads"), [("shared", 1), ("separate", 2)])
def test_patches_have_the_head_of_the_images_or_their_own(kind, heads):
    fitted = run(replace(SETTINGS, ibot=0.5, patch_head=kind, hold_last=SETTINGS.steps))
    student = fitted.student
    assert (student.patch_head is student.head) == (heads == 1)
    assert len({id(m) for m in student.modules() if isinstance(m, Head)}) == heads
    for head in {student.head, student.patch_head}:
        # Held for the whole run, so the average over the run is the layer itself.
        average = fitted.teacher.module.get_submodule("patch_head" if head is not student.head else "head")
        torch.testing.assert_close(average.last.weight, head.last.weight, rtol=0, atol=1e-6)
        assert not torch.equal(average.mlp[0].weight, head.mlp[0].weight)
    assert student.mask_token.abs().max() > 0
    assert fitted.history.values("ibot")[-1] > 0


def test_a_step_hides_the_same_patches_whenever_it_is_taken():
    pretraining = Pretraining(
        backbones.build(VIT, 16), DrawnCrops(digits.load("digits").val, WIDE, 16, Crops(16, 8, 2), 8, 3),
        replace(SETTINGS, ibot=1.0), PAPER_KERNEL,
    )  # fmt: skip
    crop = torch.zeros(8, 3, 16, 16)
    one, same, other = (pretraining._masks(step, crop).hidden for step in (3, 3, 4))
    assert one.shape == (16, 16)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_teacher_uses_its_batches_as_published():
    pretraining = task()
    norms = [m for m in pretraining.teacher.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all(m.training for m in norms)
    before = norms[0].running_mean.clone()
    pretraining.train_step(0)
    assert not torch.equal(norms[0].running_mean, before)


def test_biases_and_norms_are_not_decayed():
    decayed, plain = task().optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in plain["params"])
    assert plain["weight_decay"] == 0


def evaluate(networks):
    return {"validation": float(sum(p.detach().sum() for p in networks["teacher"].parameters()))}


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        (VIT, {"koleo": 0.1}),
        (VIT, {"ibot": 1.0, "patch_head": "separate"}),
        ("test_resnet", {"head_batch_norm": True}),
        ("test_resnet", {"objective": "byol"}),
    ],
)
def test_a_resumed_run_ends_bit_identical(tmp_path, backbone, changes):
    settings = replace(SETTINGS, **changes)
    options = {"evaluate": evaluate, "evaluate_every": 2, "evaluate_last": True, "backbone": backbone}
    whole, file = run(settings, **options), tmp_path / "run.pt"
    for stop_after in (1, 3, 5):
        with pytest.raises(Stopped):
            run(settings, stop_after=stop_after, checkpoint=file, **options)
    resumed = run(settings, checkpoint=file, **options)
    assert_same(whole.student.state_dict(), resumed.student.state_dict())
    assert_same(whole.teacher.state_dict(), resumed.teacher.state_dict())
    assert whole.history.series == resumed.history.series
    assert [s for s, _ in whole.history.series["validation"]] == [2, 4, 6]


def test_a_checkpoint_of_another_kernel_is_refused(tmp_path):
    run(checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="belongs to another run: kernel=.*ema.* there, 'uniform' here"):
        run(kernel="uniform", checkpoint=tmp_path / "run.pt")


@pytest.mark.slow
def test_a_collapse_is_warned_of_once_by_name():
    constant = replace(SETTINGS, steps=110, learning_rate=1e-9, teacher_temperature=50.0,
                       first_teacher_temperature=50.0, temperature_warmup=0)  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = run(constant, "ema(0.9)", "test_efficientnet_gn")
    found = [w for w in caught if w.category is CollapseWarning]
    assert len(found) == 1
    message = str(found[0].message)
    assert message.startswith(
        "ema(0.9): collapsed at step 50 of 110, constant output: all inputs give the same mixture"
    )
    assert "lower teacher_temperature (50.0) or learning_rate" in message
    assert fitted.collapsed.startswith("constant output")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"first_teacher_temperature": 0.0}, "first_teacher_temperature must be above 0, got 0.0"),
        ({"teacher_temperature": -0.04}, "^teacher_temperature must be above 0, got -0.04"),
        ({"koleo": -1.0}, "koleo must be at least 0, got -1.0"),
        ({"objective": "simclr"}, "unknown objective 'simclr'; .*available: byol, dino, moco-v3"),
        ({"patch_head": "both"}, "unknown patch_head 'both'"),
        ({"mask_ratio": (0.5, 0.1)}, r"mask_ratio must be a range within \(0, 1\), got \(0.5, 0.1\)"),
        ({"mask_probability": 0.0}, r"mask_probability must be in \(0, 1\], got 0.0"),
        (
            {"patch_head": "separate"},
            "patch_head='separate' is the head of iBOT's term, got ibot=0: set ibot=1",
        ),
        ({"ibot": 1.0, "objective": "byol"}, "ibot adds to objective 'dino', got 'byol': set ibot=0"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16', got 'fp16'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_an_unknown_centering_lists_those_there_are():
    with pytest.raises(ValueError, match="unknown dino centering 'mena'; did you mean 'mean'"):
        run(replace(SETTINGS, centering="mena"))
