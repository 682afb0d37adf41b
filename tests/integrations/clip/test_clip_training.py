import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from wmateacher.integrations.clip.data.digits import DigitPairs
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.model import Prompts, build, towers_of
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.clip.training import build_student, fit
from wmateacher.integrations.vision.digits import NARROW, WIDE, load

SETTINGS = Settings(steps=6, learning_rate=1e-3, batch_size=16, warmup=2, clip_norm=1.0, checkpoint_every=2)


class Stopped(Exception):
    pass


def run(method="tracer", model="tiny-vit-16", settings=SETTINGS, stop_after=None, **options):
    torch.manual_seed(7)
    towers, tokenizer = build(model)
    source = load("digits")
    stream, anchors = (
        DigitPairs(
            source.val, domain, source.classes, source.templates, tokenizer,
            size=towers.image_size, batch_size=settings.batch_size, seed=3,
        )
        for domain in (NARROW, WIDE)
    )  # fmt: skip
    prompts = Prompts(source.classes, source.templates, tokenizer)

    def stop(step):
        if step == stop_after:
            raise Stopped

    method = METHODS[method] if isinstance(method, str) else method
    given = {"prompts": prompts, "anchors": anchors, **options}
    student = build_student(method, towers, given["prompts"])
    return fit(student, method, stream, settings, progress=False, after_step=stop, **given)


def assert_same(a, b):
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def test_warm_up_and_cosine_are_the_published_schedule():
    settings = Settings(steps=25_030, learning_rate=1e-5, batch_size=512)
    assert settings.learning_rate_at(0) == pytest.approx(1e-5 / 500)
    assert settings.learning_rate_at(499) == pytest.approx(1e-5)
    assert settings.learning_rate_at(500) == pytest.approx(1e-5)
    last = 1e-5 * 0.5 * (1 + math.cos(math.pi * (25_029 - 500) / (25_030 - 500)))
    assert settings.learning_rate_at(25_029) == pytest.approx(last)
    assert Settings(steps=5, learning_rate=1, batch_size=1, warmup=0).learning_rate_at(0) == 1


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].trains])
def test_every_method_runs_and_moves_the_student(method):
    before = build("tiny-vit-16")[0].state_dict().keys()
    fitted = run(method)
    assert towers_of(fitted.student).state_dict().keys() == before
    assert len(fitted.history.values("loss")) == 6
    assert all(map(math.isfinite, fitted.history.values("loss")))
    assert len(fitted.history.values("gap")) == (6 if METHODS[method].kernel else 0)
    if fitted.teacher is not None:
        assert fitted.teacher.step == fitted.teacher.total_steps == 6


def test_the_gap_tells_the_teachers_apart():
    static, tracer, ema = (run(m).history.values("gap") for m in ("static-sd", "tracer", "ema"))
    assert static[-1] > tracer[-1] > 0
    assert ema[0] < static[0]  # the fast EMA starts by following the student


