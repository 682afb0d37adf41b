"""The average in TRL's own trainers, against the teachers and references that TRL keeps itself."""

import copy
import importlib
from pathlib import Path

import programs
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_huggingface import Watch, assert_average, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental import sdft, sdpo

from wmateacher.integrations import trl as ours
from wmateacher.integrations.huggingface import FILE
from wmateacher.integrations.trl import SDFTTrainer, SDPOTrainer, TeacherCallback

# TRL and peft use names that transformers has replaced since.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def language_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model, from which TRL loads its own teachers and references."""
    made = tmp_path_factory.mktemp("model")
    language_model().save_pretrained(made)
    return str(made)


PAIRS = [(a, b) for a in "abcd" for b in "efgh"]
CHATS = [
    {"prompt": [{"role": "user", "content": f"{a} {b}"}], "privileged_context": f"{b} {a}"} for a, b in PAIRS
]
PREFERENCES = [{"prompt": f"{a} {b}", "chosen": " c d", "rejected": " x y z"} for a, b in PAIRS]
JUDGED = [{"prompt": f"{a} {b}", "completion": " c d", "label": b in "ef"} for a, b in PAIRS]
PROMPTS = [{"prompt": f"{a} {b}"} for a, b in PAIRS]


def reward(completions, **kwargs):
    """A number that differs between almost all answers."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(i * ord(letter) for i, letter in enumerate(text)) / 1000 for text in texts]


def arguments(kind, folder, **options):
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
        "dataloader_pin_memory": False, "activation_checkpointing": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**defaults, **options})


def distil(
    trainer, folder, model=None, config=sdft.SDFTConfig, callback="beta(0.5,0.5)", peft=None, **options
):
    """A trainer of self-distillation on CHATS; one of TRL's own if `callback` is None."""
    given = {} if callback is None else {"teacher_callback": TeacherCallback(callback)}
    if config is sdpo.SDPOConfig:
        given["reward_funcs"] = reward
        options["include_environment_feedback"] = True
    else:
        options = {"distillation_mode": "full_logits", "distillation_topk": None, **options}
    return trainer(
        language_model() if model is None else model,
        args=arguments(config, folder, max_completion_length=4, num_generations=2, **options),
        train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer(), peft_config=peft, **given,
    )  # fmt: skip


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


# --- self-distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SDFT", "SDPO"])
def test_an_ema_is_the_teacher_that_trl_keeps(tmp_path, folder, kind):
    """Equal to float precision: TRL rounds (1 - a) t + a s in the model's dtype, which is a lerp otherwise."""
    own, averaged = (
        getattr({"SDFT": sdft, "SDPO": sdpo}[kind], f"{kind}Trainer"),
        getattr(ours, f"{kind}Trainer"),
    )
    config = getattr({"SDFT": sdft, "SDPO": sdpo}[kind], f"{kind}Config")

    def loaded():
        return LlamaForCausalLM.from_pretrained(folder)

    watch = Watch()
    mine = distil(averaged, tmp_path, loaded(), config, "ema(0.95)")
    mine.add_callback(watch)
    assert mine.teacher_model is mine.model  # as it is before training
    mine.train()
    theirs = distil(own, tmp_path, loaded(), config, None, teacher_model_kind="ema", teacher_update_rate=0.05)
    theirs.train()
    assert mine.teacher_model is mine.teacher
    assert mine.teacher.step == 3
    assert_average(watch, mine.teacher)
    assert (weights(mine.teacher.module) - weights(mine.model)).abs().max() > 1e-3
    torch.testing.assert_close(weights(mine.teacher.module), weights(theirs.teacher_model), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses(mine), losses(theirs), rtol=0, atol=1e-6)


def test_a_lora_teacher_costs_the_adapter_and_resumes(tmp_path):
    """With accumulated gradients, gradient checkpointing and bf16 autocast."""
    options = {
        "gradient_accumulation_steps": 2, "activation_checkpointing": True, "bf16": True, "save_strategy": "steps",
        "save_steps": 2, "max_steps": 4,
    }  # fmt: skip

    def trainer(name):
        return distil(SDFTTrainer, tmp_path / name, peft=copy.deepcopy(LORA), **options)

    watch, whole = Watch(), trainer("whole")
    whole.add_callback(watch)
    start = weights(whole.model)
    factors = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    teacher = whole.teacher
    assert teacher.step == teacher.total_steps == 4
    assert_average(watch, teacher)
    assert set(teacher.roles.averaged) == set(factors)
    assert torch.equal(watch.states[0], start)  # of which the average begins, and not of zeros
    named = dict(whole.model.named_parameters())
    assert all(
        p is named[name] for name, p in teacher.module.named_parameters() if name in teacher.roles.shared
    )
    saved = torch.load(tmp_path / "whole/checkpoint-2" / FILE, weights_only=True)["teacher"]
    assert sum(v.numel() for v in saved.values() if isinstance(v, torch.Tensor)) < 2 * sum(
        p.numel() for p in factors.values()
    )
    # The teacher computes and generates with the average.
    fresh = get_peft_model(language_model(), copy.deepcopy(LORA))
    teacher.copy_to(fresh)
    tokens = torch.tensor([[3, 4, 5]])
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which the teacher's forward has of itself
        expected = fresh.eval()(input_ids=tokens).logits.float()
        generated = fresh.generate(tokens, **asked)
    assert torch.equal(teacher(input_ids=tokens).logits, expected)
    assert torch.equal(teacher.module.generate(tokens, **asked), generated)

    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(weights(resumed.teacher.module), weights(teacher.module))


