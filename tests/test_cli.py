import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

from wmateacher import cli, files, kernels, posthoc, theory


@pytest.fixture
def checkpoints(tmp_path):
    """Three checkpoints of one architecture."""
    for i in range(3):
        files.save({"w": torch.randn(4, 2), "n": torch.tensor(i)}, tmp_path / f"{i}.pt")
    return sorted(tmp_path.glob("*.pt"))


def run(*arguments):
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "wmateacher.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def main(*arguments):
    return cli.main([str(a) for a in arguments])


def test_kernel_shows_a_table_and_the_profiles(capsys):
    assert main("kernel", "beta(0.5,0.5)", "ema(0.9)", "--total-steps", 100) == 0
    head, columns, beta, ema, *_ = capsys.readouterr().out.splitlines()
    assert head == "T = 100 steps, distill_weight = 0.9"
    assert columns.split()[:2] == ["kernel", "W^0"]
    for line, kernel in ((beta, "beta(0.5,0.5)"), (ema, "ema(0.9)")):
        summary = kernels.build(kernel).summary(100)
        predicted = theory.predict(kernels.build(kernel), 100, 0.9)
        numbers = [float(n) for n in line.split()[1:]]
        expected = [
            summary.start_weight, summary.mean_age, summary.effective_states, summary.last_tenth,
            summary.equal_ema_retention, predicted.teacher_residual, predicted.student_residual, predicted.gap,
        ]  # fmt: skip
        assert line.split()[0] == kernel
        np.testing.assert_allclose(numbers, expected, rtol=5e-3, atol=1e-4)


def test_the_distill_weight_reaches_the_theory(capsys):
    def residual(weight):
        assert main("kernel", "uniform", "--total-steps", 50, "--distill-weight", weight) == 0
        return capsys.readouterr().out.splitlines()[2].split()[6:]

    assert residual(0.1) != residual(0.9)


