import contextlib
import copy
import pickle
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.two_tensor import TwoTensor

from wmateacher import WMATeacher, averaging
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


@pytest.mark.filterwarnings("ignore:the teacher normalises with the running statistics of the start")
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
        (lambda: list(teacher.averaged_pairs()), r"^averaged_pairs\(\) " + outside),
        (lambda: other.copy_to(student), r"^copy_to\(\) " + outside),
        (lambda: other.swap().__enter__(), r"^swap\(\) " + outside),
        (lambda: teacher.swap(Net()).__enter__(), r"^swap\(\) of another model " + outside),
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
    message = "'body.weight', .* were written inside swap.* train, load weights .* after the with"

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


def test_a_compiled_teacher_is_called_inside():
    student, teacher = linear_pair()
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    x = torch.randn(4, 4)
    before = compiled(x)
    with teacher.swap():
        assert torch.equal(compiled(x), before)
        assert torch.equal(student(x), before)


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


# --- caches, grad modes and other users of the student's tensors --------------------------------------


def linear_pair():
    """A student in training whose float32 weights its teacher does not share."""
    student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    teacher = WMATeacher(student, "ema(0.5)")
    move(student)
    teacher.update()
    return student, teacher


@torch.no_grad()
def move(model):
    for p in model.parameters():
        p.add_(torch.randn_like(p))


def fresh(model, x):
    """What a model computes without anything cached: from a copy, in a region of its own."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return copy.deepcopy(model)(x)


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_computes_with_the_weights_of_now(outer):
    """Autocast keeps the casts of trained weights until its outermost region ends."""
    student, teacher = linear_pair()
    x = torch.randn(5, 4)
    own, averaged = fresh(student, x), fresh(teacher.module, x)
    region = torch.autocast("cpu", dtype=torch.bfloat16)
    assert not torch.equal(own, averaged)
    with contextlib.ExitStack() as stack:
        if outer:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            assert torch.equal(student(x), own)
        with region:
            assert torch.equal(student(x), own)
            with teacher.swap():
                assert torch.equal(student(x), averaged)
                with torch.autocast("cpu", enabled=False):
                    assert torch.equal(student(x), teacher(x))
            assert torch.equal(student(x), own)
            teacher.copy_to(student)
            assert torch.equal(student(x), averaged)


def test_a_forward_pass_without_gradient_in_a_swap_leaves_later_ones_their_gradient():
    """Casts that autocast made under no_grad would cut the weights off from a later backward pass."""
    student, teacher = linear_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with teacher.swap(), torch.no_grad():
            student(torch.randn(5, 4))
        student(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_an_update_in_autocast_moves_what_the_teacher_computes():
    student, teacher = linear_pair()
    x = torch.randn(5, 4)
    expected = 0.5 * (student[0].weight.double() + teacher.module[0].weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, _ = teacher(x), student(x)
        teacher.update()
        after = teacher(x)
    torch.testing.assert_close(teacher.module[0].weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after, fresh(teacher.module, x))
    assert not torch.equal(after, before)


def test_cached_parametrizations_are_computed_again():
    student = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    teacher = WMATeacher(student, "ema(0.5)")
    x = torch.randn(5, 4)
    move(student)
    with nn.utils.parametrize.cached():
        own, first = student(x), teacher(x)
        with teacher.swap():
            assert torch.equal(student(x), first)
        assert torch.equal(student(x), own)
        teacher.update()
        second = teacher(x)
        teacher.copy_to(student)
        assert torch.equal(student(x), second)
    assert torch.equal(teacher(x), second)
    assert not torch.equal(first, second)


class Caching(nn.Module):
    """A layer that makes a new buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls = self.calls + 1
        self.mean.copy_(x.detach().mean(0))
        return self.linear(x) + 0 * self.calls


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "none": contextlib.nullcontext}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_everything_may_be_done_in_any_grad_mode(mode, dtype, buffers):
    """Tensors made in inference mode can be neither trained nor written to outside of it."""
    mode, x, student, other = (
        MODES[mode],
        torch.randn(5, 4, dtype=dtype),
        Caching().to(dtype),
        Caching().double(),
    )
    reference = WMATeacher(student, "ema(0.5)", buffers=buffers)
    with mode():
        teacher = WMATeacher(student, "ema(0.5)", buffers=buffers)
        state = teacher.state_dict()
    move(student)
    for each in (teacher, reference):
        each.update()
    before = bits(student)
    with mode():
        teacher(x)
        reference(x)
        move(student)
        teacher.update()
        averaged = teacher.averaged_state_dict(torch.float64)
        with teacher.swap():
            assert torch.equal(student(x), teacher(x))
        teacher.to(torch.float64).to(dtype)
        teacher.copy_to(other)
        student(x)  # leaves a buffer that was made in this mode
    reference.update()
    with teacher.swap(), mode():
        assert torch.equal(student(x), teacher(x))
    for each in (teacher, reference):
        move(student)
        each.update()
        each.load_average(None, each.step)
    assert not same(bits(student), before)
    assert other.linear.weight.dtype == averaged["linear.weight"].dtype == torch.float64
    assert torch.equal(other.linear.weight, averaged["linear.weight"])
    teacher.load_state_dict(state)
    assert teacher.step == 0
    for model in (student, other):
        model(x.to(model.linear.weight.dtype)).sum().backward()
        assert not any(p.is_inference() or p.grad is None for p in model.parameters())
    made = [*teacher.parameters(), *averaged.values(), *teacher.state_dict().values()]
    assert not any(t.is_inference() for t in made if isinstance(t, torch.Tensor))


