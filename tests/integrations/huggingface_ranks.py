"""One rank of a transformers Trainer: `torchrun huggingface_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from test_huggingface import (
    Sentences,
    TeacherTrainer,
    Watch,
    arguments,
    assert_average,
    language_model,
    weights,
)


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
    torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


if __name__ == "__main__":
    AcceleratorState._reset_state(reset_partial_state=True)  # the test process leaves its own to its forks
    main(Path(sys.argv[1]))
