"""What the teacher's copy of a student computes with, takes along, shares and leaves out."""

import copy
import functools
import pickle
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils import prune

from wmateacher import WMATeacher
from wmateacher.naming import resolve
from wmateacher.pairing import tensors

X = torch.linspace(-1, 1, 24).view(6, 4)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 4)))


def advance(student, teacher):
    """Move student and average apart."""
    for _ in range(2):
        with torch.no_grad():
            for p in student.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        teacher.update()


def check(teacher, build=plain):
    """The teacher computes what a new model does that has the averages as its weights."""
    fresh = build()
    state = teacher.averaged_state_dict()  # under the student's keys, which may be those of wrappers
    names = resolve(state, fresh.state_dict())
    fresh.load_state_dict({names[key]: value for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(teacher(X), fresh.eval()(X))
        assert not torch.allclose(teacher(X), teacher.student(X))


# --- patched forwards -----------------------------------------------------------------------------------

PATCHES = {}


def patch(function):
    PATCHES[function.__name__] = function
    return function


class Caller:
    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


class Unpicklable(Caller):
    def __getstate__(self):
        raise pickle.PicklingError("as accelerate's ConvertOutputsToFp32 does")


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@patch
def a_lambda(m):
    f = m.forward
    m.forward = lambda *args: f(*args)


@patch
def a_lambda_of_a_submodule(m):
    f = m[3][0].forward
    m[3][0].forward = lambda *args: f(*args)


@patch
def decorators(m):
    m.forward = decorated(decorated(torch.no_grad()(m.forward)))
    assert m.forward.__wrapped__.__wrapped__.__wrapped__.__self__ is m


@patch
def a_method_around_the_original(m):
    f = m[0].forward
    m[0].forward = types.MethodType(lambda self, x: f(x) + 0 * self.bias, m[0])


@patch
def a_partial(m):
    f = m[0].forward
    m[0].forward = functools.partial(lambda module, x, again: again(f(x)), m[0], again=lambda x: x)


@patch
def a_partial_of_the_module(m):
    m[0].forward = functools.partial(lambda module, x: F.linear(x, module.weight, module.bias), m[0])


@patch
def a_function_that_calls_itself(m):
    f = m.forward

    def forward(x, first=True):
        return forward(x, False) if first else f(x)

    m.forward = forward


@patch
def two_functions_that_call_each_other(m):
    f = m[0].forward

    def one(x, left=3):
        return other(x, left - 1)

    def other(x, left):
        return one(x, left) if left else f(x)

    m[0].forward = functools.partial(one)


@patch
def defaults(m):
    def forward(x, f=m[0].forward, *, g=m[0].weight):
        return f(x) + 0 * g.sum()

    m[0].forward = forward


@patch
def parameters_in_a_closure(m):
    weight, bias = m[0].weight, m[0]._parameters
    m[0].forward = lambda x: F.linear(x, weight, bias["bias"])


@patch
def views_of_parameters_in_a_closure(m):
    weight, bias = m[0].weight.data[:], m[0].bias.view(2, 4)
    m[0].forward = lambda x: F.linear(x, weight) + bias.view(8)


@patch
def a_bound_method_of_a_tensor(m):
    weight = m[0].weight.t
    m[0].forward = lambda x: x @ weight() + m[0].bias


@patch
def containers(m):
    Pair = collections_pair()
    held = {"list": [m[0].forward], m[2]: ({m[3]},)}
    pair = Pair(held, frozenset({m[0]}))

    def forward(x):
        (first,), (last,) = pair.held["list"], pair.held[m[2]][0]
        assert pair.others == {m[0]}
        return last(m[2](F.gelu(first(x))))

    m.forward = forward


def collections_pair():
    from collections import namedtuple

    return namedtuple("Pair", ["held", "others"])


@patch
def weak_references(m):
    module, method, proxy = weakref.ref(m[0]), weakref.WeakMethod(m[2].forward), weakref.proxy(m[3])
    m.forward = lambda x: proxy(method()(F.gelu(module()(x))))
    object.__setattr__(m, "proxy", weakref.proxy(m[3]))


@patch
def a_cached_function(m):
    f = m.forward
    m.forward = functools.lru_cache(0)(lambda x: f(x))


@patch
def a_callable_object(m):
    m.forward = Caller(decorated(m.forward))


@patch
def a_callable_object_in_a_closure(m):
    wrapper = Unpicklable(m.forward)
    m.forward = lambda x: wrapper(x)


@patch
def a_global_variable(m):
    global _forward
    _forward = m.forward
    m.forward = lambda x: _forward(x)


@patch
def a_global_function(m):
    global _weight
    _weight = m[0].weight
    m[0].forward = lambda x: _linear(x) + m[0].bias


def _linear(x):
    return (lambda: F.linear(x, _weight))()


@patch
def a_compiled_forward(m):
    m.forward = torch.compile(m.forward, backend="eager")
    m(X)


@patch
def a_compiled_function_with_globals(m):
    global _compiled
    _compiled = m.forward
    m.forward = torch.compile(lambda x: _compiled(x), backend="eager")
    m(X)


@patch
def a_compiled_module(m):
    m[3].compile(backend="eager")
    m.compile(backend="eager")
    m(X)


@patch
def a_compiled_wrapper_in_a_closure(m):
    last = torch.compile(m[3], backend="eager")
    m.forward = lambda x: last(m[2](F.gelu(m[0](x))))


@patch
def a_tied_module_in_a_closure(m):
    tied = nn.Linear(4, 8)
    tied.weight, tied.bias = m[0].weight, m[0].bias
    m[0].bias.requires_grad_(False)
    m[0].forward = lambda x: tied(x)
    m.tied = [tied]


@patch
def a_function_that_is_not_compiled(m):
    m.forward = torch.compiler.disable(m.forward)
    m[0].forward = torch.compiler.disable(m[0].forward, recursive=False)


@patch
def autocast(m):
    m.forward = torch.autocast("cpu", enabled=False)(m.forward)


@patch
def a_compiled_submodule(m):
    m[3] = torch.compile(m[3], backend="eager")


@patch
def a_checkpoint_wrapper(m):
    m[3] = checkpoint_wrapper(m[3])
    m[2].forward = functools.partial(torch.utils.checkpoint.checkpoint, m[2].forward, use_reentrant=False)


@patch
def modules_in_plain_attributes(m):
    m.layers, m.named, m.pair = [m[0], m[1]], {"out": m[2]}, (m[3], nn.Sequential(m[3]))
    m.last = m[3].forward
    m.forward = types.MethodType(
        lambda self, x: self.last(self.named["out"](self.layers[1](self.layers[0](x)))), m
    )


@patch
def a_view_in_a_plain_attribute(m):
    m[0].halves = m[0].weight.chunk(2)
    m[0].forward = types.MethodType(lambda self, x: F.linear(x, torch.cat(self.halves), self.bias), m[0])


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_student_has_a_teacher_that_computes_with_the_average(name):
    student = plain()
    PATCHES[name](student)
    teacher = WMATeacher(student, "ema(0.5)")
    with torch.no_grad():
        torch.testing.assert_close(teacher(X), student(X))
    advance(student, teacher)
    check(teacher)


@pytest.mark.parametrize("name", ["a_lambda", "a_callable_object_in_a_closure", "a_compiled_forward"])
def test_a_duplicate_of_a_patched_students_teacher_computes_with_its_own_average(name):
    student = plain()
    PATCHES[name](student)
    teacher = WMATeacher(student, "ema(0.5)")
    twin = copy.deepcopy(teacher)
    before = teacher(X)
    for p in student.parameters():
        nn.init.ones_(p)
    twin.update(student)
    fresh = plain()
    fresh.load_state_dict(twin.averaged_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(X), fresh(X))
    assert not torch.allclose(twin(X), before)
    assert torch.equal(teacher(X), before)


def test_a_rebound_function_keeps_what_belongs_to_it_and_shares_the_rest():
    student, calls, original = plain(), [], plain().forward

    def forward(x: torch.Tensor, *, scale=1.0):
        """Say what it does."""
        calls.append(scale)
        return original(x) if scale == 2 else student[0](x) * scale

    original = student.forward
    forward.tag, student.forward, student[3].calls = forward, forward, calls
    student[2].forward = functools.update_wrapper(functools.partial(student[2].forward), student[2].forward)
    teacher = WMATeacher(student, "ema(0.5)")
    ours = teacher.module.forward
    assert ours is not forward
    assert teacher.module[2].forward.__wrapped__.__self__ is teacher.module[2]
    assert ours.tag is ours
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__", "__kwdefaults__"):
        assert getattr(ours, name) == getattr(forward, name)
    teacher(X)
    assert (calls, teacher.module[3].calls) == ([], [1.0])  # an attribute of the student is copied
    student.forward = lambda x: forward(x)
    other = WMATeacher(student, "ema(0.5)", device="cpu")
    advance(student, other)
    torch.testing.assert_close(other(X), other.module[0](X))
    assert student.forward.__closure__[0].cell_contents is forward


def test_a_function_without_the_student_stays_as_it_is():
    student, calls = plain(), []

    def forward(self, x):
        calls.append(self)
        return type(self).forward(self, x)

    helper = Caller(forward)
    student[0].forward = types.MethodType(forward, student[0])
    student[2].forward = functools.partial(lambda x, weight: x[:, :4], weight=helper)
    teacher = WMATeacher(student, "ema(0.5)")
    teacher(X)
    assert calls == [teacher.module[0]]
    assert teacher.module[0].forward.__func__ is forward
    assert teacher.module[2].forward.func is student[2].forward.func


_scale = 1.0


def test_a_global_variable_of_a_rebound_function_can_still_change(monkeypatch):
    student = plain()
    a_global_variable(student)
    original = student.forward
    student.forward = lambda x: original(x) * _scale
    teacher = WMATeacher(student, "ema(0.5)")
    once = teacher(X)
    monkeypatch.setitem(globals(), "_scale", 2.0)
    torch.testing.assert_close(teacher(X), 2 * once)


class Holder:
    def __init__(self, module):
        self.module = module


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)


def an_object(m):
    holder = Holder(m[0])
    m[2].forward = lambda x: F.linear(x, holder.module.weight)


def slots(m):
    slotted = Slotted(m[0])
    m[2].forward = lambda x: slotted(x)


def an_iterator(m):
    blocks = iter([m[0]])
    m[2].forward = lambda x: next(blocks)(x)


def a_local_class(m):
    f = m[0].forward

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return f(x)

    m[2].forward = lambda x: Function.apply(x)


def a_larger_model(m):
    parent = nn.Sequential(m, nn.Linear(4, 4))
    m[2].forward = lambda x: parent[1](x)


def an_uncopied_singleton(m):
    class Registry(Holder):
        def __deepcopy__(self, memo):
            return self

    m[2].forward = Registry(m[0])


def a_class_attribute(m):
    class Held:
        module = m[0]

    m[2].forward = lambda x: Held.module(x)


def an_attribute_of_a_python_module(m):
    settings = types.ModuleType("settings")
    settings.__file__, settings.first = __file__, m[0]
    m[2].forward = lambda x: settings.first(x)


def a_generator(m):
    def blocks():
        yield m[0]

    blocks = blocks()
    m[2].forward = lambda x: next(blocks)(x)


@pytest.mark.parametrize(
    "change",
    [
        an_object,
        slots,
        a_class_attribute,
        a_generator,
        an_iterator,
        a_local_class,
        a_larger_model,
        an_uncopied_singleton,
    ],
    ids=lambda f: f.__name__,
)
def test_what_cannot_be_rebound_is_refused(change):
    student = plain()
    change(student)
    with pytest.raises(
        ValueError,
        match=r"the student's '2.forward' holds the student itself in .* pass module_factory=FACTORY",
    ):
        WMATeacher(student, "ema(0.5)")
    teacher = WMATeacher(student, "ema(0.5)", module_factory=plain)
    advance(student, teacher)


def test_what_only_knows_the_student_is_no_reason_to_refuse():
    class Block(nn.Linear):
        instances = []  # noqa: RUF012

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.instances.append(self)

        @functools.lru_cache  # noqa: B019
        def table(self, length):
            return torch.arange(length)

        def forward(self, x):
            return super().forward(x) + self.table(4)

    student = nn.Sequential(Block(4, 4))
    student(X)
    teacher = WMATeacher(student, "ema(0.5)")
    advance(student, teacher)
    check(teacher, lambda: nn.Sequential(Block(4, 4)))


def test_a_class_that_is_patched_with_the_students_method_is_refused():
    student = plain()
    forward = student[0].forward

    class Patched(nn.Linear):
        def forward(self, x):
            return forward(x)

    student[0].__class__ = Patched
    with pytest.raises(
        ValueError, match=r"'0' holds the student itself in a method or attribute of its class .*Patched"
    ):
        WMATeacher(student, "ema(0.5)")


def test_a_model_that_only_looks_like_the_student_is_left_alone():
    other, student = plain(), plain()
    student[3].forward = lambda x: other[3](x)
    teacher = WMATeacher(student, "ema(0.5)")
    assert teacher.module[3].forward is student[3].forward


# --- hooks ----------------------------------------------------------------------------------------------


def hooked(features):
    student = plain()
    kept = student[3]

    def forward_hook(module, inputs, output):
        features.append(module)
        return output + 0 * kept(inputs[0][:, :4]).sum()

    student[0].register_forward_hook(forward_hook)
    student[0].register_forward_hook(
        lambda m, i, k, o: features.append(m), with_kwargs=True, always_call=True
    )
    student[0].register_forward_pre_hook(lambda m, i: features.append(m))
    student[0].register_forward_pre_hook(lambda m, i, k: features.append(m), with_kwargs=True)
    student[2].register_full_backward_hook(lambda m, i, o: features.append(m))
    student[2].register_full_backward_pre_hook(lambda m, o: features.append(m))
    return student


def test_the_students_hooks_do_not_run_in_the_teacher():
    features = []
    student = hooked(features)
    teacher = WMATeacher(student, "ema(0.5)")
    advance(student, teacher)
    teacher(X)
    teacher.module(X.clone().requires_grad_()).sum().backward()
    assert features == []
    assert all(not v for k, v in vars(teacher.module[0]).items() if "hooks" in k)
    assert len(student[0]._forward_hooks) == len(student[0]._forward_pre_hooks) == 2
    student(X)
    assert len(features) == 4
    check(teacher)


def test_hooks_that_are_copied_see_the_teachers_modules():
    features = []
    student = hooked(features)
    teacher = WMATeacher(student, "ema(0.5)", hooks="copy")
    advance(student, teacher)
    teacher(X)
    assert features == [teacher.module[0]] * 4
    hook = next(iter(teacher.module[0]._forward_hooks.values()))
    assert teacher.module[3] in [cell.cell_contents for cell in hook.__closure__]
    check(teacher)


def test_a_hook_that_cannot_be_rebound_is_refused_only_if_it_is_copied():
    student = plain()
    holder = Holder(student)
    student[0].register_forward_hook(lambda module, inputs, output: holder.module)
    WMATeacher(student, "ema(0.5)")
    with pytest.raises(ValueError, match="the student's '0._forward_hooks' holds the student itself in"):
        WMATeacher(student, "ema(0.5)", hooks="copy")
    with pytest.raises(ValueError, match="unknown hooks policy 'keep'; available: copy, drop"):
        WMATeacher(student, "ema(0.5)", hooks="keep")


class Largest(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, tensor, default_mask):
        return default_mask * (tensor.abs() > tensor.abs().mean())


def normalised():
    student = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(student[0])
    nn.utils.spectral_norm(student[2])
    prune.random_unstructured(student[3][0], "weight", 0.5)
    Largest.apply(student[3][0], "bias")
    nn.utils.parametrizations.orthogonal(student[3][0], "weight_orig")
    return student


def test_hooks_that_compute_weights_stay():
    student = normalised()
    student[0].register_forward_hook(lambda *unused: pytest.fail("runs in the teacher"))
    teacher = WMATeacher(student, "ema(0.5)")
    (key,) = student[0]._forward_hooks
    del student[0]._forward_hooks[key]
    advance(student, teacher)
    check(teacher, normalised)


def test_hooks_that_are_methods_of_the_model_stay():
    class Recorder:
        def __init__(self):
            self.seen = []

        def record(self, key, module, inputs, output):
            self.seen.append(key)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.recorder = plain(), Recorder()
            self.body[0].register_forward_hook(self.keep)
            self.body[2].register_forward_hook(functools.partial(self.recorder.record, "inner"))

        def keep(self, module, inputs, output):
            self.kept = output

        def forward(self, x):
            return self.body(x) + self.kept.mean()

    student, outside = Deep(), Recorder()
    student.body[0].register_forward_pre_hook(functools.partial(outside.record, "outer", output=None))
    student.body[2].register_forward_pre_hook(functools.partial(outside.record, "outer", output=None))
    student(X)
    assert (len(outside.seen), len(student.recorder.seen)) == (2, 1)
    teacher = WMATeacher(student, "ema(0.5)")
    advance(student, teacher)
    check(teacher, Deep)  # calls the teacher twice, the student once
    assert (len(outside.seen), len(student.recorder.seen)) == (4, 2)
    assert len(teacher.module.recorder.seen) == 3


def test_hooks_of_states_stay():
    student = plain()
    student[0].register_state_dict_post_hook(lambda m, state, prefix, _: state.update({f"{prefix}more": 1}))
    assert WMATeacher(student, "ema(0.5)").averaged_state_dict()["0.more"] == 1


# --- what the copy takes along --------------------------------------------------------------------------


class Trainer:
    def __init__(self, model, data):
        self.model, self.data = model, data
        self.optimizers = [torch.optim.Adam(model.parameters())]

    def fit(self): ...

    def hook(self, module, inputs, output): ...


def test_optimizers_and_data_are_shared_and_trainers_left_out():
    student = plain()
    data = torch.utils.data.TensorDataset(torch.zeros(10, 4))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(len(student)))
    student.kit = {"optimizer": [optimizer], "scheduler": scheduler, "data": (data,)}
    student[0].loader = torch.utils.data.DataLoader(data)
    trainer = Trainer(student, data)
    object.__setattr__(student[2], "trainer", trainer)
    student[2].fit = trainer.fit
    student[2].register_forward_hook(trainer.hook)
    student[3].attached = WMATeacher(student[2], "ema(0.5)").attach(optimizer)
    teacher = WMATeacher(student, "ema(0.5)")
    kit = teacher.module.kit
    assert (kit["optimizer"][0], kit["scheduler"], kit["data"][0]) == (optimizer, scheduler, data)
    assert teacher.module[0].loader is student[0].loader
    assert teacher.module[2].trainer is teacher.module[2].fit is None
    assert not teacher.module[2]._forward_hooks
    assert teacher.module[3].attached is None
    advance(student, teacher)
    check(teacher)


