import importlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import oracle
import pytest
import scipy.integrate
import torch
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher, kernels, posthoc
from wmateacher.files import load, read_metadata, save
from wmateacher.posthoc import Recorder, average_checkpoints, interpolate, model_stock, synthesise
from wmateacher.posthoc.recorder import _gathered
from wmateacher.posthoc.snapshots import read_header, snapshot_files, step_of
from wmateacher.posthoc.synthesis import solve

TOTAL = 120


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.Linear(4, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Run:
    """A small training run, the same every time."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(1)
        self.dtype, self.k = dtype, 0
        self.student = Net(dtype)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.02)

    def step(self):
        self.k += 1
        noise = torch.Generator().manual_seed(self.k)
        x = torch.randn(16, 4, generator=noise, dtype=self.dtype)
        F.cross_entropy(self.student(x), (x[:, 0] > 0).long()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved(self):
        return saved({"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()})

    def restore(self, state, k):
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.k = k


def saved(state):
    """A state after a round trip through a file, loaded without unpickling code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def one_hot(k, states=TOTAL + 1):
    return {"w": torch.eye(states, dtype=torch.float64)[k]}


def flat(state, names):
    return torch.cat([state[n].flatten().double() for n in names])


def record(folder, length=TOTAL, dtype=torch.float64, each=lambda run: None, **options):
    run = Run(dtype)
    plan = {} if "steps" in options else {"every": 10}
    recorder = Recorder(run.student, TOTAL, folder=folder, **plan | options)
    for _ in range(length):
        run.step()
        recorder.update()
        each(run)
    return run, recorder


def checkpoints(count, dtype=torch.float32):
    """State dicts with a matrix, a scalar, a counter and a mask."""
    return [
        {
            "w": torch.randn(5, 3).to(dtype),
            "scale": torch.randn(()).to(dtype),
            "steps": torch.tensor(i),
            "mask": torch.tensor([i % 2 == 0, True]),
            "odd": torch.randn(3, 5).to(dtype).T,
        }
        for i in range(count)
    ]


def on_disk(states, folder, suffix):
    for i, state in enumerate(states):
        save(state, folder / f"{i:02d}{suffix}")
    return sorted(folder.glob(f"*{suffix}"))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# --- EDM2's formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.15, 0.28])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel):
    """Karras et al. 2024, eq. 123 and 126: of t^gamma on [0, 1]."""
    gamma = kernels.Power(sigma_rel=sigma_rel).gamma

    def moment(n):
        return scipy.integrate.quad(lambda t: (gamma + 1) * t ** (gamma + n), 0, 1, epsabs=1e-13)[0]

    assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(sigma_rel, abs=1e-9)
    assert (gamma + 1) / (gamma + 2) ** 2 / (gamma + 3) == pytest.approx(sigma_rel**2, abs=1e-12)
    assert gamma == pytest.approx(oracle.power_gamma(sigma_rel), rel=1e-9)


def power_inner_product(t_a, gamma_a, t_b, gamma_b):
    """Of two profiles `(gamma + 1) t^gamma / t_end^(gamma + 1)` on [0, t_end] (eq. 151).

    Up to the earlier end, both are powers: the integral of t^(gamma_a + gamma_b) there, which leaves the
    ratio of the ends to the power of the gamma of the profile with the *later* end.
    """
    (early, gamma_early), (late, gamma_late) = sorted([(t_a, gamma_a), (t_b, gamma_b)])
    ratio = (early / late) ** gamma_late
    return (gamma_early + 1) * (gamma_late + 1) * ratio / ((gamma_early + gamma_late + 1) * late)


@pytest.mark.parametrize(
    ("a", "b"), [*itertools.combinations([(1.0, 0.05), (0.7, 0.05), (0.7, 0.28), (2.0, 0.1), (0.3, 0.2)], 2)]
)
def test_inner_product_of_two_power_profiles(a, b):
    (t_a, s_a), (t_b, s_b) = a, b
    g_a, g_b = (kernels.Power(sigma_rel=s).gamma for s in (s_a, s_b))

    def product(t):
        return (g_a + 1) * (t / t_a) ** g_a / t_a * (g_b + 1) * (t / t_b) ** g_b / t_b

    integral = scipy.integrate.quad(product, 0, min(t_a, t_b), epsabs=1e-14, epsrel=1e-13)[0]
    assert power_inner_product(t_a, g_a, t_b, g_b) == pytest.approx(integral, rel=1e-9)


def test_realised_weights_approach_the_continuous_inner_product():
    """What `solve` uses instead is exact for steps; over many steps the two agree."""
    total, s_a, s_b, t_a = 20_000, 0.05, 0.28, 0.6
    p, q = (kernels.Power(sigma_rel=s).profile(n) for s, n in ((s_a, int(t_a * total)), (s_b, total)))
    exact = power_inner_product(
        t_a, *(kernels.Power(sigma_rel=s_a).gamma,), 1.0, kernels.Power(sigma_rel=s_b).gamma
    )
    assert p @ q[: len(p)] * total == pytest.approx(exact, rel=1e-3)


# --- recording and synthesis --------------------------------------------------------------------------


def test_snapshots_hold_the_averages_and_their_exact_weights(tmp_path):
    directs = [WMATeacher(Run(torch.float64).student, f"power(sigma_rel={s})") for s in (0.05, 0.28)]
    kept = {}

    def each(run):
        for direct in directs:
            direct.update(run.student)
            kept[run.k, str(direct.kernel)] = (direct.averaged_state_dict(), direct.trajectory_weights())

    record(tmp_path, each=each)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + 2 * 12  # the start is one file, whatever the number of kernels
    for file in files[1:]:
        clock = read_header(file).clock
        state, weights = kept[clock.step, str(clock.kernel)]
        assert_equal(load(file), state)
        np.testing.assert_array_equal(clock.trajectory_weights(), weights)


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_a_recorded_kernel_comes_back_exactly(tmp_path, format, update_every):
    direct = WMATeacher(Run(torch.float32).student, "power(sigma_rel=0.1)", TOTAL, update_every=update_every)
    options = {"sigma_rels": (0.05, 0.1, 0.28), "format": format, "update_every": update_every}
    record(tmp_path, dtype=torch.float32, each=lambda run: direct.update(run.student), **options)
    state, report = synthesise(tmp_path, "power(sigma_rel=0.1)")
    assert_equal(state, direct.averaged_state_dict())
    assert (report.relative_error, report.l1_error, report.weight_sum) == (0, 0, pytest.approx(1, abs=1e-12))
    assert sorted(report.coefficients)[-1] == 1
    assert report.amplification == 1


@pytest.mark.parametrize("kernel", ["beta(0.5,0.5)", "uniform", "ema(0.9)", "static"])
@pytest.mark.parametrize("update_every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_synthesised_average_is_as_close_as_its_report_says(tmp_path, kernel, update_every):
    direct = WMATeacher(Run(torch.float64).student, kernel, TOTAL, update_every=update_every)
    trajectory = [flat(Run(torch.float64).student.state_dict(), ["body.weight", "head.weight"])]

    def each(run):
        direct.update(run.student)
        trajectory.append(flat(run.student.state_dict(), ["body.weight", "head.weight"]))

    record(tmp_path, each=each, every=4, update_every=update_every)
    state, report = synthesise(tmp_path, kernel, TOTAL)
    expected = direct.averaged_state_dict()
    assert state.keys() == expected.keys()
    if kernel != "static":  # whose teacher never looks at the student again
        for name in ("norm.running_mean", "norm.num_batches_tracked"):  # copied, not averaged
            assert torch.equal(state[name], expected[name])

    weights = oracle.realised(kernel, TOTAL, update_every, TOTAL)
    np.testing.assert_allclose(report.target, weights, atol=1e-12)
    assert report.l1_error == pytest.approx(abs(report.weights - weights).sum(), abs=1e-9)
    assert report.relative_error < 0.3
    assert report.l1_error < 0.1
    assert report.weight_sum == pytest.approx(1, abs=1e-12)

    states = torch.stack(trajectory)
    synthesised = flat(state, ["body.weight", "head.weight"])
    by_report = torch.from_numpy(report.weights) @ states
    torch.testing.assert_close(synthesised, by_report, rtol=0, atol=1e-9)
    error = (synthesised - flat(expected, ["body.weight", "head.weight"])).norm()
    spread = (states - states.mean(0)).norm(dim=1).max()
    assert error <= report.l1_error * spread + 1e-9
    # As close as said, and closer than any plain snapshot or state.
    assert kernel == "static" or error < 0.2 * (states - torch.tensor(weights) @ states).norm(dim=1).min()


def test_an_average_in_the_middle_of_the_run(tmp_path):
    record(tmp_path, every=4)
    _, report = synthesise(tmp_path, "beta(0.5,0.5)", TOTAL, step=60)
    np.testing.assert_allclose(report.target[:61], oracle.realised("beta(0.5,0.5)", TOTAL, 1, 60), atol=1e-12)
    assert not report.target[61:].any()
    assert report.l1_error < 0.1
    _, part = synthesise(sorted(tmp_path.glob("step-*"))[:15], "uniform", step=28)
    assert (len(part.files), len(part.weights), part.total_steps) == (15, 29, TOTAL)
    assert part.l1_error < 0.1


def test_the_horizon_is_the_last_step_where_the_run_had_none(tmp_path):
    run = Run()
    recorder = Recorder(run.student, folder=tmp_path, every=8)
    for _ in range(30):
        run.step()
        recorder.update()
    assert [f.name for f in recorder.save()] == [f"step-000000030-power-{s}.pt" for s in (0.05, 0.28)]
    _, report = synthesise(tmp_path, "uniform", output=tmp_path / "uniform.pt")
    assert (report.step, report.total_steps) == (30, 30)
    assert "uniform at step 30 of 30, from 9 snapshots" in str(report)
    assert_equal(load(tmp_path / "uniform.pt"), synthesise(tmp_path, "uniform")[0])


def test_the_ridge_bounds_the_coefficients():
    total, marks = 20_030, [*range(0, 20_001, 400), 20_030]  # two that nearly coincide
    profiles = [kernels.Power(sigma_rel=s).profile(m) for s in (0.05, 0.28) for m in marks if m]
    profiles = np.stack([np.append(p, np.zeros(total + 1 - len(p))) for p in profiles], axis=1)
    target = kernels.build("beta(0.5,0.5)").profile(total)
    free, bound = solve(profiles, target), solve(profiles, target, 1e-5)
    assert free.sum() == pytest.approx(1, abs=1e-9)
    assert bound.sum() == pytest.approx(1, abs=1e-12)
    assert abs(free).sum() > 1000
    assert abs(bound).sum() < 200
    assert abs(profiles @ bound - target).sum() < 0.01 + abs(profiles @ free - target).sum()
    # The plain normal equations, where they are well enough conditioned to be solved.
    few = profiles[:, [10, 30, 49, 60, 98]]
    c = np.linalg.solve(
        np.block([[few.T @ few, np.ones((5, 1))], [np.ones((1, 5)), np.zeros((1, 1))]]),
        np.append(few.T @ target, 1),
    )[:5]
    np.testing.assert_allclose(solve(few, target), c, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_are_what_the_teacher_makes_of_them(tmp_path, buffers):
    direct = WMATeacher(Run(torch.float64).student, "uniform", TOTAL, buffers=buffers)
    record(tmp_path, each=lambda run: direct.update(run.student), buffers=buffers, every=4)
    state, _ = synthesise(tmp_path, "uniform")
    expected = direct.averaged_state_dict()["norm.running_mean"]
    tolerance = 0 if buffers == "copy" else 2e-3
    torch.testing.assert_close(state["norm.running_mean"], expected, rtol=0, atol=tolerance)
    assert ("norm.running_mean" in read_header(next(tmp_path.iterdir())).averaged) == (buffers == "average")


def test_frozen_and_tied_parameters_and_bf16(tmp_path):
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    ).bfloat16()
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    recorder = Recorder(model, 4, folder=tmp_path, every=2, format="safetensors")
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 3).bfloat16())
        recorder.update()
    state, _ = synthesise(tmp_path, "uniform")
    assert set(state) == {"0.weight", "1.weight"}
    assert state["0.weight"].dtype == torch.float32  # the average's precision
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert model.load_state_dict(state, strict=False).missing_keys == ["2.weight", "2.bias"]