def test_sft_learns_from_the_average_on_its_answers(tmp_path):
    rows = [{"prompt": f"{a} {b}", "completion": " c d e"} for a, b in PAIRS]
    trainer = ours.SFTTrainer(
        language_model(), args=arguments(trl.SFTConfig, tmp_path, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        teacher_callback=TeacherCallback("uniform"), distillation="kl", distill_weight=2.0,
    )  # fmt: skip
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert_average(watch, trainer.teacher)
    logged = [entry["distillation"] for entry in trainer.state.log_history if "distillation" in entry]
    assert logged[0] == 0
    assert logged[1] > 0
    batch = next(iter(trainer.get_train_dataloader()))
    model, items = trainer.model.train(), (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    own = trl.SFTTrainer.compute_loss(trainer, model, dict(batch), num_items_in_batch=items)
    with torch.no_grad():
        student, teacher = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
            for m in (model, trainer.teacher)
        )
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    per_token = (p.exp() * (p - q)).sum(-1)
    expected = per_token[batch["labels"][:, 1:] != -100].mean()
    torch.testing.assert_close(loss - own, 2 * expected.float(), rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss - own, model.lm_head.weight)
    assert gradient.abs().max() > 0


# --- reference models ---------------------------------------------------------------------------------

REFERRING = {
    "DPO": (PREFERENCES, {}, {}),
    "KTO": (JUDGED, {}, {}),
    "GRPO": (
        PROMPTS,
        {"beta": 0.1, "max_completion_length": 4, "num_generations": 2},
        {"reward_funcs": reward},
    ),
    "RLOO": (
        PROMPTS,
        {"beta": 0.1, "max_completion_length": 4, "num_generations": 2},
        {"reward_funcs": reward},
    ),
}


def refer(kind, folder, model, *, own=False, callback=None, peft=None, ref_model=None, **options):
    """A trainer with a reference model, on its kind of data; TRL's own or ours."""
    data, settings, given = REFERRING[kind]
    if not own:
        given = {**given, "teacher_callback": callback}
    if ref_model is not None:
        given = {**given, "ref_model": ref_model}
    return getattr(trl if own else ours, f"{kind}Trainer")(
        model,
        args=arguments(getattr(trl, f"{kind}Config"), folder, **{**settings, **options}),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer(), peft_config=peft, **given,
    )  # fmt: skip


@pytest.mark.parametrize("kind", REFERRING)
def test_the_reference_is_the_average_as_if_trl_had_synchronised_it(tmp_path, folder, kind):
    mine = refer(kind, tmp_path, language_model(), callback=TeacherCallback("ema(0.4)"))
    mine.train()
    model = LlamaForCausalLM.from_pretrained(folder)
    theirs = refer(
        kind, tmp_path, model, own=True, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.6
    )  # fmt: skip
    theirs.train()
    assert mine.ref_model is mine.teacher
    assert (weights(mine.teacher.module) - weights(mine.model)).abs().max() > 1e-3
    torch.testing.assert_close(weights(mine.teacher.module), weights(theirs.ref_model), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses(mine), losses(theirs), rtol=0, atol=1e-5)
    if "beta" in REFERRING[kind][1]:
        assert mine.args.beta == mine.beta == 0.1


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_the_reference_of_an_adapter_is_the_average_of_adapters(tmp_path, kind):
    model = get_peft_model(language_model(), copy.deepcopy(LORA))
    trainer = refer(kind, tmp_path, model, callback=TeacherCallback("uniform"))
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert "ref" not in model.peft_config  # TRL would copy the adapter to stand for the reference
    assert_average(watch, trainer.teacher)
    # What TRL asks of a reference: log-probabilities by its patched forward, which must use the average.
    fresh = get_peft_model(language_model(), copy.deepcopy(LORA))
    trainer.teacher.copy_to(fresh)
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        found = trainer.ref_model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
        logits = fresh.eval()(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found, logits.gather(-1, tokens[:, 1:, None]).squeeze(-1))


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model_kind": "live"}, "teacher_model_kind='live' asks for TRL's own teacher.*'static'"),
        ({"teacher_update_rate": 0.1}, r"teacher_update_rate=0.1 .* no effect .*ema\(DECAY\)"),
        ({"teacher_sync_steps": 5}, r"teacher_sync_steps=5 .*update_every"),
    ],
)
def test_settings_of_trls_own_teacher_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        distil(SDFTTrainer, tmp_path, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("DPO", {"sync_ref_model": True}, "sync_ref_model=True .*ema"),
        ("KTO", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True .* moves in training"),
        ("DPO", {"ref_model": torch.nn.Linear(1, 1)}, r"ref_model=Linear would be ignored.*trl\.DPOTrainer"),
        ("GRPO", {"beta": 0.0}, "beta=0 leaves the reference model out"),
        ("RLOO", {"sync_ref_model": True}, "sync_ref_model=True"),
    ],
)
def test_settings_of_trls_own_reference_are_refused(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        refer(kind, tmp_path, None, **options)


def test_sharded_models_are_refused(tmp_path):
    args = arguments(trl.KTOConfig, tmp_path)
    args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="fsdp= is not supported by .*DDP"):
        ours.KTOTrainer(None, args=args)


def test_what_is_no_callback_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"teacher_callback must be a TeacherCallback, got 'ema\(0.95\)'"):
        SDPOTrainer(language_model(), teacher_callback="ema(0.95)")


def test_other_versions_of_trl_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"made for TRL 1\.16, found 1\.17\.0: pip install"):
        importlib.reload(ours)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each rank asserts in the program: the definition of the average, and that both have the same one."""
    for rank in programs.launch(2, Path(__file__).parent / "trl_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert rank.stdout.count("average is right") == 2
