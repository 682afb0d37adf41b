import math

import numpy as np
import oracle
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from wmateacher import kernels
from wmateacher.kernels import registry


@pytest.mark.parametrize("text", oracle.KERNELS)
@pytest.mark.parametrize("total", [1, 2, 10, 137])
def test_profile_is_the_definition(text, total):
    np.testing.assert_allclose(
        kernels.build(text).profile(total), oracle.step_weights(text, total), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("text", [*oracle.KERNELS, *oracle.LATE])
def test_a_kernel_prints_back_to_itself(text):
    kernel = kernels.build(text)
    assert str(kernel) == text
    assert kernels.build(str(kernel)) == kernel
    assert kernels.build(kernel) is kernel


def test_every_registered_kernel_has_an_oracle_and_a_public_class():
    listed = {k.split("(")[0] for k in oracle.KERNELS} - {"scipy.stats.beta"}
    assert listed | {"gap"} == set(kernels.available())  # the weights of a gap are in test_controller
    for name, factory in registry._FACTORIES.items():
        assert factory.__name__ in kernels.__all__, f"{name}: add it to __all__ of wmateacher.kernels"


def test_spaces_do_not_matter():
    assert str(kernels.build(" ema(0.996, 1.0, schedule = cosine) ")) == "ema(0.996,1.0,schedule=cosine)"


@given(a=st.floats(0.05, 20), b=st.floats(0.05, 20), total=st.integers(1, 300))
def test_every_profile_is_a_convex_combination(a, b, total):
    weights = kernels.Beta(a, b).profile(total)
    assert weights.shape == (total + 1,)
    assert (weights >= 0).all()
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-12)


def test_reductions():
    for total in (1, 7, 100):
        uniform = kernels.build("uniform").profile(total)
        np.testing.assert_allclose(uniform, 1 / (total + 1), rtol=1e-12)
        np.testing.assert_allclose(kernels.build("beta(1,1)").profile(total), uniform, rtol=1e-12)
        np.testing.assert_allclose(kernels.build("tail(1.0)").profile(total), uniform, rtol=1e-12)
        np.testing.assert_allclose(
            kernels.build("arcsine").profile(total), kernels.build("beta(0.5,0.5)").profile(total), rtol=1e-9
        )
        np.testing.assert_allclose(
            kernels.build(lambda tau: 6 * tau * (1 - tau)).profile(total),
            kernels.build("beta(2,2)").profile(total),
            rtol=1e-9,
        )


