"""One rank of a transformers Trainer: `torchrun huggingface_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from test_huggingface import (
    Gradients,
    Sentences,
    TeacherTrainer,
    Watch,
    arguments,
    assert_average,
    language_model,
    llama,
    weights,
)


def assert_global_mean(folder):
    """The distillation is the mean over the answer tokens of both ranks and both accumulated batches."""
    other, batches = llama().eval(), []
    with torch.no_grad():
        [p.mul_(2) for p in other.parameters()]

    class Fixed(TeacherTrainer):
        teacher = property(lambda self: lambda **inputs: other(**inputs))

        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def gradient(distill_weight):
        seen = Gradients()
        args = arguments(
            folder / "mean", gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0, ddp_backend="gloo",
            per_device_train_batch_size=3,
        )  # fmt: skip
        data = Sentences(language=True, padded=True)
        Fixed(llama(), args, train_dataset=data, callbacks=[seen], distill_weight=distill_weight).train()
        return seen.first

    difference = gradient(1.0) - gradient(0.0)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, batches[:2])
    assert len({(b["labels"][:, 1:] != -100).sum().item() for rank in everywhere for b in rank}) > 1
    model, total, count = llama(), 0.0, 0
    for batch in (b for rank in everywhere for b in rank):
        mask = batch["labels"][:, 1:] != -100
        log_p, log_q = (m(**batch).logits[:, :-1][mask].double().log_softmax(-1) for m in (model, other))
        total, count = total + (log_q.exp() * (log_q - log_p)).sum(), count + mask.sum()
    parameters = list(model.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total / count, parameters)])
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-6)


def main(folder):
    def trainer(name, *callbacks):
        args = arguments(
            folder / name, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            num_train_epochs=4, ddp_backend="gloo",
        )  # fmt: skip
        return TeacherTrainer(
            language_model(), args, train_dataset=Sentences(language=True), callbacks=list(callbacks)
        )

    watch = Watch()
    whole = trainer("whole", watch)
    whole.train()
    assert torch.distributed.get_world_size() == 2
    assert whole.teacher.step == whole.teacher.total_steps == whole.state.global_step == 8
    assert_average(watch, whole.teacher)
    print("the average is right", flush=True)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    assert resumed.teacher.step == 8
    assert torch.equal(weights(resumed.teacher.module), weights(whole.teacher.module))
    print("the resumed average is right", flush=True)
    assert_global_mean(folder)
    print("the global average is right", flush=True)
    torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


if __name__ == "__main__":
    AcceleratorState._reset_state(reset_partial_state=True)  # the test process leaves its own to its forks
    main(Path(sys.argv[1]))