def test_the_model_around_the_student_is_left_out():
    class Block(nn.Linear):
        copies = 0

        def __setstate__(self, state):
            super().__setstate__(state)
            Block.copies += 1

    whole = nn.Sequential(Block(4, 4), nn.Linear(4, 4))
    object.__setattr__(whole[0], "parent", whole)
    whole[0].path = [whole]
    whole[0].wrapped = (nn.DataParallel(whole[0]), nn.Sequential(whole[0]))
    teacher = WMATeacher(whole[0], "ema(0.5)")
    assert Block.copies == 1
    own = teacher.module
    assert (own.parent, own.path, own.wrapped[0]) == (None, [None], None)
    assert own.wrapped[1][0] is own


def test_what_is_trained_but_not_registered_is_refused():
    student = plain()
    student.hidden = [nn.Linear(4, 4)]
    with pytest.raises(
        ValueError, match=r"'hidden' holds a tensor of shape \(4,\) that requires grad .*ModuleList"
    ):
        WMATeacher(student, "ema(0.5)")
    student.hidden[0].requires_grad_(False)
    teacher = WMATeacher(student, "ema(0.5)")
    assert torch.equal(teacher.module.hidden[0].weight, student.hidden[0].weight)
    student[3].scales = (torch.ones(3, requires_grad=True),)
    with pytest.raises(ValueError, match="'3.scales' holds a tensor"):
        WMATeacher(student, "ema(0.5)")


