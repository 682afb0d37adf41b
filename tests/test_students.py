"""Every kind of module that people train, under one loop: train, update, read the average back."""

import copy
import gc
import pickle
import sys
import warnings

import pytest
import torch
import waiting
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.two_tensor import TwoTensor

from wmateacher import WMATeacher, posthoc
from wmateacher.pairing import tensors


def follow(student, inputs, steps=4, **options):
    """Train for a few steps; check the averages against float64 ones, and return the teacher."""
    teacher = WMATeacher(student, "ema(0.7)", **options)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    expected = {
        n: p.detach().to(torch.promote_types(p.dtype, torch.float64), copy=True)
        for n, p in student.named_parameters()
    }
    for _ in range(steps):
        student(inputs).abs().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update()
        for name, p in student.named_parameters():
            expected[name].lerp_(p.detach().to(expected[name].dtype), 0.3)
    held = teacher.averaged_state_dict(torch.float64)
    moved = 0
    for name, value in expected.items():
        torch.testing.assert_close(held[name], value.to(held[name].dtype), rtol=1e-4, atol=1e-5)
        moved += not torch.equal(tensors(student)[name].to(held[name].dtype), held[name])
    assert moved
    return teacher


X = torch.linspace(-1, 1, 24).view(6, 4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have the new one
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))


def new_weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))


def old_spectral_norm():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))


def new_spectral_norm():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 2))


@pytest.mark.parametrize(
    "build",
    [old_weight_norm, new_weight_norm, old_spectral_norm, new_spectral_norm],
    ids=lambda b: b.__name__,
)
def test_normalised_weights(build):
    """The average is of what is trained; the weight is computed from it, as the student's is."""
    student = build()
    student(X)  # a weight with a graph refuses deepcopy
    teacher = follow(student, X)
    rebuilt = build()
    rebuilt.load_state_dict(teacher.averaged_state_dict())
    torch.testing.assert_close(teacher(X), rebuilt.eval()(X))
    assert teacher(X).isfinite().all()


def test_power_iteration_vectors_are_the_students_and_not_averages():
    student = old_spectral_norm()
    teacher = follow(student, X)
    assert torch.equal(teacher.module[0].weight_u, student[0].weight_u)


def test_complex_parameters():
    class Phase(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, x):
            return x.to(self.weight.dtype) @ self.weight

    teacher = follow(Phase(), X)
    assert teacher(X).dtype is torch.complex64
    assert follow(Phase(), X, dtype=torch.float64).state_dict()["module.weight"].dtype is torch.complex128


def test_channels_last():
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
    student = student.to(memory_format=torch.channels_last)
    teacher = follow(student, IMAGES)
    assert teacher.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    later = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
    teacher = WMATeacher(later, "ema(0.5)")
    start = later[0].weight.detach().clone()
    later.to(memory_format=torch.channels_last)  # after the teacher was built
    nn.init.ones_(later[0].weight)
    teacher.update()
    torch.testing.assert_close(teacher.module[0].weight, (start + 1) / 2)


def test_lazy_modules_once_they_have_run():
    student = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="'0.weight' belongs to a lazy module and is not initialised yet"):
        WMATeacher(student, "uniform")
    student(X)
    follow(student, X)


