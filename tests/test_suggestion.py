"""The kernel that is proposed does what was wished, and the command says why."""

import pytest

from wmateacher import cli, kernels, theory
from wmateacher.theory import suggest


def numbers(kernel, total):
    summary = kernel.summary(total)
    return summary.start_weight, summary.mean_age / total


@pytest.mark.parametrize("total", [50, 25_030])
@pytest.mark.parametrize(("weight", "age"), [(0.05, None), (1e-4, None), (0.7, None), (None, 0.05), (None, 0.7), (None, 0.9)])  # fmt: skip
def test_a_wish_is_met(total, weight, age):
    found, mean = numbers(suggest(total, start_weight=weight, mean_age=age).kernel, total)
    if weight:
        assert found == pytest.approx(weight, rel=0.03)
    else:
        assert mean == pytest.approx(age, rel=0.03)


@pytest.mark.parametrize(("total", "start", "age"), [(1, "pretrained", 1e-3), (2, "pretrained", 1e-6), (5, "random", 0.1), (100, "random", 1e-3)])  # fmt: skip
def test_a_mean_age_is_met_in_a_run_of_few_steps(total, start, age):
    _, mean = numbers(suggest(total, start=start, mean_age=age).kernel, total)
    assert mean == pytest.approx(age, rel=0.2)


def test_two_wishes_that_no_beta_kernel_meets_in_a_run_of_few_steps_are_refused():
    with pytest.raises(ValueError, match="no Beta kernel"):
        suggest(1, start_weight=1e-12, mean_age=0.01)


def test_two_wishes_are_met_by_one_kernel():
    kernel = suggest(400, start_weight=0.05, mean_age=0.6).kernel
    assert isinstance(kernel, kernels.Beta)
    assert numbers(kernel, 400) == pytest.approx((0.05, 0.6), rel=0.01)


def test_without_a_wish_the_start_decides():
    assert suggest(400).kernel == kernels.Beta(0.5, 0.5)
    assert suggest().kernel == kernels.Power(exponent=-0.5)
    assert suggest(400, start="random").kernel == kernels.Ema(0.95)
    assert suggest(start="random").kernel == kernels.Power(sigma_rel=0.1)
    for kernel in (suggest(mean_age=0.3).kernel, suggest(start="random", mean_age=0.3).kernel):
        assert not kernel.needs_horizon
        assert numbers(kernel, 20_000)[1] == pytest.approx(0.3, rel=0.01)


def test_batch_normalisation_is_warned_of_where_the_student_has_it():
    assert "recalibrate" in str(suggest(400, batch_norm=True))
    assert "recalibrate" not in str(suggest(400, batch_norm=False))


def test_the_command_compares_bias_and_noise(capsys):
    assert cli.main(["kernel", "static", "--suggest", "--total-steps", "400", "--weight-start", "0.05"]) == 0
    kernel, *reasons, _, _, _, _, header, ours, static = capsys.readouterr().out.splitlines()
    assert all(reason.startswith("- ") for reason in reasons)
    assert header.split()[-5:] == ["bias", "noise", "student:", "bias", "noise"]
    alone = theory.reference_run("uniform", 400, 0.0)
    for line in (ours, static):
        name, weight, *_, teacher_bias, teacher_noise, student_bias, student_noise = line.split()
        run = theory.reference_run(name, 400)
        assert float(weight) == pytest.approx(kernels.build(name).summary(400).start_weight, abs=1e-5)
        assert float(teacher_bias) == pytest.approx((run.teacher_bias**2).mean() ** 0.5, abs=1e-3)
        assert float(student_bias) == pytest.approx((run.student_bias**2).mean() ** 0.5, abs=1e-3)
        for noise, variance in ((teacher_noise, run.teacher_variance), (student_noise, run.student_variance)):
            assert float(noise) == pytest.approx((variance / alone.student_variance).mean(), abs=1e-3)
    assert ours.split()[0] == kernel


def test_the_command_shows_a_run_with_an_open_end(capsys):
    assert cli.main(["kernel", "--suggest"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "power(exponent=-0.5)"
    steps, weight, age, *_, gap = next(line for line in out if line.startswith("10000 ")).split()
    law = theory.PowerLaw(-0.5)
    assert [float(weight), float(age), float(gap)] == pytest.approx(
        [law.start_weight(int(steps)), law.mean_age(int(steps)), law.gap(int(steps))], rel=1e-2
    )


def test_a_long_run_is_described_without_its_noise(capsys):
    assert cli.main(["kernel", "static", "--suggest", "--total-steps", "200000"]) == 0
    assert "noise:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suggest --weight-start 0.1", "start_weight needs total_steps, got 0.1 alone"),
        (
            "--suggest --weight-start 1.5 --total-steps 9",
            "suggest: start_weight must be a share in (0, 1), got 1.5",
        ),
        ("--suggest --start random --weight-start 0.1", "start_weight is for pretrained starts, got 0.1"),
        (
            "--suggest --total-steps 400 --weight-start 0.9 --mean-age 0.5",
            "no Beta kernel with shapes in [0.02, 50]",
        ),
        (
            "--suggest --total-steps 2000000 --mean-age 0.5",
            "total_steps must be at most 1000000 to fit a kernel",
        ),
        ("--suggest --total-steps 0", "--total-steps must be a whole number of at least 1, got 0"),
        ("static --suggest", "pass --total-steps T to compare the proposal with static"),
        ("--suggest --plot a.png", "--plot is not for --suggest"),
        ("uniform --total-steps 9 --no-batch-norm", "--batch-norm is for --suggest: pass --suggest too"),
        ("uniform", "pass --total-steps T, or --suggest for a proposal"),
        ("--total-steps 9", "pass a kernel, such as 'beta(0.5,0.5)', and --total-steps T"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main(["kernel", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"wmateacher kernel: {message}")
