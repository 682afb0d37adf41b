"""Measure how much of the pretrained representations fine-tuned image towers keep, layer by layer.

    python examples/clip_tracer.py emoji --data-root DIR --output RUN
    python benchmarks/representations.py RUN DIR/test/sketch DIR/test/openmoji

RUN is the folder of a run of examples/clip_tracer.py with the method `zero-shot`, whose students are the
pretrained models. Every other student is compared with the one that it started from, on the images in the
folders, by the linear CKA of each layer's outputs (figure 4 of the paper, which has another architecture).
1 means that they are equal up to rotation and scale. The output folder gets results.json and cka.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmateacher.diagnostics import layer_cka
from wmateacher.integrations.clip import export, predict
from wmateacher.integrations.clip.data.images import read_image
from wmateacher.integrations.engine import comparison, results, tables

START = "zero-shot"
COLUMNS = {"lowest layer": ("lowest", 3), "mean of layers": ("mean", 3), "embedding": ("embedding", 3)}


def main() -> int:
    """Compare the models of a run, print a table, and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of examples/clip_tracer.py")
    parser.add_argument("images", type=Path, nargs="+", help="folders of images")
    parser.add_argument("--count", type=int, default=500, help="largest number of images (default: 500)")
    parser.add_argument("--output", type=Path, default=Path("runs/representations"))
    arguments = parser.parse_args()
    if arguments.count < 3:
        parser.error(f"--count must be at least 3, got {arguments.count}: CKA compares many images")
    try:
        starts, students = models_of(arguments.run)
        files = [file for folder in arguments.images for file in predict.images_in(folder)]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    files = files[:: max(1, -(-len(files) // arguments.count))]  # evenly over the folders
    config = {"run": arguments.run.name, "images": len(files)}
    record = results.Results(
        arguments.output, config, results.environment("cpu", ("open_clip_torch", "timm"))
    )
    record.content = {"command": " ".join(["python", *sys.argv]), **record.content}
    for (method, pretraining, seed), folder in tqdm(students.items(), mininterval=5):
        if record.recorded(method, seed, pretraining) is None:
            similar = compare(starts[pretraining, seed], folder, files)
            record.record(method, {"seed": seed, "pretraining": pretraining, **similar})
    print("\n\n".join(texts(record.content)))
    picture(record.content, arguments.output / "cka.png")
    print(f"\nwrote {arguments.output}/results.json, cka.png")
    return 0


def texts(content: dict[str, Any]) -> list[str]:
    """Return the table of the methods, and that of their differences to FLYP if it is among them."""
    shown = [tables.table(content, COLUMNS)]
    if "flyp" in content["methods"]:
        pairs = [(name, "flyp") for name in content["methods"] if name != "flyp"]
        shown.append(comparison.differences(content, COLUMNS, pairs))
    return shown


def models_of(run: Path) -> tuple[dict[tuple[int, int], Path], dict[tuple[str, int, int], Path]]:
    """Return the folders of a run's models.

    Returns:
        The pretrained models by pre-training and seed, and the students by method, pre-training and seed.

    Raises:
        FileNotFoundError: If the results or a model are missing.
        ValueError: If the run has no pretrained model for a student.
    """
    file = run / "results.json"
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: give the folder of a run of examples/clip_tracer.py")
    methods = results.read_json(file)["methods"]
    if START not in methods:
        raise ValueError(f"{run} has no runs of {START}, whose models are the start: add it to --methods")
    starts, students = {}, {}
    for method, found in methods.items():
        for pretraining, seed in map(results.identity, found["runs"]):
            folder = run / "models" / results.run_name(method, seed, pretraining) / "student"
            if not folder.exists():
                raise FileNotFoundError(
                    f"there is no {folder}: run the same command again with --output {run}"
                )
            if method == START:
                starts[pretraining, seed] = folder
            else:
                students[method, pretraining, seed] = folder
    for method, pretraining, seed in students:
        if (pretraining, seed) not in starts:
            raise ValueError(
                f"{START} has no run with seed {seed} and pre-training {pretraining}, which {method} has"
            )
    return starts, students


def compare(start: Path, student: Path, files: list[Path]) -> dict[str, Any]:
    """Return the CKA of the layers of two models' image towers on some image files, in order of depth."""
    models = [export.load(folder) for folder in (start, student)]
    images = torch.stack([models[0].transform(read_image(str(file))) for file in files])
    names = _layers(models[0].towers.clip.visual, images[:2])
    found = layer_cka(*(m.towers.clip.visual for m in models), images, layers=[*names, ""])
    cka = {name or "embedding": value.item() for name, value in found.items()}
    inner = [value for name, value in cka.items() if name != "embedding"]
    summary = {
        "lowest": min(cka.values()),
        "mean": sum(inner) / len(inner),
        "embedding": cka["embedding"],
    }
    return {**summary, "layers": cka}


def _layers(tower: nn.Module, images: Tensor) -> list[str]:
    """Return the modules without children that have weights, by name, in the order in which they run."""
    weighted = {name for name, module in tower.named_modules() if next(module.parameters(), None) is not None}
    return [name for name in layer_cka(tower, tower, images) if name in weighted]


def picture(content: dict[str, Any], file: Path) -> None:
    """Draw the CKA over the depth of the tower, one line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, method in content["methods"].items():
        layers = method["layers"]
        axis.plot(range(1, len(layers) + 1), layers.values(), marker="o", markersize=3, label=name)
    axis.set(xlabel="layer, from first to last", ylabel="CKA with the start")
    axis.set_title("How much of the start is kept", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