def test_buffers_that_no_checkpoint_holds_follow_the_student():
    class Cached(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("scale", torch.ones(()), persistent=False)

        def forward(self, x):
            self.scale = self.scale + 1  # a new tensor each time
            return super().forward(x) * self.scale

    student = Cached()
    teacher = follow(student, X, buffers="average")
    assert teacher.module.scale == student.scale == 5
    assert "module.scale" not in teacher.state_dict()


def test_parameters_added_since():
    student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    teacher = follow(student, X)
    step = teacher.step
    student.add_module("2", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unexpected '2.weight', '2.bias'.* build a new teacher for it"):
        teacher.update()
    assert teacher.step == step
    student.pop(2)
    teacher.update()
    assert teacher.step == step + 1


def test_moved_and_replaced_tensors_are_followed():
    student = nn.Linear(4, 2)
    teacher = WMATeacher(student, "ema(0.5)", dtype=torch.float32)
    start = student.weight.detach().clone()
    teacher.update()
    student.weight.data = torch.ones(2, 4)
    teacher.update()
    student.weight = nn.Parameter(torch.full((2, 4), 3.0))
    teacher.update()
    student.bfloat16()
    teacher.update()
    torch.testing.assert_close(teacher.module.weight, start / 8 + 1 / 8 + 9 / 4)


def test_ddp_students(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
        teacher = WMATeacher(student, "ema(0.5)")
        assert type(teacher.module) is nn.Linear
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        teacher.attach(optimizer)
        student(X).sum().backward()
        optimizer.step()
        assert teacher.step == 1
        with teacher.swap():
            assert torch.equal(student(X), teacher(X))
        with teacher.swap(), pytest.raises(RuntimeError, match="state_dict"):
            student.state_dict()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lora_teacher_costs_the_adapter(dtype):
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 2)).to(
        dtype
    )
    student = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0", "2"]), autocast_adapter_dtype=False
    )
    frozen = {id(p) for p in student.parameters() if not p.requires_grad}
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)
    teacher = follow(student, X.to(dtype))
    own = [t for t in tensors(teacher.module).values() if id(t) not in frozen]
    assert sum(t.numel() for t in own) == adapter
    saved = [t for t in teacher.state_dict().values() if torch.is_tensor(t)]
    assert sum(t.numel() for t in saved) == adapter
    assert {t.dtype for t in saved} == {torch.float32}
    with teacher.swap(), torch.no_grad():
        torch.testing.assert_close(student.eval()(X.to(dtype)), teacher(X.to(dtype)))
    student.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"unexpected .*second.*add and remove parameters before"):
        teacher.update()


def test_a_frozen_base_of_wrapped_tensors_is_shared():
    """A stand-in for quantised weights: tensors around tensors, without memory of their own."""
    student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    inner = student[0].weight.detach()
    student[0].weight = nn.Parameter(TwoTensor(inner, inner.clone()), requires_grad=False)
    teacher = WMATeacher(student, "ema(0.5)")
    assert teacher.module[0].weight is student[0].weight
    start = student[1].weight.detach().clone()
    for _ in range(2):
        nn.init.ones_(student[1].weight)
        teacher.update()
    torch.testing.assert_close(teacher.module[1].weight, start / 4 + 3 / 4)
    with teacher.swap():
        torch.testing.assert_close(student[1].weight, start / 4 + 3 / 4)
    assert (student[1].weight == 1).all()


def test_tensors_that_have_no_average_are_copied():
    student = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    student.bits = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    student.register_buffer("mask", torch.zeros(1).expand(5))
    student.register_buffer("graph", torch.eye(3).to_sparse())
    teacher = WMATeacher(student, "ema(0.5)", frozen="copy", buffers="average")
    student.bits.data = torch.full((4,), 7, dtype=torch.int8)
    student.mask = torch.ones(1).expand(5)
    student.graph = 2 * student.graph
    for _ in range(2):
        teacher.update()
    assert (teacher.module.bits == 7).all()
    assert (teacher.module.mask == 1).all()
    assert torch.equal(teacher.module.graph.to_dense(), 2 * torch.eye(3))
    with teacher.swap():
        assert (student.mask == 1).all()


def test_expanded_tensors_on_one_side_only():
    class Student(nn.Linear):
        def __init__(self, mask):
            super().__init__(2, 2)
            self.register_buffer("mask", mask)

    student = Student(torch.zeros(1).expand(5))
    teacher = WMATeacher(student, "ema(0.9)", device="cpu")
    with teacher.swap():
        assert (student.mask == 0).all()
    student.mask = torch.arange(5.0)
    teacher.update()
    assert torch.equal(teacher.module.mask, torch.arange(5.0))
    built = WMATeacher(student, "ema(0.9)", module_factory=lambda: Student(torch.zeros(1).expand(5)))
    assert torch.equal(built.module.mask, torch.arange(5.0))


