"""The methods through TRL's trainers, against the training loop and a float64 oracle."""

import copy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_language import RECIPE, WORLD, network, of_answer, run

from wmateacher.integrations import language
from wmateacher.integrations.language import data, model, trl_training
from wmateacher.integrations.language.data import demonstrate
from wmateacher.integrations.language.experiment import Experiment
from wmateacher.integrations.language.recipes import Method
from wmateacher.integrations.trl import SDFTTrainer

SETTINGS = replace(RECIPE.settings, steps=4, warmup=1)


def run_trl(method, student=None, settings=SETTINGS, **options):
    questions = WORLD.later(settings.batch_size)
    return trl_training.fit(student or network(), method, questions, settings, progress=False, **options)


@pytest.mark.parametrize("method", [Method("sft"), Method("teacher", "sft", "beta(0.5,0.5)", 0.7)])
def test_sft_equals_the_training_loop(method):
    """The same batches, learning rates, clipping and losses: equal weights, gaps and averages."""
    ours, theirs = run(method, settings=SETTINGS), run_trl(method, evaluate=lambda networks: {"count": len(networks)},
                                        evaluate_every=3, evaluate_last=True)  # fmt: skip
    for key, value in ours.student.state_dict().items():
        torch.testing.assert_close(theirs.student.state_dict()[key], value, rtol=0, atol=1e-5)
    for name in ("loss", "gap"):
        assert theirs.history.values(name) == pytest.approx(ours.history.values(name), abs=1e-5)
    losses = theirs.history.values("loss")
    assert losses[-1] < losses[0] - 0.1
    assert theirs.history.series["count"] == [(3, len(ours.networks)), (4, len(ours.networks))]
    assert theirs.networks.keys() == ours.networks.keys()
    if method.kernel is not None:
        assert theirs.teacher.step == theirs.teacher.total_steps == SETTINGS.steps
        torch.testing.assert_close(
            theirs.teacher.trajectory_weights(), ours.teacher.trajectory_weights(), rtol=0, atol=0
        )
        for key, value in ours.teacher.module.state_dict().items():
            torch.testing.assert_close(theirs.teacher.module.state_dict()[key], value, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("distillation", "lora"), [("kl", False), ("reverse_kl", True)])
def test_sdft_learns_from_a_teacher_that_sees_the_demonstration(monkeypatch, distillation, lora):
    """A float64 oracle of the first loss, at the answers that TRL has drawn."""
    batches = []

    def prepare(self, inputs, prepared=SDFTTrainer._prepare_training_batch):
        batches.append(prepared(self, inputs))
        return batches[-1]

    monkeypatch.setattr(SDFTTrainer, "_prepare_training_batch", prepare)
    student = model.with_lora(network(), 2) if lora else network()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    start = copy.deepcopy(student)
    fitted = run_trl(Method("mine", "sdft", "ema(0.5)", distillation=distillation), student)
    assert len(batches) == fitted.teacher.step == SETTINGS.steps
    assert fitted.history.values("gap")[-1] > 0
    expected = []
    for i, question in enumerate(next(WORLD.later(4)(0))):
        drawn = batches[0]["completion_ids"][i][batches[0]["completion_mask"][i].bool()]
        answer = tuple(drawn.tolist())
        seen = batches[0]["teacher_input_ids"][i][batches[0]["teacher_attention_mask"][i].bool()]
        shown = demonstrate(question).prompt
        assert tuple(seen.tolist()) == shown + answer
        q, p = of_answer(start, question.prompt, answer), of_answer(start, shown, answer)
        p, q = (p, q) if distillation == "kl" else (q, p)
        expected.append((np.exp(p) * (p - q)).sum(-1).mean())
    assert np.mean(expected) > 1e-3
    assert fitted.history.values("loss")[0] == pytest.approx(np.mean(expected), rel=1e-3)
    for (name, parameter), before in zip(student.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(parameter, before) == (lora and "lora" not in name), name
    if lora:
        assert all("lora" in name for name in fitted.teacher.state_dict() if name.endswith("weight"))


def test_the_tokens_of_the_world_survive_the_tokenizer():
    words = data.words(6)
    assert len(set(words)) == len(words) == data.vocabulary(6)
    made, question = trl_training.tokenizer(6), demonstrate(WORLD.old_facts[0])
    (row,) = trl_training.rows([question], "sft", 6)
    assert made(row["prompt"] + row["completion"])["input_ids"] == [*question.prompt, *question.answer]
    assert (made.pad_token_id, made.eos_token_id) == (data.PAD, data.END)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(SETTINGS, precision="bf16")}, "trains in fp32, got precision='bf16'.*'loop'"),
        (
            {"methods": {"mine": Method("mine", "sdft", "static", distillation="mse")}},
            r"TRL's SDFT has no distillation='mse' \(mine\): choose one of kl, reverse_kl",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Experiment(replace(RECIPE, trainer="trl", **change), tmp_path, progress=False)


def test_an_unknown_trainer_is_named():
    with pytest.raises(ValueError, match="unknown trainer 'tlr'; did you mean 'trl'"):
        replace(RECIPE, trainer="tlr")


def test_missing_trl_is_named(tmp_path, monkeypatch):
    for name in ("wmateacher.integrations.trl", trl_training.__name__):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(language, "trl_training")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'wmateacher\[trl\]'"):
        Experiment(replace(RECIPE, trainer="trl"), tmp_path, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(FloatingPointError, match=r"sft: the loss is .* of 4: lower learning_rate \(1e\+30\)"):
        run_trl(Method("sft"), settings=replace(SETTINGS, learning_rate=1e30, clip_norm=None))


def test_another_device_than_the_students_is_refused(monkeypatch):
    monkeypatch.setattr(trl_training.SFTConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="every GPU that they see, here 2.*student is on cpu: set CUDA_VIS"):
        run_trl(Method("sft"))