def test_the_plan(tmp_path):
    def written(**plan):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        record(folder, **plan)
        return sorted({step_of(f) for f in folder.iterdir()})

    assert written(every=50) == [0, 50, 100, 120]
    assert written(steps=[3, 7, 119]) == [3, 7, 119]
    assert written(every=10, keep=7) == [0, 20, 40, 60, 80, 100, 120]
    assert written(every=50, keep=3) == [0, 100, 120]
    assert written(steps=[3, 7, 50, 119], keep=3) == [3, 50, 119]


@pytest.mark.parametrize("keep", [2, 3, 8])
@pytest.mark.parametrize(("total", "every"), [(40, 1), (100, 7)])
def test_thinning_keeps_an_even_set_of_bounded_size(tmp_path, keep, total, every):
    recorder, counts = Recorder(nn.Linear(1, 1), total, folder=tmp_path, every=every, keep=keep), []
    for _ in range(total):
        recorder.update()
        counts.append(len({step_of(f) for f in tmp_path.iterdir()}))
    left = sorted({step_of(f) for f in tmp_path.iterdir()})
    assert max(counts) <= keep
    assert min(counts[every * keep :]) > keep // 2
    assert (left[0], left[-1]) == (0, total)
    assert len(set(np.diff(left)[:-1])) <= 1
    assert len(list(tmp_path.iterdir())) == 2 * len(left) - 1
    assert synthesise(tmp_path, "uniform")[1].weight_sum == pytest.approx(1)