@pytest.mark.parametrize("steps", [3, 64, 100, 1000])
def test_the_terminal_plot_shows_the_shape(monkeypatch, steps):
    monkeypatch.setattr(cli, "_prints", lambda text: True)
    width = min(64, steps + 1)

    def plot(kernel):
        rows = cli.terminal_plot(kernels.build(kernel).profile(steps)).split("\n")
        return [row.ljust(width) for row in rows]

    assert plot("uniform") == ["█" * width] * 5
    assert all(row[0] == "█" and not row[2:].strip() for row in plot("static"))
    beta, power = plot("beta(0.5,0.5)"), plot("power(sigma_rel=0.1)")
    assert beta == [row[::-1] for row in beta]
    assert (beta[0][0], beta[0][width // 2]) == ("█", " ")
    heights = [sum(cli._BLOCKS.index(row[x]) for row in power) for x in range(width)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 40)


def test_plain_characters_where_the_terminal_has_no_others(monkeypatch):
    monkeypatch.setattr(cli, "_prints", lambda text: False)
    text = cli.terminal_plot(kernels.build("beta(0.5,0.5)").profile(100))
    assert text.isascii()
    assert "@" in text


def test_kernel_draws_a_figure(tmp_path, capsys):
    file = tmp_path / "kernels.png"
    assert main("kernel", "arcsine", "static", "--total-steps", 50, "--plot", file) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    assert file.read_bytes().startswith(b"\x89PNG")
    assert main("kernel", "arcsine", "--total-steps", 50, "--plot", file) == 2
    assert "already exists" in capsys.readouterr().err


def test_average(checkpoints, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert (
        main("average", *checkpoints, "--kernel", "beta(0.5,0.5)", "--steps", "0,10,20", "--output", out) == 0
    )
    expected = posthoc.average_checkpoints(checkpoints, "beta(0.5,0.5)", [0, 10, 20])
    assert torch.equal(files.load(out)["w"], expected["w"])
    shares = posthoc.checkpoint_weights("beta(0.5,0.5)", 3, [0, 10, 20])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"{s:9.6f}  {f}" for s, f in zip(shares, checkpoints, strict=True)]
    assert last == f"wrote {out}: 3 checkpoints, beta(0.5,0.5)"


def test_interpolate_and_stock(checkpoints, tmp_path, capsys):
    assert main("interpolate", *checkpoints[:2], "--alpha", 0.25, "--output", tmp_path / "a.pt") == 0
    expected = posthoc.interpolate(checkpoints[0], checkpoints[1], 0.25)
    assert torch.equal(files.load(tmp_path / "a.pt")["w"], expected["w"])
    assert main("stock", *checkpoints, "--output", tmp_path / "b.pt") == 0
    expected = posthoc.model_stock(checkpoints[0], checkpoints[1:])
    assert torch.equal(files.load(tmp_path / "b.pt")["w"], expected["w"])
    assert capsys.readouterr().out.count("wrote") == 2


def test_synthesise(tmp_path, capsys):
    model = nn.Linear(2, 2)
    recorder = posthoc.Recorder(model, 20, folder=tmp_path / "snapshots", every=4)
    for _ in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        recorder.update()
    out = tmp_path / "out.pt"
    arguments = ("synthesise", tmp_path / "snapshots", "--kernel", "uniform", "--total-steps", 20)
    assert main(*arguments, "--output", out) == 0
    state, report = posthoc.synthesise(tmp_path / "snapshots", "uniform", 20)
    assert torch.equal(files.load(out)["weight"], state["weight"])
    assert capsys.readouterr().out == f"{report}\nwrote {out}\n"


def test_nothing_is_replaced_without_force(checkpoints, tmp_path, capsys):
    before = checkpoints[2].read_bytes()
    for command in (
        ("average", *checkpoints[:2]),
        ("interpolate", *checkpoints[:2], "--alpha", 0.5),
        ("stock", *checkpoints),
        ("synthesise", tmp_path, "--kernel", "uniform"),
    ):
        assert main(*command, "--output", checkpoints[2]) == 2
        message = (
            f"wmateacher {command[0]}: {checkpoints[2]} already exists: choose another name, or pass --force"
        )
        assert capsys.readouterr().err.startswith(message)
        assert checkpoints[2].read_bytes() == before
    assert main("average", *checkpoints[:2], "--output", checkpoints[2], "--force") == 0
    assert checkpoints[2].read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernel", "bata(1,2)", "--total-steps", 9), "unknown kernel 'bata'; did you mean 'beta' or 'tail'? available: arcsine"),
        (("kernel", "uniform", "--total-steps", 0), "--total-steps must be a whole number of at least 1, got 0"),
        (("average", "none.pt", "--output", "out.pt"), "there is no file 'none.pt'"),
        (("average", "none.pt", "--output", "out.npz"), "the output must be a file that ends in .safetensors"),
        (("synthesise", "none", "--kernel", "uniform", "--output", "out.pt"), "there is no folder 'none'"),
        (("interpolate", "a.pt", "b.pt", "--alpha", 2, "--output", "out.pt"), "alpha must be in [0, 1], got 2.0"),
        (("stock", "a.pt", "b.pt", "--output", "out.pt"), "finetuned must be at least 2, got 1"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"wmateacher {arguments[0]}: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_asked_for_only_where_it_is_needed(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main("kernel", "uniform", "--total-steps", 9) == 0
    assert main("kernel", "uniform", "--total-steps", 9, "--plot", tmp_path / "a.png") == 2
    assert "--plot needs the package matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kernel", "average", "synthesise", "interpolate", "stock"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command, "--help")
    assert stop.value.code == 0
    assert f"example: wmateacher {command}" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"wmateacher {metadata.version('wmateacher')}\n"


def test_bad_usage_exits_with_2(capsys):
    for arguments in ([], ["average"], ["average", "a.pt", "--steps", "1,x", "--output", "b.pt"]):
        with pytest.raises(SystemExit) as stop:
            main(*arguments)
        assert stop.value.code == 2
    assert "write steps as 1000,2000,3000, not '1,x'" in capsys.readouterr().err


def test_as_a_process(checkpoints, tmp_path):
    done = run("average", *checkpoints, "--output", checkpoints[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"wmateacher average: {checkpoints[0]} already exists: choose another name, or pass --force to replace it\n"
    )
