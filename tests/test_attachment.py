import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher


def start(optimizer=torch.optim.SGD, **options):
    student = nn.Linear(4, 3)
    return student, optimizer(student.parameters(), lr=0.1, **options), WMATeacher(student, "ema(0.5)")


def backward(student, x=None, scale=None):
    loss = student(torch.randn(8, 4) if x is None else x).square().mean()
    (loss if scale is None else scale.scale(loss)).backward()


def test_an_attached_teacher_is_the_one_that_the_loop_updates():
    def run(attached):
        torch.manual_seed(0)
        student, optimizer, teacher = start()
        if attached:
            teacher.attach(optimizer)
        for _ in range(5):
            backward(student)
            optimizer.step()
            optimizer.zero_grad()
            if not attached:
                teacher.update()
        return teacher

    by_hand, attached = run(False), run(True)
    assert attached.step == 5
    assert torch.equal(attached.module.weight, by_hand.module.weight)


def test_micro_batches_of_an_accumulated_gradient_do_not_count():
    student, optimizer, teacher = start()
    teacher.attach(optimizer)
    for batch in range(12):
        backward(student)
        if batch % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert teacher.step == 3


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_that_a_grad_scaler_skips_do_not_count(kind, options):
    student, optimizer, teacher = start(kind, **options)
    teacher.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = teacher.module.weight.clone()
    for x, counted in [
        (torch.full((8, 4), float("inf")), 0),
        (None, 1),
        (torch.full((8, 4), 1e38), 1),
        (None, 2),
    ]:
        backward(student, x, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert teacher.step == counted
        if not counted:
            assert torch.equal(teacher.module.weight, before)
    assert teacher.module.weight.isfinite().all()


def test_closures_count_once():
    student, optimizer, teacher = start(torch.optim.LBFGS, max_iter=4)
    teacher.attach(optimizer)
    x, y = torch.randn(8, 4), torch.randn(8, 3)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(student(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert teacher.step == 1


def test_one_of_several_optimizers_counts():
    student, first, teacher = start()
    second = torch.optim.Adam([student.bias])
    teacher.attach(first)
    with pytest.raises(RuntimeError, match="already attached to SGD: if several .* remove\\(\\) the other"):
        teacher.attach(second)
    for _ in range(3):
        backward(student)
        first.step()
        second.step()
    assert teacher.step == 3


def test_removed_it_counts_no_more_and_update_is_the_callers_again():
    student, optimizer, teacher = start()
    attachment = teacher.attach(optimizer)
    backward(student)
    optimizer.step()
    with pytest.raises(
        RuntimeError, match="attached to SGD, .* would count them twice: drop the call, or remove"
    ):
        teacher.update()
    assert teacher.step == 1
    attachment.remove()
    attachment.remove()
    optimizer.step()
    assert teacher.step == 1
    teacher.update()
    assert teacher.step == 2
    with teacher.attach(optimizer):
        optimizer.step()
    optimizer.step()
    assert teacher.step == 3


def test_attaching_to_the_wrong_thing():
    _, optimizer, teacher = start()
    with pytest.raises(
        TypeError,
        match="must be a torch.optim.Optimizer, got list: if several .* attach the teacher to the one",
    ):
        teacher.attach([optimizer])
    other = torch.optim.SGD(nn.Linear(4, 3).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="this SGD trains none of the student's parameters: attach .* to the"
    ):
        teacher.attach(other)
    from timm.optim import Lookahead

    with pytest.raises(TypeError, match="steps of this Lookahead cannot be counted: .* call update"):
        teacher.attach(Lookahead(optimizer))
    teacher.attach(optimizer)


def test_an_error_in_a_hooked_update_reaches_the_loop():
    student, optimizer, teacher = start()
    teacher.attach(optimizer)
    student.more = nn.Linear(1, 1)
    backward(student)
    with pytest.raises(ValueError, match="unexpected 'more.weight'"):
        optimizer.step()
    assert teacher.step == 0
