"""One rank of an Accelerate run: `torchrun accelerate_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from test_accelerate import STEPS, run, weights


def main(folder):
    states, teacher = run(folder, accumulated=1)
    assert torch.distributed.get_world_size() == 2
    assert teacher.step == STEPS == len(states) - 1
    expected = torch.from_numpy(teacher.trajectory_weights()) @ torch.stack(states).double()
    torch.testing.assert_close(weights(teacher.module).double(), expected, rtol=1e-5, atol=1e-6)
    both = [torch.empty_like(states[-1]) for _ in range(2)]
    torch.distributed.all_gather(both, weights(teacher.module))
    assert torch.equal(*both)
    print("the average is right", flush=True)
    run(folder / "state", accumulated=1, stop=4)
    _, resumed = run(folder, accumulated=1, resume=folder / "state")
    assert torch.equal(weights(resumed.module), weights(teacher.module))
    print("the resumed average is right", flush=True)
    torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


if __name__ == "__main__":
    AcceleratorState._reset_state(reset_partial_state=True)  # the test process leaves its own to its forks
    main(Path(sys.argv[1]))
