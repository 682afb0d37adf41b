"""The command `wmateacher`: compare kernels, and average the checkpoints that training has written."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from wmateacher import __version__, checks, kernels, posthoc, printing, theory
from wmateacher.files import write_atomically
from wmateacher.kernels import Kernel

__all__ = ["main"]


def __dir__() -> list[str]:
    return __all__


_PICTURES = (".png", ".pdf", ".svg")
_WISHES = ("start", "weight_start", "mean_age", "batch_norm")
_LONGEST = 10**8
"""The longest run that `kernel` describes, whose profiles take 0.8 GB each."""
_CLOSED_PIPE = 141
"""The exit code that shells give a process which a closed pipe ends: 128 + SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Default: those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is printed as one line on stderr. If the reader of the
            output has closed it, as `| head` does, it is 141 and nothing is printed.
    """
    arguments = _parser().parse_args(argv)
    try:
        _check_output(arguments)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise the interpreter reports the same error again when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        print(f"wmateacher {arguments.command}: {message}", file=sys.stderr)
        return 2
    return 0


_READS = (
    "A checkpoint is a .safetensors file, a file written by torch.save, a checkpoint of a run (its student), "
    "or a model folder as save_pretrained writes it, also with shards. The names of DDP, torch.compile and "
    "other wrappers do not matter."
)

# --- commands -----------------------------------------------------------------------------------------


def _kernel(arguments: argparse.Namespace) -> None:
    built = [kernels.build(spec) for spec in arguments.kernels]
    if arguments.suggest:
        _suggest(arguments, built)
        return
    wished = [name for name in _WISHES if getattr(arguments, name) is not None]
    if wished:
        raise ValueError(f"--{wished[0].replace('_', '-')} is for --suggest: pass --suggest too")
    if not built or arguments.total_steps is None:
        missing = "--total-steps T" if built else "a kernel, such as 'beta(0.5,0.5)', and --total-steps T"
        raise ValueError(f"pass {missing}, or --suggest for a proposal")
    total = checks.positive_int("--total-steps", arguments.total_steps)
    if total > _LONGEST:
        raise ValueError(
            f"--total-steps must be at most {_LONGEST}, got {total}: every step takes memory, "
            "and a shorter run shows the same shape"
        )
    if arguments.output is not None:
        with write_atomically(arguments.output) as stream:
            picture = Path(arguments.output).suffix.removeprefix(".")
            printing.figure(built, total).savefig(stream, dpi=150, format=picture)
    print(printing.table(built, total, arguments.distill_weight))
    for kernel in built:
        print(f"\n{kernel}\n{printing.terminal_plot(kernel.profile(total))}")
    if arguments.output is not None:
        print(f"\nwrote {arguments.output}")


def _suggest(arguments: argparse.Namespace, others: Sequence[Kernel]) -> None:
    total = arguments.total_steps
    if arguments.output is not None:
        raise ValueError("--plot is not for --suggest: plot the kernel that it proposes")
    if total is not None and checks.positive_int("--total-steps", total) > _LONGEST:
        raise ValueError(
            f"--total-steps must be at most {_LONGEST}, got {total}: leave it out for an open end"
        )
    if total is None and others:
        raise ValueError(f"pass --total-steps T to compare the proposal with {others[0]}")
    suggestion = theory.suggest(
        total,
        start=arguments.start or "pretrained",
        start_weight=arguments.weight_start,
        mean_age=arguments.mean_age,
        batch_norm=arguments.batch_norm,
    )
    print(f"{suggestion}\n")
    kernel = suggestion.kernel
    if total is None:
        print(printing.stretching(kernel, arguments.distill_weight))
        return
    if not others:
        names = ["beta(0.5,0.5)", "uniform", "power(sigma_rel=0.1)", "static"]
        others = [kernels.build(name) for name in names]
    compared = [kernel, *(other for other in others if other != kernel)]
    print(printing.outlook(compared, total, arguments.distill_weight))


def _average(arguments: argparse.Namespace) -> None:
    files, kernel = arguments.files, _built(arguments.kernel)
    if arguments.total_steps is not None and arguments.steps is None:
        raise ValueError(
            f"--total-steps {arguments.total_steps} needs the step of each checkpoint: pass --steps too"
        )
    weights = posthoc.checkpoint_weights(kernel, len(files), arguments.steps, arguments.total_steps)
    if weights.max() - weights.min() > 1e-12:  # of equal ones the order does not matter
        _check_order(files)
    posthoc.average_checkpoints(
        files, kernel, arguments.steps, arguments.total_steps, arguments.output, key=arguments.key
    )
    for file, weight in zip(files, weights, strict=True):
        print(f"{weight:9.6f}  {file}")
    print(f"wrote {arguments.output}: {len(files)} checkpoints, {kernel}")


def _check_order(files: Sequence[str]) -> None:
    """Refuse files whose names count steps in another order, such as those of `step-*.pt` in a shell."""
    numbers = [[int(n) for n in re.findall("[0-9]+", file)] for file in files]
    counted = [n for n in zip(*numbers, strict=False) if len(set(n)) > 1]
    alike = len({re.sub("[0-9]+", "0", file) for file in files}) == 1
    if alike and len(counted) == 1 and list(counted[0]) != sorted(counted[0]):
        raise ValueError(
            f"the names count {', '.join(map(str, counted[0]))}, but the kernel weights checkpoints in the "
            "order of training: sort them by their numbers, as `ls -v` does"
        )


def _synthesise(arguments: argparse.Namespace) -> None:
    _, report = posthoc.synthesise(
        arguments.folder,
        _built(arguments.kernel),
        arguments.total_steps,
        step=arguments.step,
        ridge=arguments.ridge,
        output=arguments.output,
    )
    print(report)
    print(f"wrote {arguments.output}")


def _interpolate(arguments: argparse.Namespace) -> None:
    posthoc.interpolate(
        arguments.start, arguments.end, arguments.alpha, output=arguments.output, key=arguments.key
    )
    print(f"wrote {arguments.output}: {1 - arguments.alpha:g} start + {arguments.alpha:g} end")


def _stock(arguments: argparse.Namespace) -> None:
    posthoc.model_stock(arguments.pretrained, arguments.finetuned, output=arguments.output, key=arguments.key)
    print(f"wrote {arguments.output}: Model Stock of {len(arguments.finetuned)} models")


def _built(spec: str) -> Kernel:
    try:
        return kernels.build(spec)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--kernel: {error}") from None


def _check_output(arguments: argparse.Namespace) -> None:
    """Check what can be known about the output before any work is done."""
    if arguments.output is None:
        return
    output = Path(arguments.output)
    if arguments.command == "kernel" and output.suffix not in _PICTURES:
        raise ValueError(f"--plot must be a file that ends in {', '.join(_PICTURES)}, got {str(output)!r}")
    # Of existing folders, an empty one may become a model folder, and that is checked later.
    # A name such as `new/../old.pt` exists once its missing folders are made, which is before it is written.
    real = Path(os.path.realpath(output))
    if real.exists() and not real.is_dir() and not arguments.force:
        raise ValueError(f"{output} already exists: choose another name, or pass --force to replace it")
    for file in arguments.inputs(arguments):
        if real.exists() and Path(file).exists() and real.samefile(file):
            raise ValueError(f"--output {output} is one of the inputs: choose another name")


# --- arguments ----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wmateacher",
        description="Compare kernels, and average the checkpoints that training has written.",
        epilog="Run 'wmateacher COMMAND --help' for the options of a command and an example.",
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"wmateacher {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    kernel = _command(
        commands,
        "kernel",
        _kernel,
        "compare kernels for a run of given length",
        "Print a table of kernels for a run of T optimizer steps, and plot the weight of each student state "
        "in the final average. The residuals and the gap are the predictions of the linear theory for "
        "self-distillation with such a teacher, relative to the error at the start.",
        "wmateacher kernel 'beta(0.5,0.5)' 'ema(0.999)' --total-steps 25030, or "
        "wmateacher kernel --suggest --total-steps 25030 --weight-start 0.01",
    )
    kernel.add_argument(
        "kernels", nargs="*", metavar="SPEC", help=f"a kernel: {', '.join(kernels.available())}"
    )
    kernel.add_argument(
        "--total-steps",
        type=int,
        metavar="T",
        help="number of steps in the run; with --suggest it may be left out if the end is open",
    )
    kernel.add_argument(
        "--suggest",
        action="store_true",
        help="propose a kernel, say why, and compare it with the given ones in the linear theory with noise",
    )
    kernel.add_argument(
        "--start", choices=["pretrained", "random"], help="start of the run (default: pretrained)"
    )
    kernel.add_argument(
        "--weight-start", type=float, metavar="W", help="wished weight of W^0 in the final average, in (0, 1)"
    )
    kernel.add_argument(
        "--mean-age",
        type=float,
        metavar="A",
        help="wished mean age of the states, as a share of the run in (0, 1)",
    )
    kernel.add_argument(
        "--batch-norm",
        action=argparse.BooleanOptionalAction,
        help="whether the student has batch normalisation",
    )
    kernel.add_argument(
        "--distill-weight",
        type=float,
        default=0.9,
        metavar="LAMBDA",
        help="weight of the distillation loss in the theory (default: 0.9)",
    )
    kernel.add_argument(
        "--plot", dest="output", metavar="FILE", help="also plot the weights to a .png, .pdf or .svg file"
    )
    _add_force(kernel)

    average = _command(
        commands,
        "average",
        _average,
        "average saved checkpoints",
        "Average checkpoints with any kernel. Each checkpoint represents the optimizer steps nearest to it. "
        f"Integer tensors are taken from the last one. {_READS}",
        "wmateacher average step-*.safetensors --kernel 'beta(0.5,0.5)' --output average.safetensors",
    )
    average.add_argument("files", nargs="+", metavar="FILE", help="checkpoints, in the order of training")
    average.add_argument(
        "--kernel", default="uniform", metavar="SPEC", help="kernel (default: uniform, the plain mean)"
    )
    average.add_argument(
        "--steps",
        type=_step_list,
        help="optimizer steps of the checkpoints, as 1000,2000,3000 (default: equally spaced)",
    )
    average.add_argument(
        "--total-steps", type=int, metavar="T", help="horizon of the kernel (default: the last of --steps)"
    )
    _add_merge(average, lambda a: a.files)

    synthesise = _command(
        commands,
        "synthesise",
        _synthesise,
        "compute the average of any kernel from recorded snapshots",
        "Combine the snapshots that a wmateacher.posthoc.Recorder wrote into the average of any kernel, and "
        "report how well its weights follow the kernel.",
        "wmateacher synthesise snapshots --kernel 'beta(0.5,0.5)' --output average.safetensors",
    )
    synthesise.add_argument("folder", metavar="FOLDER", help="folder of the snapshots")
    synthesise.add_argument("--kernel", required=True, metavar="SPEC", help="kernel, such as 'beta(0.5,0.5)'")
    synthesise.add_argument(
        "--total-steps",
        type=int,
        metavar="T",
        help="horizon of the kernel (default: the length of the recorded run)",
    )
    synthesise.add_argument("--step", type=int, help="step of the average (default: the horizon)")
    synthesise.add_argument(
        "--ridge", type=float, default=1e-5, help="penalty on large coefficients (default: 1e-5)"
    )
    _add_output(synthesise)

    interpolate = _command(
        commands,
        "interpolate",
        _interpolate,
        "interpolate two checkpoints (WiSE-FT)",
        f"Write (1 - A) * START + A * END, computed for each tensor. {_READS}",
        "wmateacher interpolate zeroshot.pt finetuned.pt --alpha 0.5 --output wise.pt",
    )
    interpolate.add_argument("start", metavar="START", help="the pretrained checkpoint")
    interpolate.add_argument("end", metavar="END", help="the fine-tuned checkpoint")
    interpolate.add_argument(
        "--alpha", type=float, required=True, metavar="A", help="share of END, in [0, 1]"
    )
    _add_merge(interpolate, lambda a: [a.start, a.end])

    stock = _command(
        commands,
        "stock",
        _stock,
        "merge fine-tuned checkpoints (Model Stock)",
        "Move each tensor from the pretrained weights towards the mean of two or more fine-tuned models, by "
        f"a ratio that depends on the angle between them (Jang et al. 2024). {_READS}",
        "wmateacher stock zeroshot.pt seed0.pt seed1.pt --output stock.pt",
    )
    stock.add_argument("pretrained", metavar="PRETRAINED", help="the pretrained checkpoint")
    stock.add_argument("finetuned", nargs="+", metavar="FINETUNED", help="two or more fine-tuned checkpoints")
    _add_merge(stock, lambda a: [a.pretrained, *a.finetuned])
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example: {example}",
        formatter_class=_formatter,
    )
    command.set_defaults(run=run, inputs=lambda arguments: [])
    return command


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=28)


def _add_merge(
    command: argparse.ArgumentParser, inputs: Callable[[argparse.Namespace], Sequence[str]]
) -> None:
    command.add_argument(
        "--key",
        metavar="NAME",
        help="entry of each file that is the state dict, as model or model.student (default: the only one)",
    )
    command.set_defaults(inputs=inputs)
    _add_output(command, ", or a folder if the last checkpoint is one")


def _add_output(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument(
        "--output", required=True, metavar="OUT", help=f"file to write (.safetensors or .pt){more}"
    )
    _add_force(command)


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="replace an existing file")


def _step_list(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write steps as 1000,2000,3000, not {text!r}") from None


if __name__ == "__main__":
    raise SystemExit(main())
