"""Losses over ranks: the value and the DDP-averaged gradient of one process with the whole batch."""

import copy

import pytest
import torch
from pool import device
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from wmateacher import losses
from wmateacher.losses import registry

ROWS = [3, 1, 4, 2]
DIM = 4
SPECS = (
    "fd",
    "crd",
    "icl",
    "cross_kd",
    "gd",
    f"afd({DIM})",
    "temperature_kl(2.5)",
    "paired_ce",
    "0.5*fd + crd + 2.0*icl + cross_kd",
)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(5, DIM, dtype=torch.float64) for _ in "ab")
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        image, text = x.unbind(1)
        return losses.PairedEmbeddings(self.image(image), self.text(text), self.log_scale.exp())


def batches(even):
    """All ranks' inputs; this rank's."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    counts = [2] * size if even else ROWS[:size]
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(sum(counts), 2, 5, dtype=torch.float64, generator=generator).to(device())
    return whole, whole.split(counts)[rank]


def teacher_of(x):
    with torch.no_grad():
        return losses.PairedEmbeddings(x[:, 0, :DIM].sin(), x[:, 1, :DIM].cos(), torch.tensor(5.0).double())


def average_gradients(module):
    for parameter in module.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def check(criterion, make_reference, even):
    """Compare with one process; both are called as criterion(student, teacher)."""
    whole, own = batches(even)
    towers = Towers().to(device())
    alone = copy.deepcopy(towers)
    student = DistributedDataParallel(towers, find_unused_parameters=True)  # fd has no logit scale
    criterion, reference = criterion.to(device()).double(), make_reference.to(device()).double()
    reference.load_state_dict(criterion.state_dict())
    loss, terms = criterion(student(own), teacher_of(own), return_terms=True)
    expected, expected_terms = reference(alone(whole), teacher_of(whole), return_terms=True)
    close(loss, expected)
    close(terms, expected_terms)
    loss.backward()
    expected.backward()
    close(gradients(towers), {**gradients(alone)})
    if list(criterion.parameters()):
        average_gradients(criterion)
        close(gradients(criterion), gradients(reference))


@on_ranks(1, 2, 4)
def test_value_and_gradient_are_those_of_the_concatenated_batch(folder):
    for spec in SPECS:
        for gather in ("full", "rows"):
            for even in (True, False):
                check(losses.build(spec, gather=gather), losses.build(spec, gather="off"), even)


@on_ranks(1, 2, 4)
def test_info_nce_is_that_of_the_concatenated_batch(folder):
    for gather in ("full", "rows"):
        whole, own = batches(even=False)
        towers = Towers().to(device())
        alone = copy.deepcopy(towers)
        student = DistributedDataParallel(towers)
        value = losses.info_nce(*student(own), gather=gather)
        expected = losses.info_nce(*alone(whole), gather="off")
        close(value, expected)
        value.backward()
        expected.backward()
        close(gradients(towers), gradients(alone))


@on_ranks(1, 2, 4)
def test_gather_off_uses_the_ranks_own_batch(folder):
    _, own = batches(even=False)
    student, teacher = Towers().to(device())(own), teacher_of(own)
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in student[:2])
    logits = student.logit_scale * image @ text.T
    labels = torch.arange(len(own), device=device())
    cross_entropy = nn.functional.cross_entropy
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    close(losses.info_nce(*student, gather="off"), expected)
    off, on = (losses.build("crd", gather=g)(student, teacher) for g in ("off", "full"))
    assert (off == on) == (torch.distributed.get_world_size() == 1)


@on_ranks(2, 4)
def test_a_group_is_one_batch(folder):
    """Of two halves of the world each is a batch of its own."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    halves = [
        torch.distributed.new_group([*range(0, size, 2)]),
        torch.distributed.new_group([*range(1, size, 2)]),
    ]
    mine = halves[rank % 2]
    whole, own = batches(even=False)
    members = [p for r, p in enumerate(whole.split(ROWS[:size])) if r % 2 == rank % 2]
    towers = Towers().to(device())
    for gather in ("full", "rows"):
        value = losses.build("crd + icl", gather=gather, group=mine)(towers(own), teacher_of(own))
        together = torch.cat(members)
        close(value, losses.build("crd + icl", gather="off")(towers(together), teacher_of(together)))


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@on_ranks(2, 4)
def test_rows_never_make_the_global_logits(folder):
    size, own = torch.distributed.get_world_size(), 16
    sizes = {}
    for gather in ("full", "rows"):
        embeddings = [torch.randn(own, DIM, device=device(), requires_grad=True) for _ in range(4)]
        scale = torch.tensor(10.0, device=device())
        student, teacher = (losses.PairedEmbeddings(*embeddings[i : i + 2], scale) for i in (0, 2))
        with Largest() as largest:
            spec = "fd + crd + icl + cross_kd + gd + paired_ce"
            losses.build(spec, gather=gather)(student, teacher).backward()
        sizes[gather] = largest.numel
    assert sizes["full"] == (size * own) ** 2
    assert sizes["rows"] == size * own * own


