"""What a teacher costs on many processes: memory, and traffic of a training step, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DTYPES = {"float32": 4, "bfloat16": 2}
PLACEMENTS = ("ddp", "fsdp2", "offload")
ACCUMULATORS = ("auto", "split")


@dataclass(frozen=True)
class Model:
    """A student.

    Attributes:
        parameters: Their number, all of them trained; what is frozen is shared and costs nothing.
        units: Blocks that `fully_shard` is applied to, of about equal size.
    """

    parameters: float
    units: int = 32

    @classmethod
    def parse(cls, text: str) -> Model:
        """From `8B`, `350M`, `7e9`, or `70B/80` with the number of units.

        Raises:
            ValueError: It is none of these.
        """
        size, _, units = text.partition("/")
        scale = {"B": 1e9, "M": 1e6}.get(size[-1:].upper(), 1.0)
        try:
            model = cls(float(size.rstrip("BMbm")) * scale, int(units or 32))
        except ValueError:
            model = cls(0, 0)
        if not (0 < model.parameters < float("inf")) or model.units < 1:
            raise ValueError(
                f"a model must be such as 8B, 350M or 70B/80 (parameters/sharded blocks), got {text!r}"
            )
        return model


@dataclass(frozen=True)
class Cost:
    """Bytes of one process, beside the student's.

    Attributes:
        device: Held on the accelerator all the time.
        host: Held in the host's memory.
        gathered: On the accelerator for the length of a forward: two blocks whole, the one that runs and
            the next.
        update: Read and written by one update, where the average lies.
        network: Received from other processes by one forward. An update receives nothing.
        bus: Between accelerator and host, by one update and one forward.
        checkpoint: Of the average on disk, all processes together.
    """

    device: float
    host: float
    gathered: float
    update: float
    network: float
    bus: float
    checkpoint: float


def cost(
    model: Model,
    placement: str = "ddp",
    ranks: int = 1,
    *,
    student: str = "bfloat16",
    compute: str = "bfloat16",
    average: str = "auto",
) -> Cost:
    """The cost of a teacher.

    Args:
        model: The student.
        placement: "ddp": whole on every process. "fsdp2": sharded over them. "offload": the same with
            `CPUOffloadPolicy`, which keeps the shards in the hosts' memory between uses.
        ranks: Processes that it is sharded over.
        student: dtype of the student's parameters, and of the teacher's module.
        compute: Of the forward under FSDP2, the mixed precision policy's `param_dtype`.
        average: `WMATeacher`'s `dtype`, "auto" or "split".

    Raises:
        ValueError: An option that there is not, or `average="split"` of a float32 student.
    """
    for argument, value, options in (
        ("placement", placement, PLACEMENTS),
        ("student", student, DTYPES),
        ("compute", compute, DTYPES),
        ("average", average, ACCUMULATORS),
    ):
        if value not in options:
            raise ValueError(f"{argument} must be one of {', '.join(options)}, got {value!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if average == "split" and student != "bfloat16":
        raise ValueError(f"average='split' is for bfloat16 students, got student={student!r}: use 'auto'")
    own = DTYPES[student]
    beside = 0 if own == 4 else 2 if average == "split" else 4
    local = model.parameters / (1 if placement == "ddp" else ranks)
    held = (own + beside) * local
    # The student is read, the average read and written; a wide one is rounded into the module too.
    update = (own + 2 * (own + beside) - (own if beside == 4 else 0)) * local
    sharded, offloaded = placement != "ddp", placement == "offload"
    return Cost(
        device=0 if offloaded else held,
        host=held if offloaded else 0,
        gathered=2 * DTYPES[compute] * model.parameters / model.units if sharded else 0,
        update=update,
        network=DTYPES[compute] * model.parameters * (ranks - 1) / ranks if sharded else 0,
        bus=2 * own * local if offloaded else 0,
        checkpoint=4 * model.parameters,
    )


def table(models: Sequence[tuple[str, Model]], ranks: int, student: str, average: str = "auto") -> str:
    """A Markdown table of models and placements, in GB of 1e9 bytes."""
    head = (
        "| model | placement | device | host | gathered | update | network | bus | checkpoint |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = []
    for name, model in models:
        for placement in PLACEMENTS:
            found = cost(model, placement, ranks, student=student, average=average)
            cells = [f"{value / 1e9:.3g}" for value in vars(found).values()]
            rows.append(f"| {name} | {placement} | {' | '.join(cells)} |")
    return "\n".join([head, *rows])
