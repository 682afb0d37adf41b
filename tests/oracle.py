"""The averaging teacher written out slowly in float64, straight from its definition.

Nothing here uses the library: densities, snapshots and weights are computed again, step by step.
"""

import functools
import math

import numpy as np


def beta_density(a, b):
    return lambda tau: tau ** (a - 1) * (1 - tau) ** (b - 1)


@functools.cache
def power_gamma(sigma_rel):
    """The exponent of t^gamma on [0, 1] whose standard deviation is sigma_rel, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        gamma = (low + high) / 2
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        low, high = (gamma, high) if square - mean**2 > sigma_rel**2 else (low, gamma)
    return gamma


def _uniform(tau):
    return 1.0


def _middle(tau):  # scipy.stats.beta(2, 2), unnormalised
    return tau * (1 - tau)


def density_steps(kappa):
    """Step masses alpha_0..alpha_T of a density over the run."""
    return lambda total: [kappa((k + 0.5) / (total + 1)) for k in range(total + 1)]


def cosine_retention(start, end):
    return lambda j, total: end + (start - end) * (1 + math.cos(math.pi * (j - 1) / total)) / 2


def ramp_retention(start, end, warmup):
    return lambda j, total: start + (end - start) * min(1.0, (j - 1) / total / warmup)


def late(retention, start):
    """The retentions of a run that begins at step `start`; until then the average is the latest state."""
    return lambda j, total: 0.0 if j <= start else retention(j - start, total - start)


# Kernel text -> the mass of every step (densities) or the retention of every step.
DENSITIES = {
    "beta(0.5,0.5)": density_steps(beta_density(0.5, 0.5)),
    "beta(0.2,0.7)": density_steps(beta_density(0.2, 0.7)),
    "beta(2.0,3.0)": density_steps(beta_density(2.0, 3.0)),
    "arcsine": density_steps(beta_density(0.5, 0.5)),
    "uniform": density_steps(_uniform),
    "tail(0.25)": density_steps(lambda tau: float(tau >= 0.75)),
    "scipy.stats.beta(2.0,2.0)": density_steps(_middle),
    "power(exponent=-0.5)": lambda total: [math.sqrt(k + 1) - math.sqrt(k) for k in range(total + 1)],
    "power(sigma_rel=0.2)": lambda total: [
        (k + 1) ** (power_gamma(0.2) + 1) - k ** (power_gamma(0.2) + 1) for k in range(total + 1)
    ],
}
RETENTIONS = {
    "static": lambda j, total: 1.0,
    "ema(0.9)": lambda j, total: 0.9,
    "ema(0.996,1.0,schedule=cosine)": cosine_retention(0.996, 1.0),
    "ema(0.05,0.9,schedule=linear,warmup=0.2)": ramp_retention(0.05, 0.9, 0.2),
    "ema(half_life=6)": lambda j, total: 0.5 ** (1 / 6),
    "ema(0.9,start_step=1)": late(lambda j, total: 0.9, 1),
}
KERNELS = [*DENSITIES, *RETENTIONS]

# Kernels that start at step 13, for runs of at least that length.
LATE = {
    "uniform(start_step=13)": late(lambda j, total: j / (j + 1), 13),
    "ema(0.9,start_step=13)": late(lambda j, total: 0.9, 13),
    "ema(half_life=2.5,start_step=13)": late(lambda j, total: 0.5 ** (1 / 2.5), 13),
    "ema(0.6,1.0,schedule=cosine,start_step=13)": late(cosine_retention(0.6, 1.0), 13),
    "ema(0.05,0.9,schedule=linear,warmup=0.2,start_step=13)": late(ramp_retention(0.05, 0.9, 0.2), 13),
}
RETENTIONS.update(LATE)


def step_weights(kernel, total):
    """Weight of each step 0..T in an average that looks at every step."""
    if kernel in DENSITIES:
        alpha = np.array(DENSITIES[kernel](total))
        return alpha / alpha.sum()
    weights = [1.0]
    for j in range(1, total + 1):
        r = RETENTIONS[kernel](j, total)
        weights = [w * r for w in weights] + [1 - r]
    return np.array(weights)


def snapshots(total, every):
    return sorted({*range(0, total + 1, every), total})


@functools.cache
def realised(kernel, total, every, step):
    """Weight of every state 0..step after `step` steps of a run of `total`, averaging every n-th.

    Each step's mass goes to the nearest snapshot, ties to the later one; a snapshot taken by now has all
    of its steps' mass.
    """
    plan = snapshots(total, every)
    owner = {j: min(plan, key=lambda s: (abs(s - j), -s)) for j in range(total + 1)}
    seen = [s for s in plan if s <= step]
    if kernel in DENSITIES:
        alpha = DENSITIES[kernel](total)
        mass = {s: sum(alpha[j] for j in range(total + 1) if owner[j] == s) for s in seen}
        if sum(mass.values()) == 0:  # no mass yet: the latest snapshot
            mass = {s: float(s == seen[-1]) for s in seen}
    else:
        mass = {0: 1.0}
        for s in seen[1:]:
            kept = math.prod(RETENTIONS[kernel](j, total) for j in range(1, total + 1) if owner[j] == s)
            mass = {k: m * kept for k, m in mass.items()} | {s: 1 - kept}
    weights = np.zeros(step + 1)
    for s, m in mass.items():
        weights[s] = m / sum(mass.values())
    weights.setflags(write=False)
    return weights


def after_events(kernel, every, total, events):
    """Weight of every state after a run with incidents, from the average itself as a vector of weights.

    Events: "step" (one optimizer step, and its snapshot if one is due), "skip" (the same, but a due snapshot
    does not enter the average), ("jump", step) and ("horizon", total). Each step that no snapshot has stood for
    yet belongs to the first snapshot in the average that is as near as its nearest planned one, or later.
    """
    weights, step, latest, joined = np.array([1.0]), 0, 0, 0

    def owners(count):
        plan = sorted({*range(0, total + 1, every), total, latest})
        return [min(plan, key=lambda s: (abs(s - j), -s)) for j in range(count)]

    for event in events:
        if event == "step" or event == "skip":
            if step >= total:
                continue
            step += 1
            weights = np.append(weights, 0.0)
            if event == "skip" or (step % every and step != total):
                continue
            owner = owners(total + 1)
            gone = [j <= joined if joined else owner[j] <= latest for j in range(total + 1)]
            mine = [j for j in range(total + 1) if not gone[j] and owner[j] <= step]
            if kernel in DENSITIES:
                alpha = DENSITIES[kernel](total)
                so_far = sum(alpha[: mine[-1] + 1])
                kept = 1 - sum(alpha[j] for j in mine) / so_far if so_far else 0.0
            else:
                kept = math.prod(RETENTIONS[kernel](j, total) for j in mine)
            weights *= kept
            weights[step] += 1 - kept
            latest, joined = step, 0
        elif event[0] == "jump":
            step = latest = joined = event[1]
            weights = realised(kernel, total, 1, step).copy() if step else np.array([1.0])
        else:
            total = event[1]
    return weights