def test_large_caches_are_named(monkeypatch):
    student = plain()
    student[0].cache = {"keys": [torch.zeros(1000)] * 2, "values": torch.zeros(1000)}
    student[2].small = torch.zeros(10)
    student.view = student[0].weight.detach()
    WMATeacher(student, "ema(0.5)")
    monkeypatch.setattr("wmateacher.copying._LARGE", 1000)
    with pytest.warns(UserWarning, match=r"plain attributes: '0.cache' \(0 MiB\)\. If") as caught:
        WMATeacher(student, "ema(0.5)")
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_cached_activations_are_copied_wherever_they_are():
    student = plain()
    student.cache = {"last": [student(X)]}
    teacher = WMATeacher(student, "ema(0.5)")
    assert torch.equal(teacher.module.cache["last"][0], student.cache["last"][0])


def test_the_copy_on_another_device_has_views_of_its_own_memory():
    student = plain()
    a_view_in_a_plain_attribute(student)
    teacher = WMATeacher(student, "ema(0.5)", device="cpu", dtype=torch.float64)
    advance(student, teacher)
    check(teacher)
    flat = torch.zeros(8)
    student = nn.Linear(2, 2)
    student.weight.data, student.bias.data, student.flat = flat[:4].view(2, 2), flat[4:6], flat
    with pytest.raises(ValueError, match="'flat' holds the student itself in a Tensor object"):
        WMATeacher(student, "ema(0.5)")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