@on_ranks(2)
def test_a_registered_loss_gathers_in_full_only(folder):
    registry._ENTRIES.pop("mine", None)

    @losses.register("mine", family="paired")
    def mine(student, teacher):
        return (student.image @ teacher.text.mT + student.text @ student.image.mT).exp().mean().log()

    check(losses.build("mine"), losses.build("mine", gather="off"), even=False)
    with pytest.raises(
        ValueError, match="gather='rows' with 'mine', which was not registered with by_rows=True"
    ):
        losses.build("mine + fd", gather="rows")


@on_ranks(1, 2)
def test_a_direct_call_gathers_as_the_criterion_does(folder):
    _, own = batches(even=False)
    student, teacher = Towers().to(device())(own), teacher_of(own)
    for name in ("fd", "crd", "gd"):
        assert torch.equal(
            getattr(losses.paired, name)(student, teacher), losses.build(name)(student, teacher)
        )


@on_ranks(2)
def test_a_registered_loss_may_call_another_one(folder):
    registry._ENTRIES.pop("around", None)

    @losses.register("around", family="paired", by_rows=True)
    def around(student, teacher):
        moved = student._replace(image=student.image + 0.5 * student.text)
        return losses.paired.icl(moved, losses.PairedEmbeddings(*(2 * x for x in teacher)))

    for gather in ("full", "rows"):
        check(losses.build("around", gather=gather), losses.build("around", gather="off"), even=False)


@on_ranks(1, 2, 4)
def test_dino_moves_one_centre(folder):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    ours, alone = losses.build("dino(6)").to(device()), losses.build("dino(6)", gather="off").to(device())
    apart = losses.build("dino(6)", gather="off").to(device())
    for _ in range(3):
        whole = torch.randn(sum(ROWS[:size]), 2, 6, generator=generator).to(device())
        own = whole.split(ROWS[:size])[rank]
        ours(own, own)
        alone(whole, whole)
        apart(own, own)
        torch.testing.assert_close(ours.terms["dino"].center, alone.terms["dino"].center)
    different = not torch.allclose(apart.terms["dino"].center, alone.terms["dino"].center)
    assert different == (size > 1)


@on_ranks(1, 2, 4)
def test_sinkhorn_balances_the_batches_of_all_ranks(folder):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    whole = torch.randn(sum(ROWS[:size]), 6, generator=torch.Generator().manual_seed(3)).to(device())
    ours, alone = (
        losses.build("dino(6,centering=sinkhorn)", gather=g).terms["dino"] for g in ("full", "off")
    )
    expected = alone.targets(whole).split(ROWS[:size])[rank]
    torch.testing.assert_close(ours.targets(whole.split(ROWS[:size])[rank]), expected, rtol=1e-4, atol=1e-6)


@on_ranks(1, 2, 4)
def test_info_nce_of_features_has_the_candidates_of_all_ranks(folder):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 3 * size, 5, dtype=torch.float64, generator=generator).to(device())
    weight = torch.eye(5, dtype=torch.float64, device=device()).requires_grad_()
    own = slice(3 * rank, 3 * rank + 3)
    loss = losses.build("info_nce")(student[own] @ weight, teacher[own])
    (gradient,) = torch.autograd.grad(loss, weight)
    whole = losses.build("info_nce", gather="off")(student @ weight, teacher)
    (expected,) = torch.autograd.grad(whole, weight)
    both = torch.cat([loss.detach()[None], gradient.flatten()])
    torch.distributed.all_reduce(both)
    torch.testing.assert_close(both / size, torch.cat([whole.detach()[None], expected.flatten()]))


@on_ranks(2)
def test_low_precision_gathers_in_float32(folder):
    _, own = batches(even=True)
    towers = Towers().to(device()).float()
    with torch.autocast(device().type, torch.bfloat16):
        student = towers(own.float())
        assert student.image.dtype == torch.bfloat16
        total = losses.build("crd", gather="rows")(student, teacher_of(own.float()))
    assert total.dtype == torch.float32
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in towers.parameters())


@on_ranks(2)
def test_the_mean_over_the_tokens_of_all_ranks(folder):
    """Under DDP, which averages gradients, with the number of tokens on all ranks divided by their number."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(3)
    x, teacher = torch.randn(2, size, 6, 5, dtype=torch.float64, generator=generator).to(device())
    mask = torch.arange(6, device=device()) < torch.arange(1, size + 1, device=device())[:, None] * 2
    criterion = losses.build("kl(2.0) + reverse_kl + jsd(0.3) + ce")
    alone = nn.Linear(5, 5, dtype=torch.float64).to(device())
    for parameter in alone.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    student = DistributedDataParallel(copy.deepcopy(alone))
    expected = criterion(alone(x), teacher, mask=mask)
    expected.backward()
    loss = criterion(student(x[rank]), teacher[rank], mask=mask[rank], num_items=mask.sum() / size)
    loss.backward()
    close(gradients(student.module), gradients(alone))
    total = loss.detach()
    torch.distributed.all_reduce(total)
    close(total / size, expected.detach())
