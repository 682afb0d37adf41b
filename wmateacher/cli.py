"""The command `wmateacher`: look at kernels and costs, and average what training left on disk."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wmateacher import checks, cost, kernels, posthoc, theory
from wmateacher.kernels import Array, Kernel

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_WIDTH, _HEIGHT = 64, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; None: those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is one line on stderr.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"wmateacher {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# --- commands -----------------------------------------------------------------------------------------


def _kernel(arguments: argparse.Namespace) -> None:
    built = [kernels.build(spec) for spec in arguments.kernels]
    if arguments.plot is not None:
        _refuse_existing(arguments.plot, arguments.force)
    total = checks.positive_int("--total-steps", arguments.total_steps)
    print(_table(built, total, arguments.lam))
    for kernel in built:
        print(f"\n{kernel}\n{terminal_plot(kernel.profile(total))}")
    if arguments.plot is not None:
        _figure(built, total, arguments.plot)
        print(f"\nwrote {arguments.plot}")


def _average(arguments: argparse.Namespace) -> None:
    _refuse_existing(arguments.output, arguments.force)
    files, kernel = arguments.files, kernels.build(arguments.kernel)
    counts = posthoc.checkpoint_weights(kernel, len(files), arguments.steps, arguments.total_steps)
    posthoc.average_checkpoints(files, kernel, arguments.steps, arguments.total_steps, arguments.output)
    for file, count in zip(files, counts, strict=True):
        print(f"{count:9.6f}  {file}")
    print(f"wrote {arguments.output}: {len(files)} checkpoints, {kernel}")


def _synthesise(arguments: argparse.Namespace) -> None:
    _refuse_existing(arguments.output, arguments.force)
    _, report = posthoc.synthesise(
        arguments.folder,
        arguments.kernel,
        arguments.total_steps,
        step=arguments.step,
        ridge=arguments.ridge,
        output=arguments.output,
    )
    print(report)
    print(f"wrote {arguments.output}")


def _interpolate(arguments: argparse.Namespace) -> None:
    _refuse_existing(arguments.output, arguments.force)
    posthoc.interpolate(arguments.start, arguments.end, arguments.alpha, output=arguments.output)
    print(f"wrote {arguments.output}: {1 - arguments.alpha:g} start + {arguments.alpha:g} end")


def _stock(arguments: argparse.Namespace) -> None:
    _refuse_existing(arguments.output, arguments.force)
    posthoc.model_stock(arguments.pretrained, arguments.finetuned, output=arguments.output)
    print(f"wrote {arguments.output}: Model Stock of {len(arguments.finetuned)} models")


def _cost(arguments: argparse.Namespace) -> None:
    models = [(spec.partition("/")[0], cost.Model.parse(spec)) for spec in arguments.models]
    for ranks in arguments.ranks:
        print(f"{ranks} processes, {arguments.student} student; GB a process\n")
        print(f"{cost.table(models, ranks, arguments.student, arguments.average)}\n")


def _refuse_existing(file: str, force: bool) -> None:
    if Path(file).exists() and not force:
        raise ValueError(f"{file} exists already: choose another name, or pass --force to replace it")


# --- what they take -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wmateacher", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    kernel = _command(
        commands,
        "kernel",
        _kernel,
        "show what kernels do over a run",
        "A table of kernels over a run of T optimizer steps, and the weight of each state in the final "
        "average. The residuals and the gap are what the linear theory predicts for self-distillation "
        "with that teacher, relative to the error at the start.",
        "wmateacher kernel 'beta(0.5,0.5)' 'ema(0.999)' --total-steps 25030",
    )
    kernel.add_argument("kernels", nargs="+", metavar="SPEC", help=f"one of {', '.join(kernels.available())}")
    kernel.add_argument("--total-steps", type=int, required=True, metavar="T", help="steps of the whole run")
    kernel.add_argument("--lam", type=float, default=0.9, help="the distillation loss's weight (default 0.9)")
    kernel.add_argument("--plot", metavar="FILE", help="also draw the profiles (.png, .pdf, .svg)")
    _add_force(kernel)

    costs = _command(
        commands,
        "cost",
        _cost,
        "memory and traffic of a teacher on many processes",
        "What a teacher adds to each process, and what an update and a forward move: whole beside DDP, "
        "sharded by FSDP2, sharded and offloaded to the host. A model is PARAMETERS or PARAMETERS/BLOCKS.",
        "wmateacher cost 8B/32 70B/80 --ranks 64",
    )
    costs.add_argument("models", nargs="+", metavar="SIZE", help="such as 350M, 8B or 70B/80 (80 blocks)")
    costs.add_argument("--ranks", type=int, nargs="+", default=[8], help="processes (default 8)")
    costs.add_argument("--student", default="bfloat16", help="of its parameters: bfloat16, float32")
    costs.add_argument("--average", default="auto", help="WMATeacher's dtype: auto or split")

    average = _command(
        commands,
        "average",
        _average,
        "average saved checkpoints",
        "Average checkpoints with any kernel. Each stands for the optimizer steps nearest to it. Integer "
        "tensors are those of the last.",
        "wmateacher average step-*.safetensors --kernel 'beta(0.5,0.5)' --output average.safetensors",
    )
    average.add_argument("files", nargs="+", metavar="FILE", help="checkpoints, in the order of training")
    average.add_argument("--kernel", default="uniform", help="default: uniform, the plain mean")
    average.add_argument(
        "--steps", type=_step_list, help="their steps, as 1000,2000,3000 (default: equally spaced)"
    )
    average.add_argument("--total-steps", type=int, metavar="T", help="the kernel's horizon (default: last)")
    _add_output(average)

    synthesise = _command(
        commands,
        "synthesise",
        _synthesise,
        "make any kernel's average of recorded snapshots",
        "Combine the snapshots that a wmateacher.posthoc.Recorder wrote into the average of any kernel, and "
        "say how well its weights match the kernel's.",
        "wmateacher synthesise snapshots --kernel 'beta(0.5,0.5)' --output average.safetensors",
    )
    synthesise.add_argument("folder", metavar="FOLDER", help="where the snapshots are")
    synthesise.add_argument("--kernel", required=True, help="such as 'beta(0.5,0.5)'")
    synthesise.add_argument(
        "--total-steps", type=int, metavar="T", help="the kernel's horizon (default: the recorded run's)"
    )
    synthesise.add_argument("--step", type=int, help="where the average stands (default: the horizon)")
    synthesise.add_argument("--ridge", type=float, default=1e-5, help="bounds the coefficients (1e-5)")
    _add_output(synthesise)

    interpolate = _command(
        commands,
        "interpolate",
        _interpolate,
        "interpolate two checkpoints (WiSE-FT)",
        "(1 - A) START + A END, tensor by tensor.",
        "wmateacher interpolate zeroshot.pt finetuned.pt --alpha 0.5 --output wise.pt",
    )
    interpolate.add_argument("start", metavar="START", help="the pretrained checkpoint")
    interpolate.add_argument("end", metavar="END", help="the fine-tuned checkpoint")
    interpolate.add_argument("--alpha", type=float, required=True, metavar="A", help="in [0, 1]")
    _add_output(interpolate)

    stock = _command(
        commands,
        "stock",
        _stock,
        "merge fine-tuned checkpoints (Model Stock)",
        "Each tensor between the mean of two or more fine-tuned models and the pretrained one, by the angle "
        "between them (Jang et al. 2024).",
        "wmateacher stock zeroshot.pt seed0.pt seed1.pt --output stock.pt",
    )
    stock.add_argument("pretrained", metavar="PRETRAINED", help="what they were fine-tuned from")
    stock.add_argument("finetuned", nargs="+", metavar="FINETUNED", help="two or more checkpoints")
    _add_output(stock)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
    command.set_defaults(run=run)
    return command


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", required=True, metavar="OUT", help="file to write, .safetensors or .pt")
    _add_force(command)


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="replace a file that exists already")


def _step_list(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write steps as 1000,2000,3000, not {text!r}") from None


# --- what they show -----------------------------------------------------------------------------------


def _table(built: Sequence[Kernel], total_steps: int, lam: float) -> str:
    header = ["kernel", "W^0", "mean age", "states", "last 10%", "equal EMA"]
    rows = [[*header, "teacher res.", "student res.", "gap"]]
    for kernel in built:
        summary = kernel.summary(total_steps)
        predicted = theory.predict(kernel, total_steps, lam)
        row = [
            str(kernel),
            f"{summary.start_weight:.5f}",
            f"{summary.mean_age:.1f}",
            f"{summary.effective_states:.1f}",
            f"{summary.last_tenth:.4f}",
            f"{summary.equal_ema_retention:.6f}",
        ]
        parts = (predicted.teacher_residual, predicted.student_residual, predicted.gap)
        rows.append([*row, *(f"{part:.3g}" for part in parts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join([f"T = {total_steps} steps, lambda = {lam:g}", *lines])


def terminal_plot(weights: Array) -> str:
    """A profile in characters: time to the right, mass upwards, the highest column full."""
    edges = np.linspace(0, len(weights), min(_WIDTH, len(weights)) + 1)
    columns = np.diff(np.interp(edges, np.arange(len(weights) + 1), np.append(0.0, np.cumsum(weights))))
    blocks = _BLOCKS if _prints(_BLOCKS) else _ASCII
    steps = len(blocks) - 1
    levels = np.round(columns / columns.max() * _HEIGHT * steps).astype(int)
    return "\n".join(
        "".join(blocks[level] for level in np.clip(levels - row * steps, 0, steps)).rstrip()
        for row in reversed(range(_HEIGHT))
    )


def _prints(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _figure(built: Sequence[Kernel], total_steps: int, file: str) -> None:
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError("--plot needs the package matplotlib: pip install matplotlib") from None
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for kernel in built:
        axes.plot(np.arange(total_steps + 1), kernel.profile(total_steps), label=str(kernel))
    axes.set(xlabel="optimizer step", ylabel="weight in the final average", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