def test_scripted_submodules_are_refused_by_name(make):
    student = plain()
    student[3][0] = make(student[3][0])
    for options in ({}, {"module_factory": plain}):
        with pytest.raises(TypeError, match=r"the student's '3\.0' must not be a ScriptModule"):
            WMATeacher(student, "ema(0.5)", **options)
    called = plain()
    fast = make(called[3][0])
    called[3].forward = lambda x: fast(x)
    with pytest.raises(ValueError, match=r"'3\.forward' holds the student itself in a .*(Script|Traced)"):
        WMATeacher(called, "ema(0.5)")
    hidden = plain()
    hidden[0].fast = [student[3][0]]
    with pytest.raises(TypeError, match=r"the student's '0\.fast' must not be a ScriptModule"):
        WMATeacher(hidden, "ema(0.5)")


# --- global variables -----------------------------------------------------------------------------------

body = nn.Linear(4, 4)
LAYERS = {"body": body}


def through_body(x):
    return body(x)


def through_an_attribute(model, x):
    return model.body(x)


class Globals(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 4)


class ByName(Globals):
    def forward(self, x):
        return self.head(body(x))


class ByWeight(Globals):
    @torch.no_grad()
    def forward(self, x):
        return self.features(x)

    def features(self, x):
        return self.head(F.linear(x, body.weight)) if x is None else self.head((lambda y: body(y))(x))


