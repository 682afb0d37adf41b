from dataclasses import replace

import numpy as np
import pytest
import torch

from wmateacher import WMATeacher, kernels
from wmateacher.integrations.clip import clocks
from wmateacher.integrations.clip.ablations import start_share
from wmateacher.integrations.clip.methods import METHODS

TOTAL = 25_030


def published_weights(kernel, updates, total):
    """The published code: kappa at the update's number over all steps, W^0 in the sum."""
    density = [kernel.density(np.array([(u + 0.5) / (total + 1)]))[0] for u in range(updates + 1)]
    return np.array(density) / sum(density)


@pytest.mark.parametrize(
    ("every", "share", "within"), [(1, 0.00285, 1e-5), (500, 0.10, 2e-3), (2500, 0.214, 1e-4)]
)
def test_the_start_keeps_what_the_published_code_leaves_it(every, share, within):
    method = replace(METHODS["tracer"], update_every=every, clock="published")
    assert start_share(method, TOTAL) == pytest.approx(share, abs=within)


@pytest.mark.parametrize("every", [500, 2500])
def test_by_the_correct_clock_the_window_stays(every):
    """The first snapshot stands for the steps nearest to it: half an interval of the kernel's mass."""
    method = replace(METHODS["tracer"], update_every=every)
    profile = kernels.build("beta(0.5,0.5)").profile(TOTAL)
    assert start_share(method, TOTAL) == pytest.approx(profile[: (every - 1) // 2 + 1].sum())


@pytest.mark.parametrize(("total", "every"), [(23, 4), (20, 5), (7, 7), (3, 9), (12, 1)])
def test_the_teachers_average_is_the_published_one(total, every):
    kernel, interval = clocks.build("beta(0.5,0.5)", every, "published")
    student = torch.nn.Linear(total + 1, 1, bias=False, dtype=torch.float64)
    states = torch.eye(total + 1, dtype=torch.float64)
    with torch.no_grad():
        student.weight.copy_(states[:1])
    teacher = WMATeacher(student, kernel, total, update_every=interval)
    for step in range(1, total + 1):
        with torch.no_grad():
            student.weight.copy_(states[step : step + 1])
        teacher.update()
    snapshots = sorted({0, *(index + 1 for index in range(0, total, every)), total})
    expected = np.zeros(total + 1)
    expected[snapshots] = published_weights(kernels.build("beta(0.5,0.5)"), len(snapshots) - 1, total)
    np.testing.assert_allclose(teacher.module.weight[0].detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(teacher.trajectory_weights(), expected, atol=1e-12)


def test_once_an_update_applies_an_emas_retention_once():
    kernel, interval = clocks.build("ema(0.9)", 5, "once")
    weights = kernel.profile(20)
    assert interval == 1
    expected = np.zeros(21)
    expected[[0, 1, 6, 11, 16]] = [0.9**4, 0.1 * 0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    np.testing.assert_allclose(weights, expected, atol=1e-12)


@pytest.mark.parametrize("clock", ["once", "published"])
@pytest.mark.parametrize("spec", ["beta(0.5,0.5)", "ema(0.9)", "uniform", "static"])
def test_with_an_update_at_every_step_all_clocks_are_one(spec, clock):
    ours = clocks.build(spec, 1, clock)[0].profile(50)
    np.testing.assert_allclose(ours, kernels.build(spec).profile(50), atol=1e-15)


def test_a_teacher_of_another_clock_is_not_resumed():
    student = torch.nn.Linear(2, 2)
    published = WMATeacher(student, clocks.build("beta(0.5,0.5)", 5, "published")[0], 20)
    correct = WMATeacher(student, "beta(0.5,0.5)", 20)
    with pytest.raises(ValueError, match=r"kernel='published_clock\(beta\(0.5,0.5\),5\)'"):
        correct.load_state_dict(published.state_dict())


def test_a_horizon_is_needed():
    with pytest.raises(ValueError, match="needs total_steps, got None"):
        WMATeacher(torch.nn.Linear(2, 2), clocks.build("ema(0.9)", 5, "once")[0])