def test_the_first_teacher_is_the_pretrained_model():
    """At step 1 the teacher equals the student, so the distillation terms start at their minimum."""
    fitted = run(
        replace(METHODS["tracer"], distillation="crd", cross_frobenius=0.0),
        settings=replace(SETTINGS, steps=1),
    )
    alone = run("flyp", settings=replace(SETTINGS, steps=1))
    assert fitted.history.values("loss")[0] == pytest.approx(alone.history.values("loss")[0], rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "tracer",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("l2-sp", "flyp", "lp-ft", "lipsum-ft", "arf")),
    ],
)
@pytest.mark.parametrize("model", ["tiny-vit-16", pytest.param("tiny-resnet-32", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_bit_identical(tmp_path, method, model):
    whole = run(method, model)
    file = tmp_path / "run.pt"
    for stop_after in (1, 3, 5):  # before the first checkpoint, and between later ones
        with pytest.raises(Stopped):
            run(method, model, stop_after=stop_after, checkpoint=file)
    resumed = run(method, model, checkpoint=file)
    assert_same(whole.student.state_dict(), resumed.student.state_dict())
    if whole.teacher is not None:
        assert_same(whole.teacher.state_dict(), resumed.teacher.state_dict())
    assert whole.history.values("loss") == resumed.history.values("loss")
    assert whole.history.values("gap") == resumed.history.values("gap")
    again = run(method, model, checkpoint=file, stop_after=0)  # finished: nothing left to do
    assert_same(whole.student.state_dict(), again.student.state_dict())


@pytest.mark.slow
def test_learnable_criteria_are_trained_and_resumed(tmp_path):
    method = replace(METHODS["tracer"], distillation="afd(64)")
    whole = run(method)
    with pytest.raises(Stopped):
        run(method, stop_after=5, checkpoint=tmp_path / "run.pt")
    assert run(method, checkpoint=tmp_path / "run.pt").history.values("loss") == whole.history.values("loss")


def test_bf16_autocast_trains_float32_weights():
    fitted = run(settings=replace(SETTINGS, precision="bf16"))
    assert {p.dtype for p in fitted.student.parameters()} == {torch.float32}
    assert fitted.history.values("loss")[0] == pytest.approx(run().history.values("loss")[0], rel=0.02)
    assert fitted.history.values("loss") != run().history.values("loss")


def test_frozen_text_stays():
    start = build("tiny-vit-16")
    fitted = run(settings=replace(SETTINGS, freeze_text=True))
    torch.manual_seed(7)
    start = build("tiny-vit-16")[0]
    assert torch.equal(fitted.student.text_projection, start.text_projection)
    assert not torch.equal(fitted.student.image_projection, start.image_projection)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda content: content[: len(content) // 2],
            r"cannot read checkpoint .*run.pt .*delete it to start again",
        ),
        (lambda content: b"", "cannot read checkpoint"),
        (lambda content: b"hello", "cannot read checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, message):
    file = tmp_path / "run.pt"
    run(checkpoint=file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        run(checkpoint=file)


def test_a_foreign_checkpoint_is_refused_by_what_differs(tmp_path):
    file = tmp_path / "run.pt"
    run("flyp", checkpoint=file)
    with pytest.raises(
        ValueError, match="belongs to another run: name='flyp' there, 'tracer' here, kernel=None there"
    ):
        run("tracer", checkpoint=file)
    with pytest.raises(ValueError, match="learning_rate=0.001 there, 0.002 here"):
        run("flyp", settings=replace(SETTINGS, learning_rate=2e-3), checkpoint=file)
    with pytest.raises(ValueError, match="does not fit this model"):
        run("flyp", model="tiny-resnet-32", checkpoint=file)
    torch.save({"weights": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not a checkpoint of this version's training loop; delete it"):
        run("flyp", checkpoint=file)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    file = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        run("flyp", checkpoint=file, stop_after=3)
    content = file.read_bytes()
    broken = torch.load(file, weights_only=True)
    broken["parts"]["student"]["clip.logit_scale"].fill_(float("nan"))
    torch.save(broken, file)
    content = file.read_bytes()
    with pytest.raises(
        FloatingPointError, match=r"flyp: the loss is nan at step 3 of 6: lower learning_rate \(0.001\)"
    ):
        run("flyp", checkpoint=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"precision": "fp8"}, "precision must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_alike_and_resumes_to_the_same_bits(tmp_path, precision):
    settings = replace(SETTINGS, precision=precision, steps=12)
    whole = run(settings=settings)
    exact = run(settings=replace(settings, precision="fp32"))
    assert whole.history.values("loss")[0] == pytest.approx(exact.history.values("loss")[0], rel=2e-2)
    assert whole.history.values("loss")[-1] < whole.history.values("loss")[0]
    with pytest.raises(Stopped):
        run(settings=settings, checkpoint=tmp_path / "run.pt", stop_after=7)
    resumed = run(settings=settings, checkpoint=tmp_path / "run.pt")
    assert_same(whole.student.state_dict(), resumed.student.state_dict())
    assert_same(whole.teacher.state_dict(), resumed.teacher.state_dict())


@pytest.mark.slow
def test_steps_that_the_scaler_skips_do_not_count_for_the_teacher():
    method = replace(
        METHODS["tracer"], distill_weight=1e5
    )  # its gradients overflow at the scaler's first scales
    fitted = run(method, settings=replace(SETTINGS, precision="fp16", steps=30))
    assert 0 < fitted.teacher.step < 30
    assert all(p.isfinite().all() for p in fitted.student.parameters())
    assert len(fitted.history.values("loss")) == 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_towers_change_no_number(monkeypatch):
    # What is captured and replaced is the same with every backend; this one generates no code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    whole, compiled = (run("car-ft", settings=replace(SETTINGS, compile=on)) for on in (False, True))
    assert compiled.history.values("loss") == pytest.approx(whole.history.values("loss"), rel=1e-4)
    assert compiled.history.values("gap") == pytest.approx(whole.history.values("gap"), rel=1e-4)
    assert compiled.student.state_dict().keys() == whole.student.state_dict().keys()
    assert compiled.student._compiled_call_impl is not None
    assert compiled.teacher.module._compiled_call_impl is not None


@pytest.mark.parametrize("method", ["tracer", "ft"])
def test_checkpointed_activations_change_no_number(method):
    kept, computed = (run(method, settings=replace(SETTINGS, grad_checkpointing=on)) for on in (False, True))
    for name, value in kept.student.state_dict().items():
        torch.testing.assert_close(computed.student.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert any(getattr(m, "grad_checkpointing", False) for m in computed.student.modules())