class ByFunction(Globals):
    def forward(self, x):
        return self.head(through_body(x))


class ByRegistry(Globals):
    def forward(self, x):
        return self.head(LAYERS["body"](x))


@pytest.mark.parametrize("kind", [ByName, ByWeight, ByFunction, ByRegistry])
def test_a_forward_that_uses_a_part_of_the_student_through_a_global_variable_is_refused(kind):
    name = "LAYERS" if kind is ByRegistry else "body"
    with pytest.raises(ValueError, match=f"{kind.__name__} computes with, uses the global variable '{name}'"):
        WMATeacher(kind(), "ema(0.5)")
    with pytest.raises(ValueError, match=f"such as self.{name}"):
        WMATeacher(nn.Sequential(plain(), kind()), "ema(0.5)")


class ByAttribute(Globals):
    def forward(self, x):
        return self.head(through_an_attribute(self, x) + self.body(x))

    def penalty(self):
        return body.weight.norm()


def test_global_variables_that_forward_does_not_use_are_no_reason_to_refuse():
    student = ByAttribute()
    teacher = WMATeacher(student, "ema(0.5)")
    advance(student, teacher)
    with torch.no_grad():
        expected = teacher.module.head(2 * teacher.module.body(X))
        torch.testing.assert_close(teacher(X), expected)
        assert not torch.allclose(teacher(X), student(X))