@pytest.mark.parametrize(
    "change", [lambda w: w.t(), lambda w: w.view(1, 9).view(3, 3).t()], ids=["t", "view"]
)
def test_the_same_memory_in_another_layout_is_followed(change):
    student = nn.Linear(3, 3, bias=False)
    teacher = WMATeacher(student, "ema(0.5)")
    teacher.update()
    start = student.weight.detach().clone()
    student.weight.data = change(student.weight.data)
    teacher.update()
    torch.testing.assert_close(teacher.module.weight, (start + student.weight) / 2)
    reshaped = nn.Linear(2, 3, bias=False)
    teacher = WMATeacher(reshaped, "ema(0.5)")
    teacher.update()
    reshaped.weight.data = reshaped.weight.data.view(2, 3)
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 3\), the teacher's has \(3, 2\)"):
        teacher.update()


def test_trained_wrapped_tensors_are_looked_up_each_time():
    student = nn.Linear(2, 2, bias=False)
    inner = student.weight.detach()
    student.weight = nn.Parameter(TwoTensor(inner, inner.clone()))
    teacher = WMATeacher(student, "ema(0.5)", dtype=torch.float64)
    teacher.update()
    student.double()
    with torch.no_grad():
        student.weight.fill_(100.0)
    teacher.update()
    torch.testing.assert_close(teacher.state_dict()["module.weight"].a, (inner.double() + 100) / 2)


def test_moving_a_teacher_leaves_what_it_shares_to_the_student():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "uniform")
    teacher.bfloat16()
    assert student[0].weight.dtype is torch.float32
    assert teacher.module[0].weight is student[0].weight
    both = nn.ModuleDict({"teacher": teacher, "student": student}).bfloat16()
    assert both["teacher"].module[0].weight is student[0].weight
    assert teacher(torch.ones(1, 2).bfloat16()).dtype is torch.bfloat16


def test_a_plan_made_in_inference_mode_serves_outside():
    student = nn.Linear(4, 4).bfloat16()
    teacher = WMATeacher(student, "ema(0.5)")
    with torch.inference_mode():
        list(teacher.averaged_pairs())
    teacher.update()
    assert teacher.step == 1


def test_an_update_that_fails_is_not_counted(monkeypatch):
    teacher = WMATeacher(nn.Linear(4, 4), "ema(0.5)")
    teacher.update()

    def fail(*unused):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("wmateacher.averaging.steps._lerp_", fail)
        with pytest.raises(MemoryError):
            teacher.update()
    assert (teacher.step, len(teacher.trajectory_weights())) == (1, 2)
    teacher.update()
    assert teacher.step == 2


def test_a_factory_must_not_return_the_student():
    student = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"it has the student's own '\w+': module_factory must build a new module"
    ):
        WMATeacher(student, "uniform", module_factory=lambda: student)
    assert student.weight.requires_grad


def test_recurrent_networks():
    student = nn.LSTM(4, 3, batch_first=True)
    teacher = WMATeacher(student, "ema(0.5)")
    nn.init.ones_(student.weight_hh_l0)
    teacher.update()
    x = X.view(2, 3, 4)
    with teacher.swap(), torch.no_grad():
        torch.testing.assert_close(student(x)[0], teacher(x)[0])


def test_float8_is_averaged_in_higher_precision():
    student = nn.Linear(4, 2)
    student.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))
    teacher = WMATeacher(student, "ema(0.9)")
    student.scale.data = torch.full((3,), 2.0).to(torch.float8_e4m3fn)
    teacher.update()
    expected = torch.full((3,), 1.1, dtype=torch.float64)
    torch.testing.assert_close(teacher.state_dict()["module.scale"], expected)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2, device="meta"), ValueError, "'weight' is on the meta device .* materialise"),
        (torch.jit.ScriptModule(), TypeError, "must not be a ScriptModule: build the teacher before"),
    ],
    ids=["meta", "scripted"],
)
def test_students_that_cannot_be_averaged(model, error, message):
    with pytest.raises(error, match=message):
        WMATeacher(model, "uniform")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("start", [("split", torch.bfloat16), ("auto", torch.float64)], ids=str)
