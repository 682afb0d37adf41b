import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wmateacher import kernels
from wmateacher.integrations.language import data, model
from wmateacher.integrations.language.data import END, Question, World, demonstrate
from wmateacher.integrations.language.evaluation import accuracy, scores
from wmateacher.integrations.language.experiment import Experiment
from wmateacher.integrations.language.recipes import RECIPES, START, Method, Recipe, Settings
from wmateacher.integrations.language.training import Learning, fit

SETTINGS = Settings(steps=6, learning_rate=1e-2, warmup=2, batch_size=4, checkpoint_every=2)
RECIPE = replace(
    RECIPES["facts"], symbols=6, old_facts=8, new_facts=6, questions=5, width=16, depth=1,
    pretrain=replace(SETTINGS, steps=4), settings=SETTINGS,
)  # fmt: skip
WORLD = World(6, 8, 6, ("reverse", "successor"), "facts", 0)


PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Stopped(Exception):
    pass


def network(seed=7):
    torch.manual_seed(seed)
    return model.build(6, 16, 1)


def run(method, stop_after=None, student=None, world=WORLD, settings=SETTINGS, **options):
    def stop(step):
        if step == stop_after:
            raise Stopped

    questions = world.later(settings.batch_size)
    return fit(student or network(), method, questions, settings, progress=False, after_step=stop, **options)


def shown(tokens):
    """The symbols among tokens."""
    return [t - data.vocabulary(0) for t in tokens if t >= data.vocabulary(0)]


def test_skills_answer_what_their_names_say():
    exam = World(6, 8, 6, ("reverse", "successor"), "rotate", 0).examination("test", 20)
    assert list(exam) == ["new", "facts", "reverse", "successor", "demonstration"]
    for question in exam["reverse"]:
        assert shown(question.answer) == shown(question.prompt)[::-1]
    for question in exam["successor"]:
        assert shown(question.answer) == [(s + 1) % 6 for s in shown(question.prompt)]
    for question in exam["new"]:
        first, *rest = shown(question.prompt)
        assert shown(question.answer) == [*rest, first]
    for question in exam["demonstration"]:
        assert tuple(question.prompt)[question.prompt.index(data.THEN) - len(question.answer) + 1 :][
            : len(question.answer) - 1
        ] == tuple(question.answer[:-1])
    assert all(q.answer[-1] == END for questions in exam.values() for q in questions)


def test_new_facts_are_not_among_the_old_and_the_parts_share_none():
    old, new = ({q.prompt for q in facts} for facts in (WORLD.old_facts, WORLD.new_facts))
    assert (len(old), len(new)) == (8, 6)
    assert not old & new
    seen = {q.prompt for batch, _ in zip(WORLD.earlier(12)(0), range(30), strict=False) for q in batch}
    assert old <= seen
    assert not new & seen
    validation, test = (WORLD.examination(part, 50) for part in ("validation", "test"))
    for name in ("new", "facts"):
        assert not {q.prompt for q in validation[name]} & {q.prompt for q in test[name]}
    assert {q.prompt for q in next(WORLD.later(6)(0))} == new


def test_batches_depend_on_seed_and_step_alone():
    stream = WORLD.earlier(9)
    batches = [batch for batch, _ in zip(stream(0), range(4), strict=False)]
    assert next(stream(3)) == batches[3]
    assert batches[0] != batches[1]
    assert next(World(6, 8, 6, ("reverse", "successor"), "facts", 1).earlier(9)(0)) != batches[0]


