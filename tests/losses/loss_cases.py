"""The losses under test as specs, and random inputs for each family."""

import numpy as np
import torch

from wmateacher import losses

DIM = 4
CLASSES = 5
# The losses that cannot be built without arguments.
REQUIRED = {"afd": f"afd({DIM})", "dino": f"dino({CLASSES})"}


def cases(family, *further):
    """Every registered loss of a family with its default settings, and further settings."""
    return (*(REQUIRED.get(name, name) for name in losses.available(family)), *further)


PAIRED = cases("paired", "temperature_kl(2.5)")
LOGITS = cases(
    "logits",
    "kl(3.0)",
    "kl(2.0,top_k=2)",
    "kl(top_k=3,tail=False,support=student)",
    "reverse_kl(0.5,top_k=2)",
    "jsd(0.1,2.0)",
    "jsd(0.9,top_k=2,support=teacher)",
    "mse(space=logits)",
    f"dino({CLASSES},student_temperature=0.5,teacher_temperature=0.25)",
)
FEATURES = cases("features", "info_nce(0.5)")
SPECS = PAIRED + LOGITS + FEATURES

# The arguments of a spec as the oracle's keywords.
PARAMETERS = {
    "temperature_kl(2.5)": {"temperature": 2.5},
    "kl(3.0)": {"temperature": 3.0},
    "kl(2.0,top_k=2)": {"temperature": 2.0, "top_k": 2},
    "kl(top_k=3,tail=False,support=student)": {"top_k": 3, "tail": False, "support": "student"},
    "reverse_kl(0.5,top_k=2)": {"temperature": 0.5, "top_k": 2},
    "jsd(0.1,2.0)": {"beta": 0.1, "temperature": 2.0},
    "jsd(0.9,top_k=2,support=teacher)": {"beta": 0.9, "top_k": 2, "support": "teacher"},
    "mse(space=logits)": {"space": "logits"},
    "info_nce(0.5)": {"temperature": 0.5},
    LOGITS[-1]: {"student_temperature": 0.5, "teacher_temperature": 0.25},
}


def name_of(spec):
    return spec.split("(")[0]


def criterion_for(spec, dtype=torch.float64):
    """The criterion with state that is not the initial one, in evaluation mode."""
    torch.manual_seed(0)
    criterion = losses.build(spec).to(dtype).eval()
    if name_of(spec) == "dino":
        criterion.terms["dino"].center.normal_()
    return criterion


def paired(seed, batch=3, dim=DIM, dtype=torch.float64, scale=10.0):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    scale = torch.tensor(scale + seed % 3, dtype=torch.float64)
    return losses.PairedEmbeddings(image.to(dtype), text.to(dtype), scale.to(dtype))


def inputs_for(spec, seed=0, dtype=torch.float64):
    """(student, teacher) of the family of the spec's loss."""
    if spec in PAIRED:
        return paired(seed, dtype=dtype), paired(seed + 1, dtype=dtype)
    shape = (2, 3, CLASSES) if spec in LOGITS else (4, 2, DIM)
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def leaves(value):
    return list(value) if isinstance(value, tuple) else [value]


def require_grad(value):
    """The same input with leaf tensors that require grad."""
    tensors = [t.detach().clone().requires_grad_() for t in leaves(value)]
    return type(value)(*tensors) if isinstance(value, tuple) else tensors[0]


def to_numpy(value):
    arrays = [t.detach().double().numpy().astype(np.float64) for t in leaves(value)]
    return tuple(arrays) if isinstance(value, tuple) else arrays[0]


def like(value, tensors):
    return type(value)(*tensors) if isinstance(value, tuple) else tensors[0]