def test_an_average_whose_module_was_cast_behind_its_back(dtype, start):
    asked, own = start
    teacher = WMATeacher(nn.Linear(4, 2, dtype=own), "ema(0.9)", dtype=asked)
    teacher.module.to(dtype)
    for action in (teacher.update, teacher.state_dict):
        with pytest.raises(
            RuntimeError, match="'weight' was cast to .*: cast the teacher .*, not teacher.mod"
        ):
            action()


def test_states_of_modules_that_keep_more_than_tensors():
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    student = nn.Sequential(Counting(2, 2), nn.Linear(2, 2)).bfloat16()
    # A hook that clones what it saves, as some libraries have.
    student._register_state_dict_hook(
        lambda m, s, *_: s.update({k: v.clone() for k, v in s.items() if torch.is_tensor(v)})
    )
    teacher = WMATeacher(student, "ema(0.9)")
    teacher.module[0].seen = 7
    state = teacher.state_dict()
    assert state["module.0.weight"].dtype is torch.float32
    again = WMATeacher(student, "ema(0.9)")
    again.load_state_dict(state)
    assert again.module[0].seen == 7


def test_assigned_states_keep_ties_and_dtypes():
    student = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).bfloat16()
    student[1].weight = student[0].weight
    teacher = WMATeacher(student, "ema(0.9)")
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in teacher.state_dict().items()}
    teacher.load_state_dict(state, assign=True)
    assert teacher.module[1].weight is teacher.module[0].weight
    assert teacher.module[0].weight.dtype is torch.bfloat16
    teacher.update()


# --- what people do with a teacher ----------------------------------------------------------------------


def run(student, teacher, seed):
    torch.manual_seed(seed)
    for p in student.parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p))
    teacher.update()


@pytest.mark.parametrize("options", [{}, {"dtype": "split"}, {"frozen": "copy"}], ids=str)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"]
)
def test_a_duplicate_goes_on_with_a_student_of_its_own(duplicate, options):
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).bfloat16()
    student[0].bias.requires_grad_(False)
    holder = {"teacher": WMATeacher(student, "beta(0.5,0.5)", 10, **options), "student": student}
    attachment = holder["teacher"].attach(torch.optim.SGD([student[0].weight], lr=0.1))
    twin = duplicate(holder)
    attachment.remove()
    before = copy.deepcopy(holder["teacher"].state_dict())
    run(twin["student"], twin["teacher"], 1)
    for key, value in holder["teacher"].state_dict().items():
        assert torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
    run(holder["student"], holder["teacher"], 1)
    for key, value in holder["teacher"].state_dict().items():
        other = twin["teacher"].state_dict()[key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_the_average_as_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.norm = nn.BatchNorm1d(4).to(memory_format=torch.channels_last)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.norm(self.embed(x)))

    student = Tied().bfloat16()
    student.norm.requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 10)
    run(student, teacher, 0)
    save_file(teacher.averaged_state_dict(), tmp_path / "average.safetensors")
    plain = Tied().bfloat16()
    assert not any(plain.load_state_dict(load_file(tmp_path / "average.safetensors")))
    tokens = torch.arange(7)
    assert torch.equal(plain.eval()(tokens), teacher(tokens))
    save_file(teacher.averaged_state_dict(torch.float32), tmp_path / "float32.safetensors")
    precise = load_file(tmp_path / "float32.safetensors")
    assert torch.equal(precise["head.weight"], teacher.state_dict()["module.head.weight"])
    assert precise["norm.num_batches_tracked"].dtype is torch.int64
    kept = precise["head.weight"].clone()
    run(student, teacher, 1)
    assert torch.equal(precise["head.weight"], kept)


def test_a_compiled_teacher_is_not_compiled_again_by_updates():
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    teacher = WMATeacher(student, "ema(0.5)")
    counter = CompileCounter()
    compiled = torch.compile(teacher, backend=counter, fullgraph=True)
    for seed in range(4):
        run(student, teacher, seed)
        assert torch.equal(compiled(X), teacher(X))
        assert not compiled(X).requires_grad
    assert counter.frame_count == 1


