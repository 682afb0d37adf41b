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
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer or a list of them, got dict"):
        teacher.attach({"main": optimizer})
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


class Twice(torch.optim.SGD):
    """Prepares its gradients and leaves the rest to `super().step()`."""

    def step(self, closure=None):
        return super().step(closure)


class Thrice(Twice):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [Twice, Thrice])
def test_a_step_that_calls_its_base_class_counts_once(kind):
    torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)  # from here on SGD.step runs hooks by itself
    Twice(nn.Linear(1, 1).parameters(), lr=0.1)
    student, optimizer, teacher = start(kind)
    teacher.attach(optimizer)
    for _ in range(3):
        backward(student)
        optimizer.step()
    assert teacher.step == 3


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written: two halves of a step, and one that calls both."""

    def __init__(self, params, rho=0.05, lr=0.1):
        super().__init__(params, {"rho": rho, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure):
        closure()
        self.first_step()
        closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer several times in each of its own steps."""

    def __init__(self, params, lr=0.1, k=3):
        super().__init__(params, {"lr": lr})
        self.k, self.fast = k, torch.optim.Adam(self.param_groups, lr=lr)

    def step(self, closure):
        for _ in range(self.k):
            closure()
            self.fast.step()


@pytest.mark.parametrize("kind", [SAM, Lookahead])
def test_a_step_that_steps_another_optimizer_counts_once(kind):
    student, optimizer, teacher = start(kind)
    teacher.attach(optimizer)
    for _ in range(3):
        optimizer.step(lambda: backward(student))
    assert teacher.step == 3


def test_halves_of_a_step_by_hand_count_once():
    student, optimizer, teacher = start(SAM)
    teacher.attach(optimizer)
    for _ in range(3):
        backward(student)
        optimizer.first_step()
        backward(student)
        optimizer.second_step()
    assert teacher.step == 3


def several(order):
    student = nn.Linear(4, 3)
    muon = torch.optim.SGD([student.weight], lr=0.1, momentum=0.9)
    adamw = torch.optim.AdamW([student.bias], lr=0.1)
    teacher = WMATeacher(student, "ema(0.5)")
    both = (muon, adamw)
    teacher.attach([both[i] for i in order])
    return student, both, teacher


def test_several_optimizers_count_once_all_have_stepped():
    student, both, teacher = several((0, 1))
    by_hand = WMATeacher(student, "ema(0.5)")
    for i in range(4):
        backward(student)
        both[0].step()
        assert teacher.step == i
        both[1].step()
        by_hand.update()
        assert teacher.step == i + 1
    for ours, theirs in zip(teacher.module.parameters(), by_hand.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_step_that_a_scaler_skips_for_one_of_several_still_counts_as_one(skipped):
    student, both, teacher = several((0, 1))
    by_hand = WMATeacher(student, "ema(0.5)")
    for i in range(5):
        backward(student)
        for j, optimizer in enumerate(both):
            if i != 2 or j != skipped:
                optimizer.step()
        by_hand.update()
    assert teacher.step == by_hand.step == 5
    for ours, theirs in zip(teacher.module.parameters(), by_hand.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_several_fused_optimizers_whose_first_step_overflows():
    student = nn.Linear(4, 3)
    first = torch.optim.SGD([student.weight], lr=0.1, fused=True)
    second = torch.optim.AdamW([student.bias], lr=0.1, fused=True)
    teacher = WMATeacher(student, "ema(0.5)")
    teacher.attach([first, second])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x, counted in [(torch.full((8, 4), float("inf")), 0), (None, 1), (None, 2)]:
        backward(student, x, scaler)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        first.zero_grad()
        second.zero_grad()
        assert teacher.step == counted


def test_optimizers_in_another_order_than_they_step_are_refused():
    student, both, _ = several((1, 0))
    backward(student)
    message = "attached to AdamW, SGD and the first to step is SGD: pass the optimizers in the order"
    with pytest.raises(RuntimeError, match=message):
        both[0].step()


def test_a_failed_step_leaves_the_count_as_it_was():
    student, optimizer, teacher = start()
    teacher.attach(optimizer)

    def broken():
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    backward(student)
    optimizer.step()
    assert teacher.step == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_reading_an_optimizers_state_for_a_checkpoint_counts_nothing(kind):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    student, optimizer, teacher = start(kind)
    teacher.attach(optimizer)
    before = teacher.module.weight.clone()
    state = get_optimizer_state_dict(student, optimizer)
    assert teacher.step == 0
    assert torch.equal(teacher.module.weight, before)
    set_optimizer_state_dict(student, optimizer, state)
    assert teacher.step == 0
    backward(student)
    optimizer.step()
    assert teacher.step == 1


def test_what_cannot_be_attached_together_is_refused():
    _, optimizer, teacher = start()
    with pytest.raises(ValueError, match="one or more different optimizers, got"):
        teacher.attach([optimizer, optimizer])
    with pytest.raises(ValueError, match="one or more different optimizers, got"):
        teacher.attach([])
    with pytest.raises(TypeError, match="a list of them, got str"):
        teacher.attach([optimizer, "adam"])
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="this SGD trains none of the student's parameters"):
        teacher.attach([optimizer, other])