def test_an_average_does_not_depend_on_the_grad_mode():
    results = []
    for mode in MODES.values():
        torch.manual_seed(1)
        student = Net().bfloat16()
        with mode():
            teacher = WMATeacher(student, "ema(0.9)", dtype="split")
        for _ in range(3):
            move(student)
            with mode():
                teacher.update()
        results.append(teacher.averaged_state_dict(torch.float32))
    assert all(torch.equal(one[n], results[0][n]) for one in results for n in one)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_swap_may_be_left_in_another_grad_mode_than_it_was_entered_in(mode, inside):
    student, teacher = trained()
    before = bits(student)

    def evaluate():
        with teacher.swap() as model:
            yield model(torch.randn(8, 4))

    with MODES[mode]():
        run = evaluate()
        next(run)
        if inside:
            run.close()
    run.close()
    assert same(bits(student), before)
    student(torch.randn(8, 4)).sum().backward()
    teacher.update()
    assert student.state_dict()


def test_weights_that_were_copied_in_invalidate_an_older_graph():
    """A backward pass through weights that are gone must raise, in whatever mode they were written."""
    student, teacher = linear_pair()
    for mode in MODES.values():
        loss = student(torch.randn(5, 4, requires_grad=True)).sum()
        with mode():
            teacher.copy_to(student)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- frozen weights that the teacher shares -----------------------------------------------------------


class Adapter(nn.Module):
    """A frozen layer with a trained low-rank addition that can be merged into it, as in peft and loralib."""

    def __init__(self, bias=False):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5, bias), nn.Linear(6, 2, False), nn.Linear(2, 5, False)
        self.base.requires_grad_(False)
        self.merged_adapters = []

    @property
    def merged(self):
        return bool(self.merged_adapters)

    def merge(self):
        self.base.weight.data += self.up.weight.data @ self.down.weight.data
        self.merged_adapters.append("default")

    def unmerge(self):
        self.base.weight.data -= self.up.weight.data @ self.down.weight.data
        self.merged_adapters.clear()

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))


def adapted(frozen="share", *, real=False):
    """A student with trained adapters, its teacher and the adapters by name; with peft's if `real`."""
    student = nn.Sequential(OrderedDict(one=Adapter(), act=nn.Tanh(), two=nn.Linear(5, 3)))
    if real:
        peft = pytest.importorskip("peft")
        plain = nn.Sequential(OrderedDict(one=nn.Linear(6, 5), act=nn.Tanh(), two=nn.Linear(5, 3)))
        student = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["one", "two"]))
    teacher = WMATeacher(student, "ema(0.5)", frozen=frozen)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    teacher.update()
    return student, teacher