# --- what libraries add to a module ----------------------------------------------------------------------


def test_an_exported_module_has_a_teacher_that_computes_with_the_average():
    for build in (plain, lambda: nn.Sequential(plain(), nn.BatchNorm1d(4)).eval()):
        student = torch.export.export(build(), (X,)).module()
        teacher = WMATeacher(student, "ema(0.5)")
        advance(student, teacher)
        check(teacher, build)


def test_outputs_that_a_model_collects_through_hooks_are_the_teachers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    bert = transformers.BertConfig(**sizes, vocab_size=11)
    tokens = torch.arange(6).view(1, 6)
    for kind, config, x in (
        (transformers.ViTModel, vit, torch.randn(1, 3, 16, 16)),
        (transformers.BertModel, bert, tokens),
    ):
        student = kind(config)
        student(x, output_hidden_states=True)  # installs the hooks
        teacher = WMATeacher(student, "ema(0.5)")
        advance(student, teacher)
        fresh = kind(config).eval()
        fresh.load_state_dict(teacher.averaged_state_dict())
        with torch.no_grad():
            expected = fresh(x, output_hidden_states=True).hidden_states
            assert len(expected) == 3
            torch.testing.assert_close(teacher(x, output_hidden_states=True).hidden_states, expected)


# --- a teacher inside its student -----------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, options=None):
        super().__init__()
        self.body = plain()
        self.norm = nn.BatchNorm1d(4)
        self.norm.weight.requires_grad_(False)
        if options is not None:
            self.teacher = WMATeacher(self, "ema(0.5)", **options)
            self.head = nn.Linear(4, 4)
            self.teacher = WMATeacher(self, "ema(0.5)", **options)

    def forward(self, x):
        return self.norm(self.body(x))