def test_logits_are_those_of_each_answer_alone_whatever_the_padding():
    student = network()
    questions = [
        *WORLD.old_facts[:3],
        demonstrate(WORLD.old_facts[3]),
        *WORLD.examination("test", 2)["reverse"],
    ]
    logits, tokens = (
        model.answer_logits(student, questions),
        model.answer_tokens(questions, torch.device("cpu")),
    )
    expected = []
    for q in questions:
        every = student(input_ids=torch.tensor([q.prompt + q.answer])).logits[0]
        expected.append(every[len(q.prompt) - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(expected))
    assert tokens.tolist() == [token for q in questions for token in q.answer]


class Script(nn.Module):
    """A language model that is certain of the token after each token."""

    def __init__(self, after):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.after = after

    def forward(self, input_ids):
        logits = torch.full((*input_ids.shape, 12), -1e4)
        following = torch.tensor([self.after.get(t, 0) for t in range(12)])[input_ids]
        return type("Output", (), {"logits": logits.scatter(-1, following[..., None], 1e4)})


def test_sampled_answers_end_at_the_end_or_at_the_longest():
    script = Script({5: 7, 7: END, 6: 8, 8: 8})
    short, long = model.sample(script, [(9, 5), (4, 9, 6)], 3)
    assert short == Question((9, 5), (7, END))
    assert long == Question((4, 9, 6), (8, 8, 8))


def test_an_answer_is_right_if_all_of_it_is():
    script = Script({5: 7, 7: END})
    assert accuracy(script, [Question((5,), (7, END)), Question((4, 5), (7, 7)), Question((7,), (END,))]) == (
        pytest.approx(200 / 3)
    )
    exam = {"new": [Question((5,), (9, END))], "a": [Question((5,), (7, END))], "b": [Question((5,), (END,))]}
    assert scores(script, exam) == {"new": 0, "a": 100, "b": 0, "kept": 50}
    assert script.training


def log_softmax(logits):
    logits = logits.detach().double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_answer(network, prompt, answer):
    logits = network(input_ids=torch.tensor([prompt + answer])).logits[0]
    return log_softmax(logits[len(prompt) - 1 : -1])


@pytest.mark.parametrize("kind", ["sft", "sdft"])
def test_the_loss_is_the_formula(kind, monkeypatch):
    """A float64 oracle, one question at a time; the teacher of sdft alone sees the demonstration."""
    student = network()
    task = Learning(student, Method("mine", kind, "static", 0.3), WORLD.later(4), SETTINGS)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    questions = next(WORLD.later(4)(0))
    answered = [Question(q.prompt, (5, *q.answer)) for q in questions]
    drawn = []
    monkeypatch.setattr(
        "wmateacher.integrations.language.training.sample",
        lambda *arguments: drawn.append(arguments) or answered,
    )
    ce, kl, count = 0.0, 0.0, 0
    for right, taken in zip(questions, answered if kind == "sdft" else questions, strict=True):
        context = demonstrate(right).prompt if kind == "sdft" else right.prompt
        q, p = (
            of_answer(student, right.prompt, taken.answer),
            of_answer(task.teacher.module, context, taken.answer),
        )
        kl += (np.exp(p) * (p - q)).sum()
        ce -= q[np.arange(len(taken.answer)), list(taken.answer)].sum()
        count += len(taken.answer)
    expected = (kl if kind == "sdft" else ce + 0.3 * kl) / count
    assert kl > 0.01
    assert task.train_step(0)["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert len(drawn) == (kind == "sdft")
    if drawn:
        assert drawn[0][0] is student
        assert drawn[0][1] == [q.prompt for q in questions]


def test_a_live_teacher_of_sft_changes_nothing_and_is_left_out():
    ones = [run(m).student.state_dict() for m in (Method("sft"), Method("live", "sft", "ema(0)"))]
    assert all(torch.equal(value, ones[1][key]) for key, value in ones[0].items())
    assert list(RECIPE.with_kernels(("sft-teacher", "sdft"), ("ema(0)",)).methods) == ["sdft ema(0.0)"]


def test_a_live_teacher_is_the_student_after_every_step():
    fitted = run(Method("live", "sdft", "ema(0)"))
    assert fitted.history.values("gap") == [0.0] * 6
    assert all(map(math.isfinite, fitted.history.values("loss")))


@PEFT_WARNS
def test_lora_trains_adapters_alone_and_the_teacher_shares_the_rest():
    student = model.with_lora(network(), 2)
    start = {n: p.detach().clone() for n, p in student.named_parameters()}
    fitted = run(Method("mine", "sft", "beta(0.5,0.5)"), student=student)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora" not in name), name
    assert all("lora" in name for name in fitted.teacher.state_dict() if name.endswith("weight"))
    with torch.no_grad():
        ours, theirs = (
            model.answer_logits(n, WORLD.old_facts) for n in (fitted.student, fitted.teacher.module)
        )
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "method", [Method("sft"), Method("teacher", "sft", "ema(0.5)"), Method("sdft", "sdft", "beta(0.5,0.5)")]
)
def test_a_resumed_run_ends_bit_identical(tmp_path, method):
    file = tmp_path / "run.pt"
    whole = run(method)
    for stop_after in (1, 3, 5):
        with pytest.raises(Stopped):
            run(method, stop_after, checkpoint=file)
    resumed = run(method, checkpoint=file)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key
    assert whole.history.series == resumed.history.series


def test_an_experiment_pretrains_once_and_keeps_its_records(tmp_path):
    recipe = RECIPE.with_kernels(("sft", "sdft"), ("static",))
    run = Experiment(recipe, tmp_path, progress=False)
    names = [START, *recipe.methods]
    assert names == ["start", "sft", "sdft static"]
    start, sft, sdft = (run.run(name, seed) for seed, name in [(0, n) for n in names])
    pretraining = tmp_path / "checkpoints/pre-training-0.pt"
    written = pretraining.stat().st_mtime_ns
    assert set(start["student"]) == {"new", "kept", "facts", "reverse", "successor", "demonstration"}
    assert start["teacher"] is sft["teacher"] is None
    assert sdft["final_gap"] > 0
    gaps = run.file("gaps", "sdft static", 0).read_text().split()
    assert gaps[:2] == ["step,gap", "0,0.0"]
    assert len(gaps) == 2 + SETTINGS.steps
    validation = World(6, 8, 6, ("reverse", "successor"), "facts", 0).examination("validation", 5)
    before = scores(run.pretrained(0), validation)
    curve = run.file("curves", "sft", 0).read_text().split()
    assert curve[1] == f"0,{before['new']},{before['kept']}"
    assert len(curve) == 2 + SETTINGS.steps
    assert not run.file("gaps", "sft", 0).exists()
    again = Experiment(recipe, tmp_path, progress=False)
    assert again.run("sdft static") == sdft
    assert again.pretrained(0).state_dict().keys() == run.pretrained(0).state_dict().keys()
    assert pretraining.stat().st_mtime_ns == written
    content = json.loads(Path(tmp_path / "results.json").read_text())
    assert [len(m["runs"]) for m in content["methods"].values()] == [1, 1, 1]


def test_seeds_differ_in_everything_and_methods_of_one_seed_start_alike(tmp_path):
    run = Experiment(RECIPE, tmp_path, progress=False)
    first, again, other = (run.pretrained(seed).state_dict() for seed in (0, 0, 1))
    name = "model.embed_tokens.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_new_facts_are_learned():
    fitted = run(Method("sft"), settings=replace(SETTINGS, steps=100, learning_rate=3e-2, batch_size=6))
    assert accuracy(fitted.student, WORLD.new_facts) == 100


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: World(3, 8, 6, (), "facts", 0),
            "old_facts=8 and new_facts=6 need .* symbols=3 makes 9: raise",
        ),
        (lambda: replace(RECIPE, new="revers"), "unknown new 'revers'; did you mean 'reverse'"),
        (lambda: replace(RECIPE, new="reverse"), "not 'reverse', which is new"),
        (lambda: replace(RECIPE, width=20), "width must be a multiple of 16, .*, got 20"),
        (lambda: replace(RECIPE, lora_rank=-1), "lora_rank must be at least 0, got -1"),
        (lambda: Method("m", "sdtf"), "unknown kind 'sdtf'; did you mean 'sdft'"),
        (lambda: Method("m", "sdft"), "sdft learns from a teacher alone: .* give a kernel"),
        (lambda: Method("m", kernel="static", distill_weight=0), "distill_weight must be above 0, got 0"),
        (lambda: Method("m", distillation="klx"), "unknown loss 'klx'; did you mean 'kl'"),
        (lambda: Method("m", distillation="fd"), "distillation='fd' does not compare logits"),
        (lambda: RECIPE.with_kernels(("stf",), ()), "unknown method 'stf'; did you mean 'sft'"),
        (lambda: RECIPE.with_kernels(("sdft",), ("statc",)), "unknown kernel 'statc'; did you mean 'static'"),
    ],
)
def test_what_cannot_be_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_chosen_for_a_kernel_are_used_in_either_spelling():
    recipe: Recipe = replace(RECIPE, distill_weights={"beta(0.5,0.5)": 3.0})
    found = recipe.with_kernels(("sft-teacher", "sdft"), ("beta(0.5, 0.5)", "static")).methods
    assert [m.distill_weight for m in found.values()] == [3.0, 1.0, None, None]
    assert next(iter(found)) == f"sft-teacher {kernels.build('beta(0.5,0.5)')}"


@pytest.mark.parametrize(
    ("package", "message"),
    [("peft", "lora_rank needs PEFT: pip install"), ("transformers", "needs Transformers: pip install")],
)
def test_missing_packages_are_named_before_the_pre_training(tmp_path, monkeypatch, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        Experiment(replace(RECIPE, lora_rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