def toggle(student, name):
    """Merge or unmerge a student's adapters, by its own means."""
    if hasattr(student, "one"):
        getattr(student.one, name)()
    else:
        getattr(student, f"{name}_adapter")()


WRITES = {
    "in place": lambda p: p.mul_(2),
    "one entry": lambda p: p.view(-1)[-1].add_(1e-3),
    "data": lambda p: p.data.mul_(1 + 1e-6),
    "one entry of the data": lambda p: p.data.view(-1)[3].neg_(),
    "other data": lambda p: setattr(p, "data", p.data + 1),
    "the same values elsewhere": lambda p: setattr(p, "data", p.data.clone()),
    "numpy": lambda p: p.detach().numpy().__setitem__((0, 0), 7.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("frozen", ["share", "copy"])
def test_writing_to_frozen_weights_inside_is_an_error_or_is_undone(write, frozen):
    student, teacher = adapted(frozen)
    weight = student.one.base.weight
    before, place = bits(student), weight.data_ptr()
    restored = frozen == "copy" and write in {"data", "one entry of the data", "numpy"}
    advice = "load them again" if frozen == "share" else "was written is lost"
    expected = pytest.raises(RuntimeError, match=f"'one.base.weight'.* {advice}")
    with contextlib.nullcontext() if restored else expected, teacher.swap(), torch.no_grad():
        WRITES[write](weight)
    after = bits(student)
    if frozen == "share":
        before.pop("one.base.weight")
    assert same(before, after)
    assert weight.data_ptr() == place


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.randn(8, 6).t(),
        torch.randn(9)[1:],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, dtype=torch.complex64),
        torch.randint(0, 255, (11,), dtype=torch.uint8),
        torch.tensor(2.0),
        torch.randn(10).half()[1:6],
    ],
    ids=lambda w: f"{w.dtype}-{tuple(w.shape)}",
)
def test_every_kind_of_shared_weight_is_watched(weight):
    student = nn.Linear(2, 2)
    student.frozen = nn.Parameter(weight.clone(memory_format=torch.preserve_format), requires_grad=False)
    if weight.storage_offset():
        student.frozen.data = weight
    student.empty = nn.Parameter(torch.empty(0, 3), requires_grad=False)
    teacher = WMATeacher(student, "ema(0.5)")
    with teacher.swap():
        pass
    changed = weight.clone()
    changed[(-1,) * weight.dim()] += 1
    with pytest.raises(RuntimeError, match="'frozen' changed inside swap"), teacher.swap():
        student.frozen.data.copy_(changed)


def test_the_tensors_inside_a_wrapper_are_watched():
    student = nn.Linear(3, 3)
    student.frozen = nn.Parameter(TwoTensor(torch.randn(3, 3), torch.randn(3, 3)), requires_grad=False)
    teacher = WMATeacher(student, "ema(0.5)")
    with teacher.swap():
        pass
    with pytest.raises(RuntimeError, match="'frozen' changed inside swap"), teacher.swap():
        student.frozen.b.data[1, 1] += 1


def test_a_student_that_is_cast_inside_comes_back_in_its_own_dtype():
    student, teacher = adapted("copy")
    before, objects = bits(student), dict(student.named_parameters())
    with pytest.raises(RuntimeError, match="moving or casting"), teacher.swap():
        student.half()
    assert same(bits(student), before)
    assert all(p is objects[n] and p.dtype == torch.float32 for n, p in student.named_parameters())


def test_embeddings_that_limit_their_norm_may_be_evaluated_inside():
    student = nn.Sequential(nn.EmbeddingBag(9, 4, max_norm=1.0), nn.Linear(4, 2))
    teacher = WMATeacher(student, "ema(0.5)")
    before = bits(student)
    with teacher.swap():
        student(torch.arange(8).view(2, 4))
    assert same(bits(student), before)


