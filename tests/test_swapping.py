import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from wmateacher import WMATeacher
from wmateacher.pairing import tensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def trained(student_dtype=torch.float32, **options):
    """A student that has left its teacher, buffers included."""
    student = Net().to(student_dtype)
    teacher = WMATeacher(student, "ema(0.9)", **options)
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        student(torch.randn(16, 4).to(student_dtype))
        teacher.update()
    return student, teacher


def bits(model):
    return {n: t.detach().clone().view(torch.uint8) for n, t in tensors(model).items() if t.dim()}


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"dtype": "split"}),
        (torch.float32, {"dtype": torch.float64}),
        (torch.float32, {"buffers": "keep"}),
    ],
    ids=str,
)
def test_inside_the_student_is_the_teacher_and_after_it_is_itself_bit_for_bit(dtype, options):
    student, teacher = trained(dtype, **options)
    with torch.no_grad():  # values that only their bits tell apart
        student.body.weight[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    before, objects = bits(student), {n: (t, t.data_ptr()) for n, t in tensors(student).items()}
    averaged = bits(teacher.module)
    x = torch.randn(6, 4).to(dtype)
    with teacher.swap() as model:
        assert model is student
        assert same(bits(student), averaged)
        student.eval()
        assert torch.equal(student(x), teacher(x))
        student.train()
    assert same(bits(student), before)
    assert same(bits(teacher.module), averaged)
    for name, tensor in tensors(student).items():
        assert objects[name][0] is tensor
        assert objects[name][1] == tensor.data_ptr()


def test_an_exception_gives_the_student_back():
    student, teacher = trained()
    before = bits(student)
    with pytest.raises(KeyError), teacher.swap():
        raise KeyError
    assert same(bits(student), before)
    teacher.update()
    assert student.state_dict()


def test_it_may_be_entered_again():
    student, teacher = trained()
    before, averaged = bits(student), bits(teacher.module)
    with teacher.swap():
        with teacher.swap():
            assert same(bits(student), averaged)
        assert same(bits(student), averaged)
    assert same(bits(student), before)


def test_what_is_refused_inside():
    student, teacher = trained()
    other = WMATeacher(student, "uniform")
    step = teacher.step
    holder = nn.ModuleDict({"student": student, "teacher": other})
    outside = r"inside swap\(\): .* Do it after the with block; teacher.averaged_state_dict"
    for action, message in [
        (teacher.update, r"^update\(\) " + outside),
        (other.update, r"^update\(\) " + outside),
        (student.state_dict, r"^state_dict\(\) of the student " + outside),
        (torch.compile(student).state_dict, "state_dict"),
        (holder.state_dict, "state_dict"),
        (teacher.state_dict, r"^state_dict\(\) of the teacher " + outside),
        (lambda: teacher.load_state_dict({}), r"^load_state_dict\(\) of the teacher " + outside),
        (lambda: teacher.load_average(None, step), r"^load_average\(\) " + outside),
        (lambda: other.copy_to(student), r"^copy_to\(\) " + outside),
        (lambda: other.swap().__enter__(), r"swap\(\) inside swap\(\): .* leave that with block first"),
        (lambda: teacher.swap(Net()).__enter__(), r"swap\(\) inside swap\(\)"),
    ]:
        with teacher.swap(), pytest.raises(RuntimeError, match=message):
            action()
    assert teacher.step == step
    assert teacher.state_dict()
    assert student.state_dict()
    with other.swap(), teacher.swap(Net()):
        pass


def test_the_averaged_weights_may_be_saved_inside():
    _, teacher = trained()
    with teacher.swap():
        best = teacher.averaged_state_dict()
    teacher.copy_to(fresh := Net())
    assert same({n: t.view(torch.uint8) for n, t in best.items() if t.dim()}, bits(fresh))


@pytest.mark.parametrize("how", ["step", "load"])
def test_training_on_inside_is_an_error_and_the_student_comes_back(how):
    student, teacher = trained()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = bits(student)
    message = "parameters were written inside swap.* train and load weights after the with"

    def train():
        student(torch.randn(8, 4)).sum().backward()
        optimizer.step()

    actions = {"step": train, "load": lambda: student.load_state_dict(Net().state_dict())}
    with pytest.raises(RuntimeError, match=message), teacher.swap():
        actions[how]()
    assert same(bits(student), before)


def test_another_model_may_hold_the_weights():
    _, teacher = trained(torch.bfloat16)
    model = Net()
    before = bits(model)
    full = teacher.averaged_state_dict(torch.float32)
    with teacher.swap(nn.DataParallel(model)) as lent:
        assert lent.module is model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, full[name])  # float32 all the way
            assert not torch.equal(parameter, teacher.module.get_parameter(name).float())
    assert same(bits(model), before)


def test_frozen_parameters_that_are_shared_are_not_copied():
    student = Net()
    student.body.requires_grad_(False)
    teacher = WMATeacher(student, "ema(0.9)")
    version = student.body.weight._version
    with teacher.swap():
        pass
    assert student.body.weight._version == version
    model = Net()
    teacher.copy_to(model)
    assert torch.equal(model.body.weight, student.body.weight)


def test_a_compiled_student_is_not_compiled_again():
    student, teacher = trained()
    student.eval()
    counter = CompileCounter()
    compiled = torch.compile(student, backend=counter)
    x = torch.randn(6, 4)
    with torch.no_grad():
        compiled(x)
        first = counter.frame_count
        assert first
        for _ in range(3):
            with teacher.swap(compiled):
                assert torch.equal(compiled(x), teacher(x))
            compiled(x)
            teacher.update()
    assert counter.frame_count == first


def test_what_is_replaced_inside_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            self.n = self.n + 1
            return super().forward(x)

    student = Counting()
    teacher = WMATeacher(student, "ema(0.9)")
    student(torch.ones(2))
    with teacher.swap():
        student(torch.ones(2))
    assert student.n == 1
    weight = student.weight
    with pytest.raises(RuntimeError, match="written inside swap"), teacher.swap():
        student.load_state_dict({**teacher.averaged_state_dict()}, assign=True)
    assert student.weight is weight


def test_parts_of_the_student_are_guarded_too():
    student = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    teacher, part = WMATeacher(student, "static"), WMATeacher(student[0], "ema(0.5)")
    for action, message in [
        (part.update, r"^update\(\) inside swap"),
        (student[0].state_dict, r"^state_dict\(\) of the student inside swap"),
        (lambda: WMATeacher(student, "uniform"), "^building a teacher inside swap"),
        (lambda: part.swap().__enter__(), r"swap\(\) inside swap"),
    ]:
        with teacher.swap(), pytest.raises(RuntimeError, match=message):
            action()
    part.update()
    assert student[0].state_dict()


def test_the_student_is_no_part_of_its_teacher_inside():
    _, teacher = trained()
    before = dict(teacher.named_modules())
    with teacher.swap():
        assert dict(teacher.named_modules()) == before
    assert dict(teacher.named_modules()) == before
    assert "_swapped" not in repr(teacher)