@pytest.mark.parametrize("recorded", [False, True], ids=["WMATeacher", "Recorder"])
def test_a_compiled_training_step_is_not_compiled_again_by_updates(recorded, tmp_path):
    def outputs(name, wrap):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        if recorded:
            average = posthoc.Recorder(student, 12, folder=tmp_path / name, every=5)
            teacher = average.teachers[0]
        else:
            average = teacher = WMATeacher(student, "uniform", 12)

        @wrap
        def step():
            with torch.no_grad():
                student[0].weight.mul_(0.9)
            average.update()
            return teacher(X).sum() + student(X).sum()

        return torch.stack([step() for _ in range(12)])

    counter = CompileCounter()
    compiled = outputs("compiled", torch.compile(backend=counter))
    torch.testing.assert_close(compiled, outputs("eager", lambda step: step))
    assert counter.frame_count == 2  # what is before the update, and what is after it


@pytest.mark.slow
def test_a_teacher_compiled_in_place_by_the_default_backend():
    student = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    teacher = WMATeacher(student, "ema(0.5)")
    eager = copy.deepcopy(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher.compile()
        for seed in range(3):
            run(student, teacher, seed)
            eager.update(student)
            torch.testing.assert_close(teacher(X), eager(X))


@pytest.mark.parametrize("options", [{}, {"dtype": "split"}, {"buffers": "average"}], ids=str)
def test_an_update_never_reads_a_tensors_value(options):
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).bfloat16()
    teacher = WMATeacher(student, "beta(0.5,0.5)", 20, update_every=2, **options)
    with waiting.Forbid():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()
        for _ in range(20):
            teacher.update()


def python_calls(teacher):
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # a collection in the middle would be counted, with the callbacks of others
    sys.setprofile(profile)
    try:
        teacher.update()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_runs_in_python_does_not_grow_with_the_number_of_tensors(dtype):
    counts = []
    for tensors_ in (6, 3000):
        student = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(tensors_ // 2)))
        teacher = WMATeacher(student, "ema(0.9)")
        teacher.update()
        counts.append(python_calls(teacher))
    assert counts[0] == counts[1] < 210


class Cached(nn.Module):
    """A layer that keeps its transposed weight while it is evaluated."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}  # and many forget to return self

    def forward(self, x):
        if self.training:
            return x @ self.weight.t()
        if not self.cache:
            self.cache["weight"] = self.weight.detach().t().clone()
        return x @ self.cache["weight"]


@pytest.mark.parametrize("training", [False, True])
def test_what_a_module_caches_for_evaluation_follows_its_weights(training):
    student = nn.Sequential(Cached(), nn.Dropout(0.5)).train(training)
    assert isinstance(WMATeacher(Cached(), "uniform").module, Cached)
    student[1].train(not training)
    teacher = WMATeacher(student, "ema(0.5)")
    x = torch.randn(5, 4)
    modes = [m.training for m in student.modules()]
    for _ in range(2):
        student[0](x), teacher(x)
        nn.init.normal_(student[0].weight)
        student[0].train()
        student[0].train(training)
        teacher.update()
        average = teacher.averaged_state_dict()["0.weight"]
        torch.testing.assert_close(teacher(x), x @ average.t())
        with teacher.swap():
            assert [m.training for m in student.modules()] == modes
            torch.testing.assert_close(student[0](x), x @ average.t())
        assert [m.training for m in student.modules()] == modes
        torch.testing.assert_close(student[0](x), x @ student[0].weight.t())
    teacher.copy_to(student)
    torch.testing.assert_close(student[0](x), x @ average.t())


class Attached(nn.Module):
    """A module whose copies share its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.layer(x)


def test_a_copy_that_shares_the_students_weights_is_refused():
    student = nn.Sequential(Attached(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="the student's own '0.layer.weight'.*module_factory"):
        WMATeacher(student, "uniform")
    assert all(p.requires_grad for p in student.parameters())

    def factory():
        module = nn.Linear(4, 2)
        module.weight.data = student[1].weight.data
        return module

    with pytest.raises(
        ValueError, match="the student's own 'weight': module_factory must build a new module"
    ):
        WMATeacher(student[1], "uniform", module_factory=factory)