@pytest.mark.parametrize("real", [False, True], ids=["duck", "peft"])
def test_merged_adapters_are_noticed_wherever_the_teacher_uses_shared_weights(real):
    student, teacher = adapted(real=real)
    x = torch.randn(4, 6)
    expected, base = teacher(x), bits(student)
    toggle(student, "merge")
    for action in (
        lambda: teacher(x),
        teacher.update,
        teacher.averaged_state_dict,
        lambda: teacher.swap().__enter__(),
        lambda: teacher.copy_to(student),
    ):
        with pytest.raises(
            RuntimeError, match=r"'.*one' is merged into the student's .* unmerge the student"
        ):
            action()
    assert teacher.step == 1
    toggle(student, "unmerge")
    torch.testing.assert_close(teacher(x), expected)
    with teacher.swap():
        torch.testing.assert_close(student.eval()(x), expected)
    teacher.update()
    for name, own in base.items():
        values = tensors(student)[name]
        torch.testing.assert_close(values, own.view(values.dtype))


def test_a_teacher_with_its_own_frozen_weights_runs_beside_a_merged_student():
    student, teacher = adapted("copy")
    x = torch.randn(4, 6)
    expected = teacher(x)
    student.one.merge()
    assert torch.equal(teacher(x), expected)
    for action in (teacher.update, lambda: teacher.copy_to(student), lambda: teacher.swap().__enter__()):
        with pytest.raises(RuntimeError, match="is merged into the student's weights but not"):
            action()


@pytest.mark.parametrize("frozen", ["share", "copy"])
def test_adapters_are_not_merged_inside(frozen):
    student, teacher = adapted(frozen)
    before = bits(student)
    with teacher.swap(), pytest.raises(RuntimeError, match=r"^merge\(\) of an adapter inside swap\(\)"):
        student.one.merge()
    assert same(bits(student), before)
    student.one.merge()
    student.one.unmerge()


@pytest.mark.parametrize("frozen", ["share", "copy"])
def test_a_layer_that_merges_itself_inside_is_noticed(frozen):
    student, teacher = adapted(frozen)
    message = {"share": "'one.base.weight' changed inside", "copy": "'one' were merged or unmerged inside"}
    with pytest.raises(RuntimeError, match=message[frozen]), teacher.swap():
        Adapter.merge(student.one)


def test_a_copy_that_merges_itself_into_shared_weights_is_refused():
    """As loralib's layers do in eval mode."""

    class InEvalMode(Adapter):
        def train(self, mode=True):
            if mode == self.merged:
                self.unmerge() if mode else self.merge()
            return super().train(mode)

    student = nn.Sequential(InEvalMode())
    weight = student[0].base.weight.clone()
    with pytest.raises(RuntimeError, match="'0' is merged into the teacher's weights but not"):
        WMATeacher(student, "ema(0.5)")
    assert not student[0].merged
    torch.testing.assert_close(student[0].base.weight, weight, rtol=0, atol=1e-6)


def test_peft_merges_nothing_inside_a_swap():
    student, teacher = adapted(real=True)
    before = bits(student)
    with teacher.swap(), pytest.raises(RuntimeError, match=r"merge\(\) of an adapter inside swap"):
        student.merge_adapter()
    assert same(bits(student), before)
    student.merge_and_unload()
    with pytest.raises(RuntimeError, match="is merged into the student"):
        teacher(torch.randn(4, 6))


# --- who notices that weights are lent ----------------------------------------------------------------