def test_published_weight_of_the_start():
    """0.285% of the mass stays on W^0 in the full ImageNet recipe (25,030 steps)."""
    assert kernels.build("beta(0.5,0.5)").summary(25_030).start_weight == pytest.approx(0.00285, abs=5e-6)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_power_has_the_width_that_it_is_named_for(sigma_rel):
    weights = kernels.Power(sigma_rel=sigma_rel).profile(20_000)
    position = np.arange(20_001) / 20_000
    mean = weights @ position
    assert math.sqrt(weights @ (position - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("exponent", [-0.7, -0.5, 0.0, 1.5])
def test_power_of_an_exponent_needs_no_horizon_and_tends_to_a_beta_density(exponent):
    kernel = kernels.Power(exponent=exponent)
    assert not kernel.needs_horizon
    assert kernels.build(str(kernel)) == kernel
    summary, beta = (k.summary(20_000) for k in (kernel, kernels.Beta(1 + exponent, 1)))
    assert summary.start_weight == pytest.approx(20_001 ** -(exponent + 1), rel=1e-9)
    close = max(1e-3, 2 * summary.start_weight)  # the two give the first steps different shares
    assert summary.mean_age == pytest.approx(20_000 / (exponent + 2), rel=close)
    assert summary.mean_age == pytest.approx(beta.mean_age, rel=close)
    half = kernel.profile(10_000)  # what the run had after half of its steps keeps its proportions
    whole = kernel.profile(20_000)[:10_001]
    np.testing.assert_allclose(whole / whole.sum(), half, rtol=1e-9)


def test_exponent_zero_is_the_running_mean():
    np.testing.assert_allclose(kernels.Power(exponent=0).profile(40), 1 / 41, rtol=1e-12)


@pytest.mark.parametrize("text", oracle.LATE)
@pytest.mark.parametrize("total", [13, 14, 137])
def test_a_late_start_gives_all_weight_to_the_states_from_there_on(text, total):
    profile = kernels.build(text).profile(total)
    np.testing.assert_allclose(profile, oracle.step_weights(text, total), rtol=1e-9, atol=1e-14)
    assert not profile[:13].any()
    whole = kernels.build(text.replace(",start_step=13", "").replace("(start_step=13)", ""))
    np.testing.assert_allclose(profile[13:], whole.profile(total - 13) if total > 13 else 1.0, rtol=1e-12)


def test_a_half_life_halves_the_weight_of_a_state():
    kernel = kernels.Ema(half_life=500)
    weights = kernel.profile(5000)[1:]
    np.testing.assert_allclose(weights[500:] / weights[:-500], 2.0, rtol=1e-9)
    assert kernels.build("ema(half_life=500.0)") == kernel == kernels.Ema(half_life=500.0)
    assert str(kernel) == "ema(half_life=500)"
    one, other = kernel.summary(5000), kernels.Ema(0.5 ** (1 / 500)).summary(5000)
    assert one.mean_age == pytest.approx(other.mean_age)
    rising = kernels.Ema(half_life=2, final_decay=1.0, schedule="linear")
    assert kernels.build(str(rising)) == rising
    np.testing.assert_allclose(
        rising.profile(30), kernels.Ema(0.5**0.5, 1.0, schedule="linear").profile(30), rtol=1e-12
    )


def test_power_is_the_published_update():
    """EDM2: beta_t = (1 - 1/t)^(gamma + 1), with gamma = 6.94 for sigma_rel = 0.10."""
    kernel = kernels.Power(sigma_rel=0.1)
    assert kernel.gamma == pytest.approx(6.94, abs=0.005)
    t = np.arange(1, 50)
    np.testing.assert_allclose(kernel.retention(t - 1, None), (1 - 1 / t) ** (kernel.gamma + 1), rtol=1e-12)


def test_summary_of_known_kernels():
    uniform = kernels.build("uniform").summary(99)
    assert uniform.effective_states == pytest.approx(100)
    assert uniform.mean_age == pytest.approx(49.5)
    assert uniform.last_tenth == pytest.approx(0.10)
    static = kernels.build("static").summary(99)
    assert (static.start_weight, static.mean_age, static.effective_states) == (1, 99, 1)
    assert (static.last_tenth, static.equal_ema_retention) == (0, 1)
    ema = kernels.build("ema(0.9)").summary(50)
    assert ema.equal_ema_retention == pytest.approx(0.9, rel=1e-12)
    assert kernels.build("ema(0.0)").summary(50).equal_ema_retention == 0
    assert "weight of W^0" in str(ema)


@pytest.mark.parametrize("text", ["beta(0.5,0.5)", "uniform", "tail(0.1)", "power(sigma_rel=0.05)"])
def test_equal_ema_has_the_same_mean_age(text):
    summary = kernels.build(text).summary(500)
    ema = kernels.Ema(summary.equal_ema_retention).summary(500)
    assert ema.mean_age == pytest.approx(summary.mean_age, rel=1e-9)


def test_scipy_distributions_and_callables():
    frozen = scipy.stats.truncnorm(-2, 2, loc=0.5, scale=0.2)
    kernel = kernels.build(frozen)
    assert str(kernel) == "scipy.stats.truncnorm(-2.0,2.0,loc=0.5,scale=0.2)"
    assert kernels.build(str(kernel)) == kernel
    tau = (np.arange(11) + 0.5) / 11
    np.testing.assert_allclose(kernel.profile(10), frozen.pdf(tau) / frozen.pdf(tau).sum(), rtol=1e-9)

    def scalar_only(tau):
        return math.sin(math.pi * tau) if tau < 0.9 else 0.0

    weights = kernels.build(scalar_only).profile(10)
    expected = np.array([scalar_only(t) for t in tau])
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-9, atol=1e-15)
    assert str(kernels.build(scalar_only)).startswith("callable:test_kernels.")


def test_register_adds_a_kernel(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", {})

    @kernels.register("triangle")
    class Triangle(kernels.Density):
        def density(self, tau):
            return 1 - abs(2 * tau - 1)

    assert "triangle" in kernels.available()
    assert str(kernels.build("triangle")) == "triangle"
    with pytest.raises(ValueError, match="'triangle' is taken; choose another or pass override=True"):
        kernels.register("triangle")
    kernels.register("triangle", override=True)(Triangle)
    with pytest.raises(ValueError, match="must be an identifier such as 'my_kernel', got 'my kernel'"):
        kernels.register("my kernel")


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ("bta(0.5,0.5)", ValueError, "unknown kernel 'bta'; did you mean 'beta'"),
        ("beta(-1,0.5)", ValueError, r"beta: a must be a finite number above 0, got -1"),
        ("beta(0.5,0)", ValueError, r"beta: b must be a finite number above 0, got 0"),
        ("beta(0.5,x)", ValueError, r"beta: b must be a finite number above 0, got 'x'"),
        ("beta(0.5)", TypeError, r"missing a required argument: 'b'; write beta\(a,b\)"),
        ("tail(1.5)", ValueError, r"tail: fraction must be a fraction of the run in \(0, 1\], got 1.5"),
        ("ema(7)", ValueError, r"ema: decay must be a retention in \[0, 1\].*got 7"),
        ("ema(0.9,1.0)", ValueError, r"schedule must be linear or cosine if final_decay is given, got None; write"),
        ("ema(0.9,1.0,schedule=sine)", ValueError, "must be linear or cosine .*got 'sine'"),
        ("ema(0.9,schedule=cosine)", ValueError, r"got final_decay=None; write ema\(0.9,1.0,schedule=cosine\)"),
        ("ema(0.9,1.0,schedule=linear,warmup=0)", ValueError, r"warmup must be a fraction of the run"),
        ("ema", ValueError, r"give either decay or half_life, got decay=None and half_life=None; write ema\(0.999\)"),
        ("ema(0.9,half_life=5)", ValueError, "give either decay or half_life, got decay=0.9 and half_life=5"),
        ("ema(half_life=0)", ValueError, "half_life must be a finite number of optimizer steps above 0, got 0"),
        ("ema(half_life=1,schedule=cosine)", ValueError, r"final_decay=None; write ema\(0.5,1.0,schedule=cosine\)"),
        ("ema(0.9,start_step=-1)", ValueError, "ema: start_step must be a whole number of at least 0, got -1"),
        ("uniform(start_step=2.5)", ValueError, "uniform: start_step must be a whole number of .*got 2.5"),
        ("uniform(start_step=1e30)", ValueError, r"uniform: start_step must be at most 2\*\*53, got 1e\+30"),
        ("ema(0.9,start_step=1e999)", ValueError, "ema: start_step must be a whole number of .*got inf"),
        ("ema(0.9,start_step=True)", ValueError, "ema: start_step must be a whole number of .*got True"),
        ("ema(True)", ValueError, r"ema: decay must be a retention in \[0, 1\].*got True"),
        ("ema(half_life=True)", ValueError, "half_life must be a finite number of .*got True"),
        ("power(exponent=True)", ValueError, "power: exponent must be above -1.*got True"),
        ("uniform(5)", TypeError, r"write uniform\(start_step=0\)"),
        ("power(sigma_rel=0.5)", ValueError, r"sigma_rel must be in \(0, 0.2887\]"),
        ("power(exponent=-1)", ValueError, "power: exponent must be above -1 .*got -1"),
        ("power(sigma_rel=0.1,exponent=1)", ValueError, "either sigma_rel or exponent, got sigma_rel=0.1 and exponent=1"),
        ("power", ValueError, r"write power\(sigma_rel=0.1\), or power\(exponent=-0.5\)"),
        ("power(0.1)", TypeError, r"write power\(sigma_rel=\.\.\.,exponent=\.\.\.\)"),
        ("scipy.stats.betta(1,1)", ValueError, "unknown scipy.stats distribution 'betta'; did you mean 'beta'"),
        ("scipy.stats.norm(0.5,0.1)", ValueError, r"has support \[-inf, inf\]: .*truncate it"),
        (scipy.stats.uniform(0, 2), ValueError, r"has support \[0.0, 2.0\]"),
        (3, TypeError, "kernel must be a string such as 'beta"),
        (kernels.Beta, TypeError, "kernel must be a string such as 'beta"),
    ],
)  # fmt: skip
def test_bad_kernels_say_what_to_do(kernel, error, message):
    with pytest.raises(error, match=message):
        kernels.build(kernel)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda tau: -tau, r"gave -0.04\d* at tau=0.04\d* \(step 0 of 10\): a density must be finite"),
        (lambda tau: np.nan * tau, "gave nan at tau"),
        (lambda tau: np.ones(3), r"gave shape \(3,\) for \(11,\) fractions"),
        (lambda tau: 0.0, "has no mass on any of the 11 states"),
    ],
)
def test_bad_densities_say_where(kernel, message):
    with pytest.raises(ValueError, match=message):
        kernels.build(kernel).profile(10)


@pytest.mark.parametrize("total", [0, -3, 2.5, "10", None, True])
def test_the_horizon_is_a_whole_number(total):
    with pytest.raises(ValueError, match="total_steps must be a whole number of at least 1, got"):
        kernels.build("uniform").profile(total)
