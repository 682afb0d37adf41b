import pytest
import torch

from wmateacher.integrations.engine.settings import Settings


def settings(**changes):
    return Settings(**{"steps": 10, "learning_rate": 0.1, **changes})


def test_the_learning_rate_warms_up_and_decays_to_0():
    rates = [settings(warmup=2).learning_rate_at(step) for step in range(11)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[10] == pytest.approx(0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_follows_the_precision(precision, dtype):
    with settings(precision=precision).autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not settings(precision=precision).grad_scaler(torch.device("cpu")).is_enabled()


def test_a_run_may_be_resumed_with_other_intervals_of_checkpoints_only():
    assert settings(checkpoint_every=5).run_config() == settings().run_config()
    assert settings(seed=1).run_config() != settings().run_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None for no clipping, got 0.0"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16', got 'fp16'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
