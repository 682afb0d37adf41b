"""One rank of runs with DeepSpeed: its own engine, Accelerate, a Trainer: `torchrun deepspeed_ranks.py FOLDER`."""

import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.ops.op_builder import all_ops
from test_huggingface import Sentences, TeacherTrainer, arguments, language_model, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

from wmateacher import WMATeacher

STEPS = 6
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}

# Its kernel for sums in shared memory would first be compiled, for half a minute.
deepspeed.ops.__compatible_ops__.update(dict.fromkeys(all_ops.ALL_OPS, False))


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))


def initialize(stage, **config):
    """An engine with two micro-batches a step."""
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "optimizer": ADAM,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **config,
    }  # fmt: skip
    return deepspeed.initialize(model=student(), config=config)[0]


def batch(i, dtype):
    """The micro-batch of this rank; the fifth step's overflow."""
    generator = torch.Generator().manual_seed(2 * i + torch.distributed.get_rank())
    return torch.randn(4, 8, generator=generator).to(dtype) * (float("inf") if i in (8, 9) else 1)


def check(teacher, states):
    expected = torch.from_numpy(teacher.trajectory_weights()) @ torch.stack(states).double()
    state = teacher.averaged_state_dict(torch.float32)
    averages = torch.cat([state[name].flatten() for name, _ in teacher.module.named_parameters()])
    torch.testing.assert_close(averages.double(), expected, rtol=1e-5, atol=1e-6)
    both = [torch.empty_like(averages) for _ in range(2)]
    torch.distributed.all_gather(both, averages)
    assert torch.equal(*both)


def train(engine, teacher, first=0, last=None):
    """Train over the micro-batches, and return the states that the optimizer's steps made."""
    dtype, states = next(engine.parameters()).dtype, []
    for i in range(first, last or 2 * STEPS + 2):
        student = engine(batch(i, dtype))
        loss = student.square().mean() + (student - teacher(batch(i, dtype))).square().mean()
        engine.backward(loss)
        engine.step()
        if i % 2 and engine.was_step_applied():
            states.append(weights(engine.module).float())
    return states


def own_loop(folder, stage, **config):
    engine = initialize(stage, **config)
    teacher = WMATeacher(engine, "beta(0.5,0.5)", STEPS)
    teacher.attach(engine)
    start = [weights(engine.module).float()]
    states = start + train(engine, teacher, last=6)
    engine.save_checkpoint(folder, tag="3")
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in teacher.state_dict().items()}
    states += train(engine, teacher, first=6)
    assert engine.skipped_steps == 1  # the step that overflows does not count
    assert teacher.step == STEPS == len(states) - 1
    check(teacher, states)

    again = initialize(stage, **config)
    other = WMATeacher(again.module, "beta(0.5,0.5)", STEPS)
    attachment = other.attach(again.optimizer)
    again.load_checkpoint(folder, tag="3")
    other.load_state_dict(saved)
    train(again, other, first=6)
    assert torch.equal(weights(other.module), weights(teacher.module))
    attachment.remove()
    train(again, other, last=2)
    assert other.step == STEPS

    for target in (engine, engine.module):  # the next step starts at what was copied
        teacher.copy_to(target)
        copied = weights(engine.module)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        train(engine, teacher, last=2)
        assert torch.equal(weights(engine.module), copied)


def refused():
    early = WMATeacher(student(), "uniform", STEPS)
    engine = initialize(3)
    for act in (lambda: WMATeacher(engine, "uniform", STEPS), lambda: early.update(engine)):
        with pytest.raises(
            ValueError, match=r"DeepSpeed ZeRO-3 has partitioned the student's '0.weight'.*FSDP2"
        ):
            act()


def accelerated():
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2)
    gloo = InitProcessGroupKwargs(backend="gloo")
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
    model = student()
    inputs = torch.randn(8 * STEPS * 2, 8, generator=torch.Generator().manual_seed(0))
    optimizer, data = torch.optim.AdamW(model.parameters(), 0.01), DataLoader(TensorDataset(inputs), 4)
    plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    teacher = WMATeacher(model, "beta(0.5,0.5)", STEPS)
    teacher.attach(optimizer)
    states = [weights(model.module)]
    for (x,) in data:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - teacher(x) - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            states.append(weights(model.module))
    assert teacher.step == STEPS == len(states) - 1
    check(teacher, states)
    AcceleratorState._reset_state(reset_partial_state=True)


class Watch(TrainerCallback):
    """Keep the weights before training and after each step."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.states.append(weights(model))

    on_step_end = on_train_begin


def trainer(folder):
    def build(name, *callbacks):
        config = {
            "zero_optimization": {"stage": 1}, "optimizer": ADAM, "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        }  # fmt: skip
        args = arguments(
            folder / name, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            num_train_epochs=4, deepspeed=config, ddp_backend="gloo",
            use_cpu=False,
        )  # fmt: skip
        return TeacherTrainer(
            language_model(), args, train_dataset=Sentences(language=True), callbacks=list(callbacks)
        )

    watch = Watch()
    whole = build("whole", watch)
    whole.train()
    steps = whole.model_wrapped.global_steps
    assert whole.teacher.step == whole.teacher.total_steps == whole.state.global_step == steps > 0
    check(whole.teacher, watch.states)
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    assert torch.equal(weights(resumed.teacher.module), weights(whole.teacher.module))


def main(folder):
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    deepspeed.init_distributed("gloo")
    own_loop(folder / "1", 1, bf16={"enabled": True, "check_grad_overflow": True})
    own_loop(folder / "2", 2, bf16={"enabled": True, "check_grad_overflow": True})
    refused()
    accelerated()
    trainer(folder)
    print("the averages are right", flush=True)
    torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


if __name__ == "__main__":
    AcceleratorState._reset_state(reset_partial_state=True)  # the test process leaves its own to its forks
    main(Path(sys.argv[1]))