def inside(options):
    torch.manual_seed(0)
    student = Net()
    student.teacher = WMATeacher(student, "ema(0.5)", **options)
    return student


def built_inside(options):
    student = Net(options)
    assert set(tensors(student.teacher.module)) == set(tensors(student)) != set(tensors(Net()))
    return student


def in_a_list(options):
    student = inside(options)
    student.teachers = nn.ModuleList([WMATeacher(student, "uniform", **options) for _ in range(2)])
    return student


@pytest.mark.parametrize(
    "options", [{}, {"frozen": "copy", "device": "cpu"}, {"buffers": "average"}], ids=str
)
@pytest.mark.parametrize("build", [inside, built_inside, in_a_list], ids=lambda f: f.__name__)
def test_a_teacher_may_be_a_submodule_of_its_student(build, options):
    student = build(options)
    teacher = student.teacher
    expected = {n: p.detach().clone() for n, p in tensors(student).items()}
    assert not any("teacher" in n for n in expected)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    attachment = teacher.attach(optimizer)
    for _ in range(3):
        (student(X) - teacher(X)).square().mean().add(student(X).mean()).backward()
        optimizer.step()
        for name, value in tensors(student).items():
            if isinstance(value, nn.Parameter):
                expected[name].lerp_(value.detach(), 0.5)
    attachment.remove()
    for name, value in tensors(teacher.module).items():
        if isinstance(value, nn.Parameter):
            torch.testing.assert_close(value.detach(), expected[name])
    student.eval()
    with teacher.swap(), torch.no_grad():
        torch.testing.assert_close(student(X), teacher(X))
        with pytest.raises(RuntimeError, match="state_dict"):
            student.state_dict()
    student.train()
    assert student.training
    assert not teacher.module.training

    state = copy.deepcopy(student.state_dict())
    again = build(options)
    advance(again, again.teacher)
    again.load_state_dict(state)
    assert again.teacher.step == teacher.step == 3
    for name, value in student.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(again.state_dict()[name], value), name
    other = build(options)
    teacher.copy_to(other)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), teacher(X))

    assert pickle.loads(pickle.dumps(student)).teacher.step == 3
    twin = copy.deepcopy(student)
    assert twin.teacher.student is twin
    student.double()
    assert teacher(X.double()).dtype is torch.float64
    teacher.update()
    assert (teacher.step, twin.teacher.step) == (4, 3)
    twin.teacher.update()


def test_a_second_teacher_has_no_copy_of_the_first():
    student = inside({})
    student.held = [student.teacher]
    second = WMATeacher(student, "ema(0.5)")
    assert second.module.teacher is None
    assert second.module.held == [None]
    assert set(tensors(second.module)) == set(tensors(Net()))
    advance(student, second)
    assert set(second.averaged_state_dict()) == set(Net().state_dict())
    with pytest.raises(TypeError, match="model must be the student, got a WMATeacher"):
        WMATeacher(second, "ema(0.5)")