def test_every_teacher_notices_that_a_part_of_its_student_is_lent():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    whole, part = WMATeacher(student, "ema(0.5)"), WMATeacher(student[0], "ema(0.5)")
    beside = WMATeacher(student[2], "ema(0.5)")
    state, before = whole.state_dict(), bits(student)
    move(student[0])
    for action, name in [
        (whole.update, r"update\(\)"),
        (whole.state_dict, r"state_dict\(\) of the teacher"),
        (lambda: whole.load_state_dict(state), r"load_state_dict\(\) of the teacher"),
        (lambda: whole.load_average(None, 0), r"load_average\(\)"),
        (lambda: whole.swap().__enter__(), r"swap\(\)"),
        (lambda: whole.copy_to(student), r"copy_to\(\)"),
        (lambda: beside.copy_to(student[0]), r"copy_to\(\)"),
        (lambda: WMATeacher(student, "uniform"), "building a teacher"),
        (lambda: WMATeacher(nn.Sequential(nn.Tanh(), student[0]), "uniform"), "building a teacher"),
        (student.state_dict, r"state_dict\(\) of the student"),
        (lambda: nn.ModuleList([student]).state_dict(), r"state_dict\(\) of the student"),
    ]:
        with part.swap(), pytest.raises(RuntimeError, match=rf"^{name} inside swap\(\)"):
            action()
    with part.swap():
        beside.update()
        whole(torch.randn(3, 4))
    assert whole.step == 0
    for model in (student[0], student[2]):
        part.copy_to(model)
    assert same(bits(student[1]), {n.partition(".")[2]: b for n, b in before.items() if n[0] == "1"})


@pytest.mark.parametrize("tie", ["parameter", "memory", "view"])
def test_two_models_with_a_weight_in_common_notice_each_other(tie):
    one, other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    if tie == "parameter":
        other.weight = one.weight
    else:
        other.weight = nn.Parameter(one.weight.data if tie == "memory" else one.weight.detach().t())
    mine, theirs = WMATeacher(one, "ema(0.5)"), WMATeacher(other, "ema(0.5)")
    with mine.swap():
        for action in (theirs.update, lambda: theirs.swap().__enter__(), lambda: mine.copy_to(other)):
            with pytest.raises(RuntimeError, match=r"inside swap\(\)"):
                action()
    theirs.update()
    with theirs.swap(), pytest.raises(RuntimeError, match=r"inside swap\(\)"):
        mine.update()
    mine.update()


def test_students_may_share_frozen_weights_and_be_swapped_at_once():
    body = nn.Linear(4, 4).requires_grad_(False)
    students = [nn.Sequential(body, nn.Linear(4, 2)) for _ in range(2)]
    one, other = (WMATeacher(student, "ema(0.5)") for student in students)
    x = torch.randn(3, 4)
    with one.swap():
        other.update()
        with other.swap():
            assert torch.equal(students[0](x), one(x))
            assert torch.equal(students[1](x), other(x))


def test_weights_that_were_flattened_into_one_vector_do_not_hinder_each_other():
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    vector = nn.utils.parameters_to_vector(student.parameters())
    nn.utils.vector_to_parameters(vector, student.parameters())
    student[0].requires_grad_(False)
    whole, head = WMATeacher(student, "ema(0.5)"), WMATeacher(student[1], "ema(0.5)")
    x = torch.randn(3, 4)
    with whole.swap():
        assert torch.equal(student(x), whole(x))
        with pytest.raises(RuntimeError, match=r"inside swap\(\)"):
            head.update()


def test_a_teacher_does_not_compute_with_frozen_weights_that_are_lent():
    """A layer trained with one teacher, then frozen and shared with the next."""
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first = WMATeacher(student[0], "ema(0.5)")
    move(student)
    student[0].requires_grad_(False)
    second = WMATeacher(student, "ema(0.5)")
    x = torch.randn(3, 4)
    expected = second(x)
    actions = (lambda: second(x), second.averaged_state_dict, lambda: second.copy_to(copy.deepcopy(student)))
    for action in actions:
        other = copy.deepcopy(student)
        with first.swap(), pytest.raises(RuntimeError, match=r"inside swap\(\)"):
            second.copy_to(other) if action is actions[2] else action()
    assert torch.equal(second(x), expected)


