"""One rank of TRL's trainers: `torchrun trl_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from test_huggingface import Watch, assert_average, weights
from test_trl import distil, language_model, refer

from wmateacher.integrations.trl import SDFTTrainer, TeacherCallback


def main(folder):
    options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2}
    distilling = distil(SDFTTrainer, folder, **options)
    referring = refer("DPO", folder, language_model(), callback=TeacherCallback("uniform"), **options)
    for trainer in (distilling, referring):
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
        assert torch.distributed.get_world_size() == 2
        assert_average(watch, trainer.teacher)
        found = [torch.empty_like(weights(trainer.teacher.module)) for _ in range(2)]
        torch.distributed.all_gather(found, weights(trainer.teacher.module))
        assert torch.equal(*found)
        print("the average is right", flush=True)
    torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


if __name__ == "__main__":
    AcceleratorState._reset_state(reset_partial_state=True)  # the test process leaves its own to its forks
    main(Path(sys.argv[1]))
