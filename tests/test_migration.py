"""Each peer averages for a while, and goes on beside a teacher that took over its state."""

import copy
import re
from pathlib import Path
from types import MappingProxyType

import ema_pytorch
import pytest
import timm.utils
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wmateacher import WMATeacher, migration
from wmateacher.migration import PeerEMA

BEFORE, AFTER = 7, 9
GUIDES = Path(__file__).parents[1] / "docs/guides/migration"
PAGES = sorted(page for page in GUIDES.glob("*.md") if page.stem not in ("lightning", "trl"))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


def step(net):
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


class Torch:
    kernel, decay = "ema(0.9)", 0.9

    def __init__(self, net):
        self.peer = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def update(self, net, count):
        self.peer.update_parameters(net)

    def state(self):
        return self.peer.state_dict()

    def weights(self, net):
        return dict(self.peer.module.named_parameters())


class Swa(Torch):
    kernel = "uniform"

    def __init__(self, net):
        self.peer = AveragedModel(net)


class EmaPytorch(Torch):
    every = 1
    kernel = PeerEMA(0.9, "inverse_gamma", delay=3)

    def __init__(self, net):
        self.peer = ema_pytorch.EMA(net, beta=0.9, update_every=self.every, update_after_step=3)

    def update(self, net, count):
        self.peer.update()

    def weights(self, net):
        return dict(self.peer.ema_model.named_parameters())


class EmaPytorchEveryThird(EmaPytorch):
    every = 3
    kernel = PeerEMA(0.9, "inverse_gamma", delay=3, every=3)


class Diffusers(Torch):
    kernel = None
    options = MappingProxyType({"decay": 0.8})

    def __init__(self, net):
        self.peer = EMAModel(net.parameters(), **self.options)

    def update(self, net, count):
        self.peer.step(net.parameters())

    def weights(self, net):
        return dict(zip(dict(net.named_parameters()), self.peer.shadow_params, strict=True))


class DiffusersWarmUp(Diffusers):
    options = MappingProxyType(
        {"decay": 0.8, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "update_after_step": 2}
    )


class TorchEma(Torch):
    kernel = None
    counts = True

    def __init__(self, net):
        self.peer = torch_ema.ExponentialMovingAverage(net.parameters(), 0.6, use_num_updates=self.counts)

    def update(self, net, count):
        self.peer.update()

    def weights(self, net):
        return dict(zip(dict(net.named_parameters()), self.peer.shadow_params, strict=True))


class TorchEmaConstant(TorchEma):
    counts = False


class Timm(Torch):
    kernel = PeerEMA(0.9, "inverse_gamma", gamma=2.0, power=0.75, delay=2, least=0.3)

    def __init__(self, net):
        self.peer = timm.utils.ModelEmaV3(
            net, 0.9, min_decay=0.3, update_after_step=2, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75
        )

    def update(self, net, count):
        self.peer.update(net, step=count)

    def state(self):
        return {"state_dict": {}, "state_dict_ema": self.peer.module.state_dict()}


PEERS = [
    Torch, Swa, EmaPytorch, EmaPytorchEveryThird, Diffusers, DiffusersWarmUp, TorchEma, TorchEmaConstant, Timm,
]  # fmt: skip


@pytest.mark.parametrize("kind", PEERS)
def test_a_teacher_goes_on_as_the_peer_would(kind):
    net = network()
    peer = kind(net)
    for count in range(1, BEFORE + 1):
        step(net)
        peer.update(net, count)
    state = copy.deepcopy(peer.state())
    described = migration.describe(state)
    teacher = WMATeacher(net, kind.kernel or described.kernel, frozen="copy")
    assert migration.load(teacher, state, None if described.step is not None else BEFORE) == described
    for count in range(BEFORE + 1, BEFORE + AFTER + 1):
        theirs, ours = peer.weights(net), dict(teacher.module.named_parameters())
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name].detach(), weight.detach(), rtol=1e-5, atol=1e-6)
        step(net)
        peer.update(net, count)
        teacher.update()


