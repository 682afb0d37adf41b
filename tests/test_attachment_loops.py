"""Teachers that are attached to the optimizers of whole loops: one step of the loop counts once."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from wmateacher import WMATeacher


class Student(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))

    @property
    def matrices(self):
        return [p for p in self.parameters() if p.dim() == 2]

    @property
    def vectors(self):
        return [p for p in self.parameters() if p.dim() < 2]


def backward(student, scaler=None, scale=1.0):
    loss = scale * student(torch.randn(8, 4)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def stepping(student, *optimizers):
    """The step of a plain loop."""

    def step():
        backward(student)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step


def muon_and_adamw(student):
    both = [
        torch.optim.Muon(student.matrices, lr=0.1),
        torch.optim.AdamW(student.vectors, lr=0.1, weight_decay=0.1),
    ]
    return both, stepping(student, *both)


def muon_and_adamw_with_a_scaler_that_overflows(student):
    both, _ = muon_and_adamw(student)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step():
        for scale in (float("inf"), 1.0):  # the first is skipped
            backward(student, scaler, scale)
            for optimizer in both:
                scaler.step(optimizer)
            scaler.update()
            for optimizer in both:
                optimizer.zero_grad()

    return both, step


def three_optimizers(student):
    halves = student.vectors[:1], student.vectors[1:]
    three = [torch.optim.SGD(student.matrices, lr=0.1), *(torch.optim.Adam(h, lr=0.1) for h in halves)]
    return three, stepping(student, *three)


def one_optimizer_for_each_parameter_that_steps_in_backward(student):
    each = {p: torch.optim.Adam([p], lr=0.1) for p in student.parameters()}
    order = []

    def step(parameter):
        optimizer = each[parameter]
        order.append(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(step)
    backward(student)
    return order[:], lambda: backward(student)


def lbfgs_with_a_line_search(student):
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    x = torch.randn(8, 4)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = (student(x) - 1).square().mean()
        loss.backward()
        evaluations.append(loss)
        return loss

    def step():
        evaluations.clear()
        optimizer.step(closure)
        assert len(evaluations) > 2

    return optimizer, step


def a_closure_without_a_line_search(student):
    optimizer = torch.optim.RMSprop(student.parameters(), lr=0.01)
    return optimizer, lambda: optimizer.step(lambda: (optimizer.zero_grad(), backward(student))[1])


class ScheduleFree(torch.optim.Optimizer):
    """Keeps two points in its state and lends the model one of them, by its mode, as schedule-free ones do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.training = True

    @torch.no_grad()
    def _lend(self, training):
        if training != self.training:
            self.training = training
            for p in self.param_groups[0]["params"]:
                p.lerp_(self.state[p]["z"], 0.1 if training else -1 / 9)

    def train(self):
        self._lend(True)

    def eval(self):
        self._lend(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.lerp_(z, 0.5)


def an_optimizer_with_modes(student):
    optimizer = ScheduleFree(student.parameters())
    step = stepping(student, optimizer)

    def evaluated():
        step()
        optimizer.eval()
        student(torch.randn(2, 4))
        optimizer.train()

    return optimizer, evaluated


def accumulation_under_a_schedule(student):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    # It replaces the `step` of this optimizer by one that counts for itself.
    schedule = lr_scheduler.LambdaLR(optimizer, lambda i: 0.9**i)

    def step():
        for _ in range(3):
            backward(student)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return optimizer, step


def torchs_own_average_beside_it(student):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    average, schedule = swa_utils.AveragedModel(student), swa_utils.SWALR(optimizer, swa_lr=0.05)
    step = stepping(student, optimizer)
    return optimizer, lambda: (step(), average.update_parameters(student), schedule.step())


class Clearing(torch.optim.AdamW):
    """Clears its gradients itself, before and after."""

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none)

    def step(self, closure=None):
        result = super().step(closure)
        self.zero_grad()
        return result


def gradients_cleared_inside_of_the_step(student):
    optimizer = Clearing(student.parameters(), lr=0.1)
    return optimizer, lambda: (optimizer.zero_grad(), backward(student), optimizer.step())


LOOPS = [
    muon_and_adamw, muon_and_adamw_with_a_scaler_that_overflows, three_optimizers,
    one_optimizer_for_each_parameter_that_steps_in_backward, lbfgs_with_a_line_search,
    a_closure_without_a_line_search, an_optimizer_with_modes, accumulation_under_a_schedule,
    torchs_own_average_beside_it, gradients_cleared_inside_of_the_step,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", ["attach", "loop"])
def test_one_step_of_the_loop_counts_once(loop, first):
    student = Student()
    optimizers, step = loop(student)
    if first == "loop":
        step()
    teacher, by_hand = (WMATeacher(student, "beta(0.5,0.5)", 10, update_every=2) for _ in range(2))
    teacher.attach(optimizers)
    for i in range(5):
        step()
        by_hand.update()
        assert teacher.step == i + 1
    for ours, theirs in zip(teacher.module.parameters(), by_hand.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(teacher.module[0].weight, student[0].weight)


@pytest.mark.slow  # the first compilation of a process
@pytest.mark.parametrize(("kind", "whole"), [(torch.optim.SGD, False), (Clearing, True)])
def test_a_compiled_step_counts_once(kind, whole):
    student = Student()
    optimizer = kind(student.parameters(), lr=0.1)
    teacher, by_hand = (WMATeacher(student, "ema(0.5)") for _ in range(2))
    teacher.attach(optimizer)
    step = (
        torch.compile(lambda: optimizer.step(), backend="eager")
        if whole
        else torch.compile(optimizer.step, backend="eager")
    )
    for i in range(3):
        backward(student)
        step()
        by_hand.update()
        assert teacher.step == i + 1
    assert torch.equal(teacher.module[0].weight, by_hand.module[0].weight)