@pytest.mark.parametrize("keep", [None, 5])
def test_a_resumed_recording_equals_an_uninterrupted_one(tmp_path, keep):
    record(tmp_path / "whole", keep=keep)

    at_checkpoint = {}

    def each(run):
        if run.k == 47:
            at_checkpoint.update(run=run.saved())

    run = Run(torch.float64)
    recorder = Recorder(run.student, TOTAL, folder=tmp_path / "cut", every=10, keep=keep)
    for _ in range(83):  # killed here; the checkpoint is of step 47
        run.step()
        recorder.update()
        each(run)
        if run.k == 47:
            at_checkpoint.update(recorder=saved(recorder.state_dict()))

    run = Run(torch.float64)
    run.restore(at_checkpoint["run"], 47)
    recorder = Recorder(run.student, TOTAL, folder=tmp_path / "cut", every=10, keep=keep)
    recorder.load_state_dict(at_checkpoint["recorder"])
    names = set(os.listdir(tmp_path / "cut"))
    assert max(map(step_of, (tmp_path / "cut").iterdir())) == 80
    run.step()
    recorder.update()
    later = {n for n in names if int(n.split("-")[1]) > 47}
    assert later
    assert set(os.listdir(tmp_path / "cut")) == names - later
    for _ in range(TOTAL - 48):
        run.step()
        recorder.update()

    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "cut").iterdir()}
    for file in (tmp_path / "whole").iterdir():
        assert_equal(load(file), load(tmp_path / "cut" / file.name))
        assert read_metadata(file) == read_metadata(tmp_path / "cut" / file.name)