def test_a_teacher_of_a_teacher_lends_to_it():
    student, first = linear_pair()
    second = WMATeacher(first.module, "ema(0.5)", frozen="copy")
    move(student)
    first.update()
    x = torch.randn(3, 4)
    expected = first(x)
    with second.swap():
        for action in (lambda: first(x), first.update, first.state_dict, first.averaged_state_dict):
            with pytest.raises(RuntimeError, match=r"inside swap\(\)"):
                action()
    assert torch.equal(first(x), expected)


# --- threads and overlapping blocks -------------------------------------------------------------------


def in_a_thread(action):
    """The error that an action raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).exception()


def test_another_thread_must_wait():
    student, teacher = trained()
    other = WMATeacher(student, "uniform")
    before, x = bits(student), torch.randn(4, 4)
    with teacher.swap():
        expected = teacher(x)
        for action in (
            lambda: teacher.swap().__enter__(),
            lambda: other.swap().__enter__(),
            teacher.update,
            other.update,
            lambda: other.copy_to(student),
            lambda: WMATeacher(student, "uniform"),
            student.state_dict,
            teacher.state_dict,
            lambda: teacher.load_average(None, 0),
        ):
            error = in_a_thread(action)
            assert isinstance(error, RuntimeError)
            assert "while another thread is inside swap()" in str(error)
        assert in_a_thread(lambda: torch.testing.assert_close(teacher(x), expected)) is None
        with teacher.swap():
            assert torch.equal(student.eval()(x), expected)
        assert torch.equal(student(x), expected)
    assert same(bits(student), before)
    assert in_a_thread(teacher.update) is None


def test_of_many_threads_one_gets_the_student(monkeypatch):
    student, teacher = trained()
    before, ready, find = bits(student), threading.Barrier(8, timeout=10), teacher._shadow.counterparts

    def find_at_once(model):
        ready.wait()
        return find(model)

    def evaluate(_):
        try:
            with teacher.swap():
                ready.wait()
                with teacher.swap():
                    return None
        except RuntimeError as error:
            ready.wait()
            return str(error)

    with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(teacher._shadow, "counterparts", find_at_once)
        errors = list(pool.map(evaluate, range(8)))
    assert errors.count(None) == 1
    assert all("while another thread is inside swap()" in error for error in errors if error)
    is_its_own(student, teacher, before)


def is_its_own(student, teacher, before):
    """Check that nothing of a swap is left behind."""
    assert same(bits(student), before)
    for module in student.modules():
        assert not module._state_dict_pre_hooks
        assert not {"__reduce_ex__", "__deepcopy__"} & vars(module).keys()
    copy.deepcopy(student).state_dict()
    WMATeacher(student, "uniform")
    teacher.state_dict()
    teacher.update()
    with teacher.swap():
        pass


def test_the_weights_are_lent_until_the_last_block_ends():
    student, teacher = trained()
    before, x = bits(student), torch.randn(4, 4)
    student.eval()
    first, second, third = (teacher.swap() for _ in range(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    third.__enter__()
    second.__exit__(None, None, None)
    assert torch.equal(student(x), teacher(x))
    with pytest.raises(RuntimeError, match=r"inside swap\(\)"):
        teacher.update()
    third.__exit__(None, None, None)
    is_its_own(student, teacher, before)


@pytest.mark.parametrize("order", ["whole", "part"])
@pytest.mark.parametrize("leave", ["return", "raise"])
def test_blocks_of_overlapping_models_are_refused_and_leave_nothing_behind(order, leave):
    student = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))
    teachers = {"whole": WMATeacher(student, "ema(0.5)"), "part": WMATeacher(student[1], "ema(0.5)")}
    outer, inner = teachers.pop(order), *teachers.values()
    move(student)
    before = bits(student)
    with contextlib.suppress(KeyError), outer.swap():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^swap\(\) inside swap\(\)"), inner.swap():
                pytest.fail("lent twice")
        if leave == "raise":
            raise KeyError
    for teacher in (outer, inner):
        is_its_own(student, teacher, before)


def test_a_swap_that_is_dropped_ends():
    student, teacher = trained()
    before = bits(student)

    def evaluate():
        with teacher.swap(), teacher.swap():
            yield

    run = evaluate()
    next(run)
    del run
    is_its_own(student, teacher, before)
    teacher.swap().__enter__()  # nothing keeps this block
    is_its_own(student, teacher, before)


def test_a_failure_to_lend_leaves_the_student_as_it_was(monkeypatch):
    student, teacher = trained()
    before = bits(student)
    write = averaging.copy_

    def fail_halfway(targets, sources):
        write(targets[:2], sources[:2])
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(averaging, "copy_", fail_halfway)
    with pytest.raises(MemoryError), teacher.swap():
        pytest.fail("not lent")
    is_its_own(student, teacher, before)


# --- copying and saving models ------------------------------------------------------------------------


def test_a_model_that_holds_lent_weights_is_neither_pickled_nor_copied(tmp_path):
    student, teacher = trained()
    holder = nn.ModuleDict({"student": student})
    with teacher.swap():
        for action in (
            lambda: torch.save(student, tmp_path / "student.pt"),
            lambda: torch.save(holder, tmp_path / "holder.pt"),
            lambda: pickle.dumps({"model": student.body}),
            lambda: copy.deepcopy(student),
            lambda: copy.copy(student),
            lambda: copy.deepcopy(teacher),
            lambda: pickle.dumps(teacher),
        ):
            with pytest.raises(RuntimeError, match=r"pickling or copying the student inside swap\(\)"):
                action()
        copied = copy.deepcopy(teacher.module)
    assert same(bits(copied), bits(teacher.module))
    again = copy.deepcopy(student)
    assert again.state_dict().keys() == pickle.loads(pickle.dumps(student)).state_dict().keys()
    assert same(bits(again), bits(student))


def test_a_model_with_methods_of_its_own_instance_keeps_them():
    student, teacher = trained()
    student.__dict__["__deepcopy__"] = lambda memo: "mine"
    with teacher.swap(), pytest.raises(RuntimeError, match="copying"):
        copy.deepcopy(student)
    assert copy.deepcopy(student) == "mine"


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_is_lent_and_copied_to():
    student, teacher = linear_pair()
    wrapped, x = nn.parallel.DistributedDataParallel(student), torch.randn(4, 4)
    with teacher.swap(wrapped), teacher.swap(), torch.no_grad():
        assert torch.equal(wrapped(x), teacher(x))
    teacher.copy_to(wrapped)
    assert torch.equal(wrapped(x), teacher(x))


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_average_is_copied_into_any_wrapped_model(wrapper, dtype):
    _, teacher = trained(torch.bfloat16)
    model = Net().to(dtype)
    expected = teacher.averaged_state_dict(dtype)
    teacher.copy_to(WRAPPERS[wrapper](model))
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64)


def test_the_average_is_copied_into_a_model_that_shares_the_frozen_weights():
    student, teacher = adapted()
    other = nn.Sequential(OrderedDict(one=Adapter(), act=nn.Tanh(), two=nn.Linear(5, 3)))
    other.one.base = student.one.base
    version = student.one.base.weight._version
    teacher.copy_to(other)
    x = torch.randn(4, 6)
    assert torch.equal(other(x), teacher(x))
    assert student.one.base.weight._version == version
    with teacher.swap(other):
        assert torch.equal(other(x), teacher(x))


def test_the_average_is_copied_into_the_student_and_the_teacher_itself():
    student, teacher = trained()
    averaged, x = bits(teacher.module), torch.randn(4, 4)
    with teacher.swap(teacher.module) as module:
        assert torch.equal(module(x), teacher(x))
    teacher.copy_to(teacher.module)
    assert same(bits(teacher.module), averaged)
    teacher.copy_to(student)
    assert same(bits(student), averaged)
    with teacher.swap(), pytest.raises(RuntimeError, match=r"copy_to\(\) inside swap\(\)"):
        teacher.copy_to(student)
    teacher.update()
    assert student.state_dict()