@pytest.mark.parametrize(
    ("kind", "options", "kernel"),
    [
        (Torch, None, "ema(0.9,start_step=4)"),
        (Swa, None, "uniform(start_step=4)"),
        (Timm, {"update_after_step": 3}, "ema(0.9,start_step=4)"),
        (EmaPytorch, {"update_after_step": 3, "update_every": 1}, PeerEMA(0.9, "inverse_gamma", delay=3)),
        (EmaPytorch, {"update_after_step": 3, "update_every": 1, "min_value": 0.9}, "ema(0.9,start_step=4)"),
        (Diffusers, {"update_after_step": 3}, PeerEMA(0.9, "ratio", delay=3)),
        (Diffusers, {"update_after_step": 3, "min_decay": 0.9}, "ema(0.9,start_step=4)"),
    ],
)
def test_a_peers_late_start_is_a_kernel(kind, options, kernel):
    """Until then timm, ema-pytorch and diffusers have the student, as here; torch still has the start."""
    net = network()
    peer = kind(net)
    if kind is Timm:
        peer.peer = timm.utils.ModelEmaV3(net, 0.9, **options)
    elif kind is EmaPytorch:
        peer.peer = ema_pytorch.EMA(net, beta=0.9, **options)
    elif kind is Diffusers:
        peer.peer = EMAModel(net.parameters(), decay=0.9, **options)
    teacher = WMATeacher(net, kernel, frozen="copy")
    for count in range(1, 25):
        step(net)
        teacher.update()
        if options is not None or count >= 4:
            peer.update(net, count)
            ours = dict(teacher.module.named_parameters())
            for name, weight in peer.weights(net).items():
                torch.testing.assert_close(ours[name].detach(), weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_librarys_page_runs_both_averages_and_they_are_equal(page):
    """The pages end in comparisons, and a call that a library does not have fails."""
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    torch.manual_seed(0)
    assert "torch.testing.assert_close(" in block
    exec(block, {})


@pytest.mark.parametrize("kind", [TorchEmaConstant, Timm])
def test_a_state_without_a_clock_asks_for_it(kind):
    net = network()
    peer = kind(net)
    peer.update(net, 1)
    described = migration.describe(peer.state())
    assert described.step is None
    message = f"{described.source} does not say how many steps .*pass step=..., the number of opt"
    with pytest.raises(ValueError, match=message):
        migration.load(WMATeacher(net, "ema(0.9)"), peer.state())


def test_another_kernel_keeps_the_average_and_gives_it_the_mass_of_the_steps_so_far():
    net, total = network(), 20
    before = {k: torch.randn_like(v) for k, v in net.state_dict().items()}
    teacher = WMATeacher(net, "beta(0.5,0.5)", total, frozen="copy")
    teacher.load_average(before, 12)
    assert teacher.step == 12
    states = []
    for _ in range(8):
        step(net)
        states.append({k: v.clone().double() for k, v in net.state_dict().items()})
        teacher.update()
    profile = torch.from_numpy(teacher.kernel.profile(total))
    for name, value in teacher.averaged_state_dict().items():
        later = sum(w * s[name] for w, s in zip(profile[13:], states, strict=True))
        expected = profile[:13].sum() * before[name].double() + later
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    again = WMATeacher(net, "beta(0.5,0.5)", total, frozen="copy")
    again.load_state_dict(teacher.state_dict())
    assert again.step == 20


def test_a_bfloat16_teacher_takes_the_average_at_full_precision():
    net = network().to(torch.bfloat16)
    precise = {k: torch.randn(v.shape) for k, v in net.state_dict().items()}
    for dtype in ("auto", "split"):
        teacher = WMATeacher(net, "ema(0.9)", dtype=dtype, frozen="copy")
        teacher.load_average(precise, 3)
        taken = teacher.averaged_state_dict(torch.float32)
        assert all(torch.equal(taken[k], v) for k, v in precise.items() if k != "0.bias")


def test_older_torch_ema_leaves_out_what_is_frozen():
    net = network()
    shadows = [p.detach() + 1 for p in net.parameters() if p.requires_grad]
    state = {"decay": 0.9, "num_updates": 3, "shadow_params": shadows, "collected_params": None}
    teacher = WMATeacher(net, migration.describe(state).kernel)
    assert migration.load(teacher, state).step == teacher.step == 3
    assert torch.equal(teacher.module[0].weight, net[0].weight + 1)
    assert torch.equal(teacher.module[0].bias, net[0].bias)
    assert torch.equal(teacher.module[1].bias, net[1].bias + 1)


def test_buffers_may_be_missing():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = WMATeacher(net, "ema(0.9)", buffers="average")
    teacher.load_average({n: p + 1 for n, p in net.named_parameters()}, 4)
    assert torch.equal(teacher.module[0].weight, net[0].weight + 1)
    assert torch.equal(teacher.module[1].running_var, net[1].running_var)
    teacher.update()
    assert teacher.step == 5


@pytest.mark.parametrize(
    ("change", "step_", "message"),
    [
        (lambda s: s.pop("0.weight"), 3, "average is of another architecture: missing '0.weight'"),
        (lambda s: s.update(extra=torch.zeros(1)), 3, "another architecture: unexpected 'extra'"),
        (
            lambda s: s.update({"0.weight": torch.zeros(2, 2)}),
            3,
            r"'0.weight' has shape \(2, 2\) there and \(4, 3\)",
        ),
        (lambda s: None, 21, "step must be at most total_steps=20, got 21"),
        (lambda s: None, -1, "step must be a whole number of at least 0, got -1"),
        (lambda s: None, None, "step must be a whole number of at least 0, got None"),
        (lambda s: None, 0.0, "step must be a whole number of at least 0, got 0.0"),
        (lambda s: None, False, "step must be a whole number of at least 0, got False"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, step_, message):
    net = network()
    teacher = WMATeacher(net, total_steps=20, frozen="copy")
    before = copy.deepcopy(teacher.state_dict())
    average = {k: v + 1 for k, v in net.state_dict().items()}
    change(average)
    with pytest.raises(ValueError, match=message):
        teacher.load_average(average, step_)
    after = teacher.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))
    assert after["_extra_state"] == before["_extra_state"]
    with teacher.swap(), pytest.raises(RuntimeError, match=r"inside swap\(\)"):
        teacher.load_average(net.state_dict(), 3)


def test_unknown_states_and_nameless_weights_of_another_model():
    net = network()
    with pytest.raises(
        ValueError, match="a state with 'epoch' belongs to none of the known libraries .diffusers, "
    ):
        migration.load(WMATeacher(net, "ema(0.9)"), {"epoch": 3})
    peer = Diffusers(net)
    with pytest.raises(
        ValueError, match=r"diffusers is of another architecture: .* place of 'weight' has shape"
    ):
        migration.load(WMATeacher(nn.Linear(5, 5), "ema(0.9)"), peer.state())
    with pytest.raises(ValueError, match="it has 4 weights, the model 2; build the teacher from the model"):
        migration.load(WMATeacher(net[0], "ema(0.9)"), peer.state())


def test_an_average_that_was_never_updated_is_refused():
    net = network()
    state = AveragedModel(net).state_dict()
    lightning = {"state_dict": net.state_dict(), "averaging_state": {"n_averaged": torch.tensor(0)}}
    for source, content in (("torch", state), ("lightning", lightning)):
        for read in (migration.describe, lambda s: migration.load(WMATeacher(net, "ema(0.9)"), s, step=3)):
            with pytest.raises(ValueError, match=f"the state of {source} has averaged nothing yet: build"):
                read(content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay must be a retention in \[0, 1\], got 1.5"),
        ({"decay": 0.9, "rule": "ratios"}, "unknown rule 'ratios'; did you mean 'ratio'"),
        ({"decay": True}, r"decay must be a retention in \[0, 1\], got True"),
        ({"decay": 0.9, "gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"decay": 0.9, "power": float("inf")}, "power must be a finite number above 0, got inf"),
        ({"decay": 0.9, "delay": 2.5}, "delay must be a whole number of optimizer steps, got 2.5"),
        ({"decay": 0.9, "delay": 1e30}, "delay must be a whole number of optimizer steps, got 1e.30"),
        ({"decay": 0.9, "delay": True}, "delay must be a whole number of optimizer steps, got True"),
        ({"decay": 0.9, "every": 0}, "every must be a whole number of at least 1, got 0"),
    ],
)
def test_a_rule_out_of_range_says_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        PeerEMA(**arguments)


@given(
    decay=st.floats(0, 1), rule=st.sampled_from(["constant", "inverse_gamma", "ratio"]),
    least=st.floats(0, 1), delay=st.integers(-2, 50), every=st.integers(1, 9), total=st.integers(1, 60),
)  # fmt: skip
def test_weights_are_a_distribution(decay, rule, least, delay, every, total):
    profile = PeerEMA(decay, rule, least=least, delay=delay, every=every).profile(total)
    assert (profile >= 0).all()
    assert profile.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("layers", [1, 40])
def test_loading_an_average_looks_the_state_up_once_however_many_tensors_there_are(layers, monkeypatch):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    teacher, average, calls = WMATeacher(net, "ema(0.9)"), net.state_dict(), []
    monkeypatch.setattr(
        nn.Sequential, "state_dict", lambda *a, **k: calls.append(0) or nn.Module.state_dict(*a, **k)
    )
    teacher.load_average(average, 3)
    assert len(calls) == 1