def test_the_clock_past_the_horizon_writes_nothing_more(tmp_path):
    run, recorder = record(tmp_path, every=50)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match="finished"):
        recorder.update()
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files
    recorder.set_total_steps(200)
    for _ in range(80):
        recorder.update(run.student)
    assert {step_of(f) for f in tmp_path.iterdir()} == {0, 50, 100, 120, 150, 200}
    assert synthesise(tmp_path, "power(sigma_rel=0.05)")[1].l1_error == 0


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    save({"w": torch.ones(3)}, file)

    def killed(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save({"w": torch.zeros(3)}, file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert load(file)["w"].sum() == 3
    # A kill leaves the partial file, which is no snapshot.
    (tmp_path / "step-000000010-power-0.05.pt.0123abcd.partial").write_bytes(b"half")
    assert snapshot_files(tmp_path) == []


def test_a_sharded_student_is_gathered_and_rank_0_writes(tmp_path, monkeypatch):
    distributed = torch.distributed
    tensor = importlib.import_module("torch.distributed.tensor")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        whole = torch.randn(4, 3)
        parts = tensor.distribute_tensor(whole, mesh, [tensor.Shard(0)])
        assert type(_gathered(parts)) is torch.Tensor
        assert torch.equal(_gathered(parts), whole)
        monkeypatch.setattr(distributed, "get_rank", lambda: 1)
        record(tmp_path / "rank1", length=20)
        assert not (tmp_path / "rank1").exists()
    finally:
        distributed.destroy_process_group()


# --- saved checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 7, 50])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_checkpoints_at_the_snapshots_give_the_teacher(kernel, every):
    marks = oracle.snapshots(TOTAL, every)
    average = average_checkpoints([one_hot(k) for k in marks], kernel, steps=marks)
    np.testing.assert_allclose(average["w"], oracle.realised(kernel, TOTAL, every, TOTAL), atol=1e-12)


def test_each_checkpoint_stands_for_the_nearest_steps():
    marks, total = [3, 4, 9, 30], 41
    weights = oracle.step_weights("beta(0.2,0.7)", total)
    expected = np.zeros(4)
    for j, w in enumerate(weights):
        expected[min(range(4), key=lambda i: (abs(marks[i] - j), -i))] += w
    np.testing.assert_allclose(
        posthoc.checkpoint_weights("beta(0.2,0.7)", 4, marks, total), expected, atol=1e-12
    )
    np.testing.assert_allclose(posthoc.checkpoint_weights("uniform", 5), np.full(5, 0.2))
    np.testing.assert_allclose(posthoc.checkpoint_weights("arcsine", 5), oracle.step_weights("arcsine", 4))
    assert posthoc.checkpoint_weights("beta(0.5,0.5)", 1) == [1]


@pytest.mark.parametrize("suffix", [None, ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_averages_against_plain_sums(tmp_path, suffix, dtype):
    states = checkpoints(4, dtype)
    sources = states if suffix is None else on_disk(states, tmp_path, suffix)
    # Rows and pieces of odd sizes, as large tensors are read.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmateacher.posthoc.combining._PIECE", 4)
        patch.setattr("wmateacher.posthoc.combining._LEAST_BYTES", 20)
        results = {
            "average": average_checkpoints(sources, "beta(0.5,0.5)"),
            "wise": interpolate(sources[0], sources[1], 0.3),
            "stock": model_stock(sources[0], sources[1:]),
        }
    counts = oracle.step_weights("beta(0.5,0.5)", 3)
    for name in ("w", "scale", "odd"):
        x = [s[name].double() for s in states]
        d = [(v - x[0]).flatten() for v in x[1:]]
        cosine = np.mean([F.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(d, 2)])
        cosine = max(cosine, 0)
        t = 3 * cosine / (1 + 2 * cosine)
        expected = {
            "average": sum(c * v for c, v in zip(counts, x, strict=True)),
            "wise": 0.7 * x[0] + 0.3 * x[1],
            "stock": t * (x[1] + x[2] + x[3]) / 3 + (1 - t) * x[0],
        }
        for how, state in results.items():
            assert state[name].dtype == dtype
            close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
            torch.testing.assert_close(state[name], expected[how].to(dtype), **close)
    for how, last in (("average", 3), ("wise", 1), ("stock", 3)):
        assert results[how]["steps"] == last
        assert torch.equal(results[how]["mask"], states[last]["mask"])
    assert results["average"]["odd"].is_contiguous()


def test_the_ends_and_equal_checkpoints_are_exact():
    a, b = checkpoints(2)
    assert_equal(interpolate(a, b, 0.0), {**a, "steps": b["steps"], "mask": b["mask"]})
    assert_equal(interpolate(a, b, 1.0), b)
    assert_equal(average_checkpoints([a, a, a, a, a], "beta(0.5,0.5)"), a)
    assert_equal(average_checkpoints([a, b], "tail(0.5)"), b)
    broken = {**a, "w": torch.full((5, 3), torch.nan)}
    assert_equal(interpolate(broken, b, 1.0), b)  # what counts 0 is not read
    assert average_checkpoints([a], "arcsine")["w"].data_ptr() != a["w"].data_ptr()


def test_model_stock_ratios():
    start = {"w": torch.zeros(4), "b": torch.zeros(2), "still": torch.ones(3), "s": torch.tensor(1.0)}
    e = torch.eye(4)
    near = {"w": e[0] + e[1], "b": torch.tensor([1.0, 0]), "still": torch.ones(3), "s": torch.tensor(2.0)}
    far = {"w": e[0] + e[2], "b": torch.tensor([-1.0, 0]), "still": torch.ones(3), "s": torch.tensor(5.0)}
    ratios = posthoc.model_stock_ratios(start, [near, far])
    # cos = 1/2 gives 2 cos / (1 + cos) = 2/3; opposite moves stay at the start, parallel ones go all the way.
    assert ratios == {"w": pytest.approx(2 / 3), "b": 0.0, "still": 0.0, "s": pytest.approx(1.0)}
    merged = model_stock(start, [near, far])
    torch.testing.assert_close(merged["w"], 2 / 3 * (e[0] + (e[1] + e[2]) / 2))
    assert torch.equal(merged["b"], start["b"])
    assert torch.equal(merged["still"], start["still"])
    torch.testing.assert_close(merged["s"], torch.tensor(3.5))


def test_model_stock_finds_the_point_nearest_to_the_centre():
    """Its derivation: fine-tuned weights scattered evenly around a centre, in many dimensions."""
    size, count = 100_000, 4
    start, centre = torch.zeros(size), torch.randn(size)
    tuned = [{"w": centre + 0.7 * torch.randn(size)} for _ in range(count)]
    merged = model_stock({"w": start}, tuned)["w"]
    mean = torch.stack([t["w"] for t in tuned]).mean(0)
    best = centre @ mean / (mean @ mean)
    ratio = posthoc.model_stock_ratios({"w": start}, tuned)["w"]
    assert ratio == pytest.approx(float(best), abs=0.005)
    assert (merged - centre).norm() < (mean - centre).norm()


def test_complex_tensors():
    a, b, c = ({"w": torch.randn(6, dtype=torch.complex64)} for _ in range(3))
    torch.testing.assert_close(average_checkpoints([a, b])["w"], (a["w"] + b["w"]) / 2)
    real = [{"w": torch.view_as_real(s["w"]).flatten()} for s in (a, b, c)]
    ratio = posthoc.model_stock_ratios(a, [b, c])["w"]
    assert ratio == pytest.approx(posthoc.model_stock_ratios(real[0], real[1:])["w"])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_outputs_are_what_is_returned(tmp_path, suffix):
    a, b, c = checkpoints(3)
    for i, make in enumerate(
        (
            lambda out: average_checkpoints([a, b, c], output=out),
            lambda out: interpolate(a, b, 0.5, output=out),
            lambda out: model_stock(a, [b, c], output=out),
        )
    ):
        out = tmp_path / "new" / f"{i}{suffix}"
        assert_equal(load(out) if (made := make(out)) is None else made, load(out))
    if suffix == ".safetensors":
        safetensors = importlib.import_module("safetensors.torch")
        assert safetensors.load_file(tmp_path / "new" / "0.safetensors").keys() == a.keys()


def test_a_file_may_be_replaced_by_its_own_average(tmp_path):
    a, b = checkpoints(2)
    files = on_disk([a, b], tmp_path, ".pt")
    expected = average_checkpoints([a, b])
    average_checkpoints(files, output=files[1])
    assert_equal(load(files[1]), expected)


def test_state_dicts_inside_files(tmp_path):
    a, b = checkpoints(2)
    torch.save({"epoch": 3, "state_dict": a, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "a.pt")
    assert_equal(load(tmp_path / "a.pt"), a)
    assert_equal(interpolate(tmp_path / "a.pt", b, 1.0), b)
    torch.save({"state_dict": a, "state_dict_ema": b}, tmp_path / "two.pt")
    assert_equal(load(tmp_path / "two.pt", key="state_dict_ema"), b)
    teacher = WMATeacher(nn.Linear(2, 2), "uniform")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    assert "_extra_state" in load(tmp_path / "teacher.pt")


# --- bad input ----------------------------------------------------------------------------------------


def bad_recorder(**options):
    return lambda folder: Recorder(Net(), 10, folder=folder, **options)


def bad_synthesis(kernel="uniform", *args, **options):
    def call(folder):
        record(folder, length=20)
        synthesise(folder, kernel, *args, **options)

    return call


def other(**changed):
    return [checkpoints(1)[0], {**checkpoints(1)[0], **changed}]


BAD = {
    "either every or steps": bad_recorder(),
    "got every=5 and steps=[1]": bad_recorder(every=5, steps=[1]),
    "every must be a whole number of at least 1, got 0": bad_recorder(every=0),
    "steps must be rising whole numbers of optimizer steps, from 0 on, got [3, 2]": bad_recorder(
        steps=[3, 2]
    ),
    "steps must be within the run, got 11 with total_steps=10": bad_recorder(steps=[3, 11]),
    "unknown format 'npz'; available: pt, safetensors": bad_recorder(every=5, format="npz"),
    "keep must be at least 2 (the first snapshot and the latest), got 1": bad_recorder(every=5, keep=1),
    "sigma_rels must be one or more different widths, got (0.1, 0.1)": bad_recorder(
        every=5, sigma_rels=(0.1, 0.1)
    ),
    "power: sigma_rel must be in (0, 0.2887]": bad_recorder(every=5, sigma_rels=(0.3,)),
    "step must be between 0 and 20 (total_steps=120, last snapshot at step 20), got 120: pass step=20": bad_synthesis(),
    "step must be between 0 and 20 (total_steps=200, last snapshot at step 20), got 30": bad_synthesis(
        "uniform", 200, step=30
    ),
    "ridge must be a finite number of at least 0, got -1": bad_synthesis(ridge=-1),
    "unknown kernel 'bata'": bad_synthesis("bata"),
    "the output must be a file that ends in .safetensors, .pt, .pth, .bin, .ckpt, got 'a.npz'": bad_synthesis(
        output="a.npz"
    ),
    "there is no folder": lambda folder: synthesise(folder / "nowhere", "uniform"),
    "holds no snapshots: record some with Recorder": lambda folder: synthesise(folder, "uniform"),
    "has no state dict under 'b'; keys with a state dict: 'a'": lambda folder: (
        torch.save({"a": {"w": torch.ones(1)}}, folder / "a.pt"),
        load(folder / "a.pt", key="b"),
    ),
    "holds several state dicts, 'a', 'b': pass one of them, as key='a' (on the command line, --key)": lambda folder: (
        torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, folder / "a.pt"),
        load(folder / "a.pt"),
    ),
    "holds no state dict: no tensors by name": lambda folder: (
        torch.save([torch.ones(1)], folder / "a.pt"),
        load(folder / "a.pt"),
    ),
    "is not a recorder's snapshot": lambda folder: (
        torch.save({"w": torch.ones(1)}, folder / "step-1.pt"),
        synthesise(folder, "uniform"),
    ),
    "has format 99, this version reads formats 1 to 2": lambda folder: (
        torch.save({"wmateacher": {"format": 99}, "state": {}}, folder / "step-1.pt"),
        synthesise(folder, "uniform"),
    ),
    "is damaged: its header has no clock or no names": lambda folder: (
        torch.save({"wmateacher": {"format": 1, "averaged": []}, "state": {}}, folder / "step-1.pt"),
        synthesise(folder, "uniform"),
    ),
    "clock lacks update_every, horizons, snapshot, mass: it is damaged": lambda folder: (
        torch.save(
            {
                "wmateacher": {"format": 1, "averaged": [], "clock": {"kernel": "uniform", "step": 3}},
                "state": {},
            },
            folder / "step-1.pt",
        ),
        synthesise(folder, "uniform"),
    ),
    "there is no file": lambda folder: load(folder / "a.pt"),
    "a checkpoint must be a file that ends in .safetensors, .pt": lambda folder: load(folder / "a.npz"),
    "of a module, pass its state_dict()": lambda folder: interpolate(Net(), Net(), 0.5),
    "cannot read": lambda folder: ((folder / "a.pt").write_bytes(b"no"), load(folder / "a.pt")),
    "it is damaged, or neither .safetensors nor tensors saved by torch.save": lambda folder: (
        (folder / "a.safetensors").write_bytes(b"no"),
        load(folder / "a.safetensors"),
    ),
    ".safetensors holds tensors only, and 'epoch' is not a tensor": lambda folder: save(
        {"epoch": 3}, folder / "a.safetensors"
    ),
    "state dict 0 does not have the tensors of state dict 1: missing 'extra'": lambda folder: (
        average_checkpoints(other(extra=torch.ones(1)))
    ),
    "'w' is torch.float32 of shape (5, 3) in state dict 0, and torch.float32 of shape (2,)": lambda folder: (
        average_checkpoints(other(w=torch.ones(2)))
    ),
    "and torch.int64 of shape (5, 3) in state dict 1": lambda folder: average_checkpoints(
        other(w=torch.ones(5, 3, dtype=torch.int64))
    ),
    "checkpoints must be at least 1 model, got 0": lambda folder: average_checkpoints([]),
    "checkpoints must be a list of state dicts or files, got str": lambda folder: average_checkpoints("a.pt"),
    "steps must be one for each of the 2 checkpoints, got 3": lambda folder: average_checkpoints(
        checkpoints(2), steps=[0, 1, 2]
    ),
    "steps must be rising": lambda folder: average_checkpoints(checkpoints(2), steps=[5, 5]),
    "total_steps must be at least the last of steps, 9, got 8": lambda folder: average_checkpoints(
        checkpoints(2), steps=[0, 9], total_steps=8
    ),
    "total_steps=8 needs the step of each checkpoint": lambda folder: average_checkpoints(
        checkpoints(2), total_steps=8
    ),
    "alpha must be in [0, 1], got 1.5": lambda folder: interpolate(*checkpoints(2), 1.5),
    "finetuned must be at least 2 models, got 1": lambda folder: model_stock(
        checkpoints(1)[0], checkpoints(1)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_say_what_and_how(tmp_path, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=re.escape(message)):
        BAD[message](tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path):
    record(tmp_path, length=20)
    recorder = Recorder(Net(), TOTAL, folder=tmp_path, every=10)
    with pytest.raises(
        ValueError, match=r"already holds 5 snapshots: record into an empty folder, or resume"
    ):
        recorder.update()
    recorder = Recorder(Net(), TOTAL, folder=tmp_path, every=10, sigma_rels=(0.05,))
    with pytest.raises(
        ValueError, match=r"with kernels power\(sigma_rel=0.05\), power\(sigma_rel=0.28\), this"
    ):
        recorder.load_state_dict(record(tmp_path / "other", length=5)[1].state_dict())


def test_a_recording_resumes_from_its_very_start(tmp_path):
    state = Recorder(Run().student, TOTAL, folder=tmp_path, every=10).state_dict()
    record(tmp_path, length=20, dtype=torch.float32)
    run = Run()
    recorder = Recorder(run.student, TOTAL, folder=tmp_path, every=10)
    recorder.load_state_dict(state)
    run.step()
    recorder.update()
    assert [f.name for f in tmp_path.iterdir()] == ["step-000000000-power-0.05.pt"]


def test_snapshots_of_different_runs_are_refused(tmp_path):
    record(tmp_path / "a", length=20)
    record(tmp_path / "b", length=20, update_every=2)
    files = [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]
    with pytest.raises(ValueError, match="the 10 snapshots are not of one run"):
        synthesise(files, "uniform", step=20)


def test_safetensors_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    record(tmp_path / "snapshots", length=20)
    synthesise(tmp_path / "snapshots", "uniform", step=20, output=tmp_path / "a.pt")
    for call in (
        lambda: Recorder(Net(), 10, folder=tmp_path, every=5, format="safetensors"),
        lambda: save({"w": torch.ones(1)}, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(ImportError, match="needs the package safetensors: pip install safetensors"):
            call()


# --- memory -------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from wmateacher import posthoc
from wmateacher.files import load
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
def merge(how, files):
    out = str(Path(files[0]).with_stem("out"))
    if how == "average":
        posthoc.average_checkpoints(files, "beta(0.5,0.5)", output=out)
    else:
        posthoc.model_stock(files[0], files[1:5], output=out)
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    for how in ("average", "stock"):
        files = sorted(map(str, Path(folder).glob("[0-9]*")))
        merge(how, sorted(map(str, Path(folder, "tiny").glob("[0-9]*"))))  # libraries are loaded at first use
        load(files[0])
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
        before = status("VmRSS")
        merge(how, files)
        print(how, folder, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
def test_averaging_needs_little_more_than_the_result(tmp_path):
    sizes = {}
    for suffix, dtype in ((".pt", torch.float32), (".safetensors", torch.bfloat16)):
        folder = tmp_path / suffix.removeprefix(".")
        for place, width in ((folder, 1000), (folder / "tiny", 1)):
            rows = 2 * 6_500 if dtype == torch.bfloat16 else 6_500
            # One tensor is most of it, as an embedding is.
            state = {"embedding": torch.randn(rows * 3 // 5, width).to(dtype)}
            state |= {f"layer.{j}": torch.randn(rows // 20, width).to(dtype) for j in range(8)}
            place.mkdir()
            save(state, place / f"00{suffix}")
            for i in range(1, 10):
                os.link(place / f"00{suffix}", place / f"{i:02d}{suffix}")
        sizes[str(folder)] = os.path.getsize(folder / f"00{suffix}")
        assert 25e6 < sizes[str(folder)] < 28e6
    # Memory that is freed goes back at once, so that what is measured is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = [line.split() for line in done.stdout.splitlines()]
    assert [(how, folder) for how, folder, _ in measured] == [
        (h, f) for f in sizes for h in ("average", "stock")
    ]
    for how, folder, peak in measured:
        assert int(peak) < 1.5 * sizes[folder] + 4e6, (how, folder)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, complex(0, torch.nan)])
@pytest.mark.parametrize("merge", ["average", "interpolate", "stock"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_checkpoint_that_is_not_finite_is_named(tmp_path, merge, value, place):
    """Also in a tensor of several pieces, and wherever in it the value stands."""
    dtype = torch.complex64 if isinstance(value, complex) else torch.bfloat16
    states = [
        {"a": torch.ones(2), "b.weight": torch.full((70_000, 2), 1.0, dtype=dtype) * i} for i in range(3)
    ]
    states[1]["b.weight"][place, place] = value
    files = [tmp_path / f"{i}.pt" for i in range(3)]
    for state, file in zip(states, files, strict=True):
        torch.save(state, file)
    merges = {
        "average": lambda sources: average_checkpoints(sources, "uniform"),
        "interpolate": lambda sources: interpolate(sources[0], sources[1], 0.5),
        "stock": lambda sources: model_stock(sources[0], sources[1:]),
    }
    with pytest.raises(ValueError, match=r"'b.weight' has NaN or infinite values in '.*1.pt'.*leave this"):
        merges[merge](files)
    with pytest.raises(ValueError, match="'b.weight' has NaN or infinite values in state dict 1"):
        merges[merge](states)


def test_a_checkpoint_that_is_not_read_may_have_nan():
    spoilt = {"a": torch.tensor([torch.nan, 1.0])}
    assert interpolate({"a": torch.ones(2)}, spoilt, 0.0)["a"].tolist() == [1.0, 1.0]


def test_large_values_are_not_mistaken_for_infinite_ones():
    large = {"a": torch.full((9,), 1e308, dtype=torch.float64)}
    assert torch.equal(interpolate(large, large, 0.5)["a"], large["a"])
