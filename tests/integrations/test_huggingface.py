import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

from wmateacher import WMATeacher, kernels
from wmateacher.integrations.huggingface import (
    FILE,
    Comparison,
    TeacherCallback,
    TeacherMixin,
    TeacherTrainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")


class Sentences(Dataset):
    """24 sentences of 6 tokens, and which of two kinds each is."""

    def __init__(self, language=False, padded=False):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(20, (24, 6), generator=generator)
        self.language, self.padded = language, padded

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        tokens = self.tokens[i]
        if self.language and self.padded:  # the first tokens are a prompt, the last ones padding
            labels = tokens.clone()
            labels[: i % 3] = labels[6 - i % 4 :] = -100
            return {"input_ids": tokens, "labels": labels, "attention_mask": torch.arange(6) < 6 - i % 4}
        return {"input_ids": tokens, "labels": tokens if self.language else int(tokens.sum() > 57)}


def classifier():
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8,
        )
    )  # fmt: skip


def llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def language_model(dropout=0.0):
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )
    )  # fmt: skip


def arguments(folder, **options):
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **options})


class Watch(TrainerCallback):
    """Keeps what the student passed through."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.states.append(weights(model))
        optimizer.optimizer.register_step_post_hook(lambda *_: self.states.append(weights(model)))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("stopped here")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def assert_average(watch, teacher):
    expected = torch.from_numpy(teacher.trajectory_weights()) @ torch.stack(watch.states).double()
    torch.testing.assert_close(weights(teacher.module).double(), expected, rtol=1e-5, atol=1e-6)


# --- the callback -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 12), (2, 6), (4, 4)])
def test_optimizer_steps_count_and_the_trainer_gives_the_horizon(tmp_path, accumulated, steps):
    callback, watch = TeacherCallback(), Watch()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulated)
    trainer = Trainer(classifier(), args, train_dataset=Sentences(), callbacks=[callback, watch])
    trainer.train()
    teacher = callback.teacher
    assert teacher.step == teacher.total_steps == trainer.state.global_step == steps
    assert_average(watch, teacher)
    model = classifier()
    teacher.copy_to(model)
    assert torch.equal(weights(model), weights(teacher.module))


def test_a_run_shorter_than_its_horizon_warns(tmp_path):
    callback = TeacherCallback(total_steps=30)
    trainer = Trainer(classifier(), arguments(tmp_path), train_dataset=Sentences(), callbacks=[callback])
    with pytest.warns(UserWarning, match="counted 12 optimizer steps of a horizon of 30: .*total_steps=12"):
        trainer.train()


class Scaled(TeacherTrainer):
    """fp16's gradient scaler on a CPU, overflowing at the third step."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * (float("inf") if self.state.global_step == 2 else 1)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_a_gradient_scaler_skips_do_not_count(tmp_path, optim):
    watch, args = Watch(), arguments(tmp_path, max_grad_norm=0, optim=optim)
    trainer = Scaled(
        classifier(), args, train_dataset=Sentences(), callbacks=[watch], distillation=None,
        teacher_callback=TeacherCallback(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer.teacher.step == 11
    if optim == "adamw_torch_fused":  # whose kernel skips, so that the hook sees a state twice
        del watch.states[3]
    assert_average(watch, trainer.teacher)


# --- distillation -------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("build", [classifier, llama])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_distillation_is_a_mean_over_the_accumulated_batch(tmp_path, build, accumulated):
    """Its gradient is the whole batch's, whether the model divides its own loss by the batch or not.

    Prompts and padding of the sentences have different lengths, and change nothing.
    """
    data, other = Sentences(language=build is llama, padded=True), build()
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in other.parameters()]

    class Fixed(TeacherTrainer):
        teacher = property(lambda self: lambda **inputs: other.eval()(**inputs))

    def gradient(distill_weight):
        seen, model = Gradients(), build()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = arguments(
            tmp_path, per_device_train_batch_size=12 // accumulated,
            gradient_accumulation_steps=accumulated, max_steps=1, max_grad_norm=0,
        )  # fmt: skip
        trainer = Fixed(model, args, train_dataset=data, callbacks=[seen], distill_weight=distill_weight)
        trainer.train()
        return seen.first, trainer.state.log_history[0]["distillation"]

    reference, args = build().eval(), arguments(tmp_path, per_device_train_batch_size=12)
    batch = next(iter(Trainer(reference, args, train_dataset=data).get_train_dataloader()))
    with torch.no_grad():
        targets = other.eval()(**batch).logits
    logits, mask = reference(**batch).logits, torch.ones(12, dtype=bool)
    if build is llama:  # position i predicts token i + 1; the loss leaves the others out
        logits, targets, mask = logits[:, :-1], targets[:, :-1], batch["labels"][:, 1:] != -100
        assert 12 < mask.sum() < 50
    log_p, log_q = logits[mask].double().log_softmax(-1), targets[mask].double().log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected.backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    with_term, logged = gradient(2.0)
    torch.testing.assert_close(with_term - gradient(0.0)[0], 2.0 * expected_gradient, rtol=1e-3, atol=1e-5)
    assert logged == pytest.approx(expected.item(), rel=1e-4)


def test_the_mixin_works_with_any_trainer(tmp_path):
    class Halved(Trainer):
        def compute_loss(self, *args, **kwargs):
            assert not kwargs["return_outputs"]  # which costs a forward pass in some Trainers
            return 0.5 * super().compute_loss(*args, **kwargs)

    class Both(TeacherMixin, Halved):
        pass

    trainer = Both(classifier(), arguments(tmp_path), train_dataset=Sentences(), distillation="mse")
    trainer.train()
    assert trainer.teacher.step == 12
    logged = [e["distillation"] for e in trainer.state.log_history if "distillation" in e]
    assert len(logged) == 12
    assert all(value >= 0 for value in logged)
    assert logged[-1] > 0


# --- checkpoints --------------------------------------------------------------------------------------


def test_a_run_that_crashed_ends_with_the_same_bits(tmp_path):
    def trainer(folder, *callbacks):
        args = arguments(
            tmp_path / folder, save_strategy="steps", save_steps=2, save_total_limit=2,
            gradient_accumulation_steps=2, num_train_epochs=3,
        )  # fmt: skip
        return TeacherTrainer(
            language_model(dropout=0.2), args, train_dataset=Sentences(language=True),
            callbacks=list(callbacks), teacher_callback=TeacherCallback("beta(0.5,0.5)", buffers="average"),
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer("crashed", Stop(7)).train()
    kept = sorted(p.name for p in (tmp_path / "crashed").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    shutil.copytree(tmp_path / "crashed", tmp_path / "kept")
    for path in (True, str(tmp_path / "kept/checkpoint-4")):
        resumed = trainer("crashed")
        resumed.train(resume_from_checkpoint=path)
        assert torch.equal(weights(resumed.model), weights(whole.model))
        assert resumed.teacher.step == 9
        for name, value in whole.teacher.state_dict().items():
            ours = resumed.teacher.state_dict()[name]
            assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value


def test_the_last_checkpoint_is_resumed_whatever_folder_was_read_before(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    trainer = TeacherTrainer(classifier(), args, train_dataset=Sentences())
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.teacher.step == trainer.state.global_step == 6


def saving(tmp_path, epochs=2, **options):
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=epochs)
    return Trainer(classifier(), args, train_dataset=Sentences(), callbacks=[TeacherCallback(**options)])


@pytest.mark.slow
def test_a_longer_run_another_kernel_and_a_checkpoint_without_a_teacher(tmp_path):
    saving(tmp_path).train()
    longer = saving(tmp_path, epochs=3)
    with pytest.warns(UserWarning, match="the run is now 18 steps long, the teacher began with 12"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    with pytest.raises(
        ValueError, match="written with kernel='beta.0.5,0.5.', this teacher has kernel='unif"
    ):
        saving(tmp_path, epochs=3, kernel="uniform").train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"continues at step 18, .*resume_from=CHECKPOINT"):
        saving(tmp_path, epochs=4, resume_from=tmp_path / "elsewhere").train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-18" / FILE).unlink()
    without = saving(tmp_path, epochs=4)
    with pytest.warns(UserWarning, match=f"has no {FILE}: .* over the 6 steps that are left"):
        without.train(resume_from_checkpoint=True)
    (teacher,) = (c.teacher for c in without.callback_handler.callbacks if isinstance(c, TeacherCallback))
    assert teacher.step == teacher.total_steps == 6
    assert teacher.trajectory_weights() == pytest.approx(kernels.Beta(0.5, 0.5).profile(6))


def test_a_given_horizon_is_the_whole_runs_also_if_it_had_no_teacher(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    Trainer(classifier(), args, train_dataset=Sentences()).train()
    last = str(tmp_path / "checkpoint-2")
    callback = TeacherCallback(total_steps=4)
    trainer = Trainer(classifier(), args, train_dataset=Sentences(), callbacks=[callback])
    with pytest.warns(UserWarning, match=f"has no {FILE}: .* over the 2 steps that are left"):
        trainer.train(resume_from_checkpoint=last)
    assert callback.teacher.step == callback.teacher.total_steps == 2
    assert callback.teacher.trajectory_weights() == pytest.approx(kernels.Beta(0.5, 0.5).profile(2))
    short = TeacherCallback(total_steps=1)
    trainer = Trainer(classifier(), args, train_dataset=Sentences(), callbacks=[short])
    with pytest.raises(ValueError, match="total_steps=1 ends before step 2, .* from its beginning"):
        trainer.train(resume_from_checkpoint=last)


def test_the_trials_of_a_search_keep_their_teachers_in_their_own_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    callback = TeacherCallback()
    trainer = Trainer(args=args, model_init=classifier, train_dataset=Sentences(), callbacks=[callback])
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    averages = {}
    for number, folder in ((3, "run-3"), (5, "run-5"), (4, "fast/rate-4"), (2, "rate-2")):
        trainer.hp_name = None if folder.startswith("run-") else lambda trial, name=folder: name
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": number / 100}))
        averages[tmp_path / folder / "checkpoint-2" / FILE] = weights(callback.teacher.module)
    assert set(tmp_path.rglob(FILE)) == averages.keys()
    for file, average in averages.items():
        assert torch.equal(weights(callback.load(classifier(), file.parent).module), average)
    with pytest.raises(FileNotFoundError, match="one folder, but there are .*rate-2.*resume_from=CHECKPOINT"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run-3/checkpoint-2"))


def test_the_file_is_read_without_running_code(tmp_path):
    saving(tmp_path).train()
    state = torch.load(tmp_path / "checkpoint-6" / FILE, weights_only=True)
    assert state["total_steps"] == 12
    assert json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())["global_step"] == 6


# --- evaluation ---------------------------------------------------------------------------------------


def test_evaluation_with_the_teacher_leaves_the_student_its_weights(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch")
    trainer = TeacherTrainer(
        classifier(), args, train_dataset=Sentences(), eval_dataset=Sentences(), evaluate_with="teacher"
    )
    trainer.train()
    student = weights(trainer.model)
    measured = trainer.evaluate()["eval_loss"]
    assert torch.equal(weights(trainer.model), student)
    batch = {k: torch.as_tensor([Sentences()[i][k].tolist() if k == "input_ids" else Sentences()[i][k]
                                 for i in range(24)]) for k in ("input_ids", "labels")}  # fmt: skip
    with torch.no_grad():
        assert measured == pytest.approx(trainer.teacher(**batch).loss.item(), rel=1e-4)
        assert measured != pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-4)

    def fails(*args, **kwargs):
        raise ZeroDivisionError

    trainer.prediction_step = fails
    with pytest.raises(ZeroDivisionError):
        trainer.predict(Sentences())
    assert torch.equal(weights(trainer.model), student)
    trainer.model.state_dict()  # not lent any more


def evaluated(model):
    """The loss over all sentences."""
    rows = [Sentences()[i] for i in range(24)]
    batch = {
        "input_ids": torch.stack([r["input_ids"] for r in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def test_the_best_average_is_saved_restored_and_evaluated_in_a_new_process(tmp_path):
    """The metric of each checkpoint is its average's, and so is what the best of them leaves in the model."""
    args = arguments(
        tmp_path, eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3, learning_rate=0.1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = TeacherTrainer(
        classifier(), args, train_dataset=Sentences(), eval_dataset=Sentences(), evaluate_with="teacher",
        teacher_callback=TeacherCallback(save_average=True), processing_class=Processor(),
    )  # fmt: skip
    trainer.train()
    metrics = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(metrics, key=metrics.get)
    assert best < 12  # or there is nothing to restore
    folder = tmp_path / f"checkpoint-{best}"
    for model in (trainer.model, trainer.teacher.module):
        assert evaluated(model) == pytest.approx(metrics[best], rel=1e-5)
    assert trainer.teacher.step == best
    assert (folder / "average" / "processor.txt").read_text() == "saved"
    for step, metric in metrics.items():
        average = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}" / "average")
        assert evaluated(average) == pytest.approx(metric, rel=1e-5)
    # A new process has no teacher until it reads one.
    for model, callback in [
        (BertForSequenceClassification.from_pretrained(folder), TeacherCallback()),
        (classifier(), TeacherCallback(resume_from=folder)),
    ]:
        student = weights(model)
        new = TeacherTrainer(
            model, args, eval_dataset=Sentences(), evaluate_with="teacher", teacher_callback=callback
        )
        assert new.evaluate()["eval_loss"] == pytest.approx(metrics[best], rel=1e-5)
        assert torch.equal(weights(model), student)
    without = TeacherTrainer(classifier(), args, eval_dataset=Sentences(), evaluate_with="teacher")
    with pytest.raises(
        RuntimeError, match=r"there is no teacher yet.*TeacherCallback\(resume_from=CHECKPOINT\)"
    ):
        without.evaluate()
    with pytest.raises(RuntimeError, match="there is no teacher yet"):
        without.predict(Sentences())
    nowhere = TeacherCallback(resume_from=tmp_path)
    without = TeacherTrainer(
        classifier(), args, eval_dataset=Sentences(), evaluate_with="teacher", teacher_callback=nowhere
    )
    with pytest.raises(FileNotFoundError, match="there is no teacher.pt in"):
        without.evaluate()


class Processor:
    """What the Trainer saves as its `processing_class`."""

    model_input_names = ("input_ids",)

    def save_pretrained(self, folder):
        (Path(folder) / "processor.txt").write_text("saved")


class Rows(Dataset):
    """Rows of a given batch, with what the Trainer's own collator makes of them."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def first_step(tmp_path, data, model, **options):
    """The Trainer after two steps on one batch, and the distillation in the second."""
    args = arguments(
        tmp_path, max_steps=2, per_device_train_batch_size=len(data), remove_unused_columns=False
    )
    trainer = TeacherTrainer(model, args, train_dataset=data, **options)
    trainer.train()
    return trainer, [e["distillation"] for e in trainer.state.log_history if "distillation" in e]


def test_the_teacher_sees_a_context_that_the_model_does_not(tmp_path):
    """The loss compares the same answer; the columns `teacher_*` are hidden from the model."""
    torch.manual_seed(0)
    tokens, context = torch.randint(1, 20, (4, 6)), torch.randint(1, 20, (4, 3))
    labels = tokens.clone()

    def lively():
        model = llama()
        torch.nn.init.normal_(model.lm_head.weight)
        return model

    labels[:, :2] = -100
    longer = {
        "input_ids": torch.cat([context, tokens], 1),
        "labels": torch.cat([torch.full_like(context, -100), labels], 1),
    }
    data = Rows(input_ids=tokens, labels=labels, **{f"teacher_{k}": v for k, v in longer.items()})
    _, (term, _) = first_step(tmp_path, data, lively())
    with torch.no_grad():  # at the first step the teacher is the student
        log_q = lively()(input_ids=longer["input_ids"]).logits[:, 4:8].double().log_softmax(-1)
        log_p = lively()(input_ids=tokens).logits[:, 1:5].double().log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()
    assert term == pytest.approx(expected, rel=1e-4)
    plain = Rows(input_ids=tokens, labels=labels)

    def view(inputs):  # of the rows in their order in the batch
        order = [tokens.tolist().index(row) for row in inputs["input_ids"].tolist()]
        return {name: column[order] for name, column in longer.items()}

    _, (given, _) = first_step(tmp_path, plain, lively(), teacher_inputs=view)
    assert given == term
    trainer, _ = first_step(tmp_path, data, lively(), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"which positions of the logits \[4, 9, 20\] count without labels"):
        first_step(tmp_path, plain, lively(), teacher_inputs=lambda i: {"input_ids": longer["input_ids"]})
    shifted = {"input_ids": tokens.roll(1, 1)}  # of the same length, but the answers stand elsewhere
    with pytest.raises(ValueError, match="other tokens than the model's labels .* return labels, too"):
        first_step(tmp_path, plain, lively(), teacher_inputs=lambda i: {**i, **shifted})
    with pytest.raises(TypeError, match="teacher_inputs must return .*, got NoneType: return the batch"):
        first_step(tmp_path, plain, lively(), teacher_inputs=lambda i: None)


def test_a_regression_learns_from_its_values_and_refuses_probabilities(tmp_path):
    tokens = torch.randint(20, (4, 6))
    data = Rows(input_ids=tokens, labels=torch.arange(4.0))
    config = classifier().config
    config.num_labels = 1
    _, terms = first_step(tmp_path, data, BertForSequenceClassification(config))
    assert terms[1] > 0  # the model has dropout
    config.problem_type = None
    with pytest.raises(
        ValueError, match=r"'kl' is always 0 for the outputs of a regression.*use .*mse\(logits\)"
    ):
        first_step(tmp_path, data, BertForSequenceClassification(config), distillation="kl")
    with pytest.raises(
        ValueError, match="'fd' compares paired, but this model returns logits: choose from .*kl"
    ):
        first_step(tmp_path, data, BertForSequenceClassification(config), distillation="fd")


def test_a_distillation_that_is_exactly_0_is_reported_once(tmp_path):
    class Headless(TeacherTrainer):
        def outputs_to_compare(self, outputs, inputs):
            return Comparison(torch.zeros(4, 3))

    data = Rows(input_ids=torch.randint(20, (4, 6)), labels=torch.tensor([0, 1, 0, 1]))
    args = arguments(tmp_path, max_steps=6)
    trainer = Headless(classifier(), args, train_dataset=data)
    with pytest.warns(UserWarning, match="exactly 0, although the teacher's weights differ") as caught:
        trainer.train()
    assert len([w for w in caught if "exactly 0" in str(w.message)]) == 1
    same = TeacherTrainer(llama(), args, train_dataset=Rows(input_ids=data.columns["input_ids"]))
    same.compute_loss = lambda *unused, **kwargs: sum(p.sum() * 0 for p in same.model.parameters())
    same.train()  # weights that do not move have a right to a distillation of 0


class Fused(Trainer):
    """A Trainer that computes its loss without building the logits, as those of TRL and Liger's kernels do."""

    forwards = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def forward(**kwargs):
            return {"loss": original(**kwargs).loss}

        original, base = model.forward, model
        base.forward = forward
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            del base.forward


def test_logits_that_the_trainer_did_not_build_are_computed(tmp_path):
    class Both(TeacherMixin, Fused):
        pass

    tokens = torch.randint(1, 20, (4, 6))
    args = arguments(tmp_path, max_steps=2, max_grad_norm=0)
    runs = []
    for kind in (Both, TeacherTrainer):
        trainer = kind(llama(), args, train_dataset=Rows(input_ids=tokens, labels=tokens), distill_weight=5.0)
        trainer.train()
        runs.append((trainer, [e["distillation"] for e in trainer.state.log_history if "distillation" in e]))
    assert runs[0][1] == pytest.approx(runs[1][1])
    assert runs[0][1][1] > 0
    torch.testing.assert_close(weights(runs[0][0].model), weights(runs[1][0].model))


def test_without_distillation_nothing_is_added(tmp_path):
    class Counting(Trainer):
        given = ()

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            self.given = (*self.given, return_outputs)
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    class Both(TeacherMixin, Counting):
        pass

    trainer = Both(
        classifier(), arguments(tmp_path, max_steps=2), train_dataset=Sentences(), distillation=None
    )
    trainer.train()
    assert trainer.given == (False, False)
    assert trainer.teacher.step == 2
    assert not any("distillation" in e for e in trainer.state.log_history)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's call
def test_a_lora_teacher_costs_the_adapter(tmp_path):
    model = get_peft_model(classifier(), LoraConfig(target_modules=["query", "value"], r=2))
    trainer = TeacherTrainer(
        model, arguments(tmp_path, save_strategy="epoch"), train_dataset=Sentences(),
        teacher_callback=TeacherCallback(save_average=True),
    )  # fmt: skip
    trainer.train()
    state = torch.load(tmp_path / "checkpoint-12" / FILE, weights_only=True)["teacher"]
    assert all("lora_" in name for name in state if name != "_extra_state")
    assert len(state) == 5
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = dict(trainer.teacher.module.named_parameters())
    assert not any(torch.equal(own[n], p) for n, p in trained.items())
    shared = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(own[n].data_ptr() == dict(model.named_parameters())[n].data_ptr() for n in shared)
    saved = PeftModel.from_pretrained(classifier(), tmp_path / "checkpoint-12" / "average").eval()
    tokens = Sentences().tokens
    torch.testing.assert_close(saved(tokens).logits, trainer.teacher(tokens).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's call
@pytest.mark.parametrize("plain", [False, True], ids=["TeacherTrainer", "Trainer"])
def test_a_resumed_run_does_not_train_beside_its_averaged_adapter(plain, tmp_path):
    """A Trainer loads each folder in a checkpoint that holds an adapter as one more adapter of the model."""

    def run(folder, resume=None):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["query", "value"], r=2, modules_to_save=["classifier"])
        callback = TeacherCallback(save_average=True)
        given = {"callbacks": [callback]} if plain else {"teacher_callback": callback}
        trainer = (Trainer if plain else TeacherTrainer)(
            get_peft_model(classifier(), lora), arguments(folder, save_strategy="steps", save_steps=6),
            train_dataset=Sentences(), **given,
        )  # fmt: skip
        if plain and resume:
            callback.resume_from = resume
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, callback.teacher

    model, teacher = run(tmp_path / "whole")
    resumed, continued = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert list(resumed.peft_config) == ["default"]
    for one, other in ((model, resumed), (teacher.module, continued.module)):
        expected = one.state_dict()
        assert expected.keys() == other.state_dict().keys()
        assert all(torch.equal(expected[n], t) for n, t in other.state_dict().items())


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_arguments_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match="unknown weights for evaluate_with 'techer'; did you mean 'teacher'"
    ):
        TeacherTrainer(classifier(), arguments(tmp_path), evaluate_with="techer")
    with pytest.raises(
        ValueError, match="compares features, but models of transformers return logits: choose from .*kl"
    ):
        TeacherTrainer(classifier(), arguments(tmp_path), distillation="cosine")
    with pytest.raises(TypeError, match="teacher_inputs must be a function of the batch, got 'context'"):
        TeacherTrainer(classifier(), arguments(tmp_path), teacher_inputs="context")
    with pytest.raises(ValueError, match="distill_weight must be a number of at least 0, got '1'"):
        TeacherTrainer(classifier(), arguments(tmp_path), distill_weight="1")
    with pytest.raises(
        TypeError, match=r"teacher_callback must be a TeacherCallback, got 'uniform': TeacherCallback\(ker"
    ):
        TeacherTrainer(classifier(), arguments(tmp_path), teacher_callback="uniform")
    for settings, message in (
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1, got 0"),
        ({"kernel": "betta(1,1)"}, "unknown kernel 'betta'; did you mean 'beta'"),
        ({"buffer": "keep"}, "unknown option of TeacherCallback 'buffer'; did you mean 'buffers'"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherCallback(**settings)
    with pytest.raises(ValueError, match="unknown loss 'kll'; did you mean 'kl'"):
        TeacherTrainer(classifier(), arguments(tmp_path), distillation="kll")


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [n for n in sys.modules if n.startswith("wmateacher.integrations.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'wmateacher\[huggingface\]'"):
        importlib.import_module("wmateacher.integrations.huggingface")


# --- processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each rank asserts in the program: counts, the definition of the average, resuming."""
    for rank in programs.launch(2, Path(__file__).parent / "huggingface_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert rank.stdout.count("average is right") == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_teacher_of_a_model_with_gradient_checkpointing_computes_with_the_average():
    student = language_model()
    student.gradient_checkpointing_enable()
    student.enable_input_require_grads()
    original = student.forward
    student.forward = lambda **inputs: original(**inputs)
    teacher = WMATeacher(student, "ema(0.5)")
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update()
    fresh = language_model()
    fresh.load_state_dict(teacher.averaged_state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(teacher(input_ids=tokens).logits, fresh.eval()(input_ids=tokens).logits)
