"""How far teacher and student are apart: 0-d tensors, nothing that waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from wmateacher.teacher import WMATeacher


@torch.no_grad()
def parameter_gap(teacher: WMATeacher) -> Tensor:
    """The relative distance |W - M| / |W| of the teacher M from its student W, over averaged tensors.

    0 means that the teacher has collapsed onto the student.

    Returns:
        0-d float32 tensor on the student's device.
    """
    pairs = [(w.float(), m.to(w.device).float()) for w, m in teacher.averaged_pairs()]
    students, averages = [w for w, _ in pairs], [m for _, m in pairs]
    apart = torch._foreach_norm(torch._foreach_sub(students, averages))
    scale = torch._foreach_norm(students)
    return torch.stack(apart).norm() / torch.stack(scale).norm()
