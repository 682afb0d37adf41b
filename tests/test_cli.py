import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, cli, files, kernels, posthoc, printing, theory


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
    monkeypatch.setattr(printing, "_prints", lambda text: True)
    width = min(64, steps + 1)

    def plot(kernel):
        rows = printing.terminal_plot(kernels.build(kernel).profile(steps)).split("\n")
        return [row.ljust(width) for row in rows]

    assert plot("uniform") == ["█" * width] * 5
    assert all(row[0] == "█" and not row[2:].strip() for row in plot("static"))
    beta, power = plot("beta(0.5,0.5)"), plot("power(sigma_rel=0.1)")
    assert beta == [row[::-1] for row in beta]
    assert (beta[0][0], beta[0][width // 2]) == ("█", " ")
    heights = [sum(printing._BLOCKS.index(row[x]) for row in power) for x in range(width)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 40)


def test_plain_characters_where_the_terminal_has_no_others(monkeypatch):
    monkeypatch.setattr(printing, "_prints", lambda text: False)
    text = printing.terminal_plot(kernels.build("beta(0.5,0.5)").profile(100))
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


@pytest.mark.parametrize("steps", [(), ("--steps", "500,1000,1500")], ids=["equal", "given"])
def test_average_refuses_names_that_a_shell_has_sorted_as_text(steps, checkpoints, tmp_path, capsys):
    """`step-*.safetensors` gives 1000, 1500, 500; a mean is the same in any order."""
    names = [str(tmp_path / "run-2" / f"step-{n}.safetensors") for n in (1000, 1500, 500)]
    (tmp_path / "run-2").mkdir()
    for name in names:
        files.save(files.load(checkpoints[0]), name)
    out = tmp_path / "out.pt"
    assert main("average", *names, "--kernel", "tail(0.3)", *steps, "--output", out) == 2
    assert "the names count 1000, 1500, 500" in capsys.readouterr().err
    assert main("average", *names, "--output", out) == 0
    in_order = [names[2], *names[:2]]
    assert main("average", *in_order, "--kernel", "tail(0.3)", *steps, "--output", out, "--force") == 0


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
        (("kernel", "uniform", "--total-steps", 10**12), "--total-steps must be at most 100000000, got 1000000000000"),
        (("average", "a.pt", "b.pt", "--total-steps", 5, "--output", "out.pt"), "--total-steps 5 needs the step of each checkpoint: pass --steps too"),
        (("average", "none.pt", "--output", "out.pt"), "there is no file 'none.pt'"),
        (("average", "none.pt", "--output", "out.npz"), "the output must be a file that ends in .safetensors"),
        (("synthesise", "none", "--kernel", "uniform", "--output", "out.pt"), "there is no folder 'none'"),
        (("interpolate", "a.pt", "b.pt", "--alpha", 2, "--output", "out.pt"), "alpha must be in [0, 1], got 2.0"),
        (("stock", "a.pt", "b.pt", "--output", "out.pt"), "finetuned must be at least 2 models, got 1"),
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


# --- what is read and written -------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two checkpoints of runs, as the training loop of the integrations writes them, and the students in them."""
    students = [nn.Linear(2, 2).state_dict() for _ in range(2)]
    for i, student in enumerate(students):
        teacher = WMATeacher(nn.Linear(2, 2), "uniform", 10)
        content = {
            "format": 3, "identity": {"kernel": "uniform"}, "random": torch.get_rng_state(),
            "parts": {"student": student, "optimizer": {"state": {}, "param_groups": []}, "teacher": teacher.state_dict()},
            "series": {"loss": torch.zeros(4, dtype=torch.float64)},
        }  # fmt: skip
        torch.save(content, tmp_path / f"run{i}.pt")
    return sorted(tmp_path.glob("run*.pt")), students


def test_the_student_of_a_run_is_merged(runs, tmp_path):
    sources, students = runs
    expected = posthoc.average_checkpoints(students)
    for name, command in (("a.pt", ("average",)), ("b.pt", ("interpolate", "--alpha", 0.5))):
        assert main(*command, *sources, "--output", tmp_path / name) == 0
        made = files.load(tmp_path / name)
        assert made.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in made.items())


def test_a_key_chooses_one_of_several_state_dicts(tmp_path, capsys):
    for i in range(3):
        torch.save(
            {"model": {"student": {"w": torch.full((2,), float(i))}, "ema": {"w": torch.ones(2)}}},
            tmp_path / f"{i}.pt",
        )
    sources = sorted(tmp_path.glob("*.pt"))
    for command in (("average",), ("interpolate", "--alpha", 0.5), ("stock",)):
        inputs = sources if command[0] == "stock" else sources[::2]
        arguments = (*command, *inputs, "--output", tmp_path / f"{command[0]}.safetensors")
        assert main(*arguments) == 2
        message = f"'{sources[0]}' holds several state dicts, 'model.student', 'model.ema': pass one of them"
        assert message in capsys.readouterr().err
        assert main(*arguments, "--key", "model.studnt") == 2
        assert "keys with a state dict: 'model.student', 'model.ema'" in capsys.readouterr().err
        assert main(*arguments, "--key", "model.student") == 0
        assert files.load(tmp_path / f"{command[0]}.safetensors")["w"].tolist() != [1.0, 0.0]


def test_an_input_is_never_replaced(checkpoints, tmp_path, capsys, monkeypatch):
    before = [file.read_bytes() for file in checkpoints]
    link = tmp_path / "link.pt"
    link.symlink_to(checkpoints[0])
    monkeypatch.chdir(tmp_path)
    for output in (checkpoints[0], link, checkpoints[0].name):
        assert main("average", *checkpoints, "--output", output, "--force") == 2
        assert f"--output {output} is one of the inputs" in capsys.readouterr().err
    for output in (f"new/../{checkpoints[0].name}", f"{tmp_path}/a/b/../../{link.name}"):
        assert main("average", *checkpoints, "--output", output) == 2
        assert "already exists" in capsys.readouterr().err
        assert main("average", *checkpoints, "--output", output, "--force") == 2
        assert f"--output {output} is one of the inputs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main("interpolate", *checkpoints[:2], "--alpha", 1, "--output", checkpoints[1], "--force") == 2
    assert main("stock", *checkpoints, "--output", checkpoints[2], "--force") == 2
    assert [file.read_bytes() for file in checkpoints] == before


@pytest.mark.parametrize("command", ["average", "interpolate", "stock", "synthesise"])
def test_a_bad_kernel_or_output_is_named_before_any_work(checkpoints, tmp_path, capsys, monkeypatch, command):
    inputs = {
        "average": checkpoints,
        "interpolate": (*checkpoints[:2], "--alpha", 0.5),
        "stock": checkpoints,
        "synthesise": (tmp_path, "--kernel", "uniform"),
    }[command]
    if command in ("average", "synthesise"):
        for spec in ("bata", "ema(7)", "beta(1"):
            assert main(command, *inputs, "--kernel", spec, "--output", tmp_path / "out.pt") == 2
            assert capsys.readouterr().err.startswith(f"wmateacher {command}: --kernel: ")
    monkeypatch.setattr("wmateacher.posthoc.merging.combine", lambda *a: pytest.fail("worked"))
    (tmp_path / "folder.pt").mkdir()
    for output in ("out.npz", "out", "folder.pt"):
        assert main(command, *inputs, "--output", tmp_path / output) == 2
        assert "the output must be a file" in capsys.readouterr().err
    assert main(command, *inputs, "--output", checkpoints[0] / "out.pt") == 2
    assert "is not a folder that you may write to" in capsys.readouterr().err


def test_pictures_are_of_a_known_format_and_checked_first(tmp_path, capsys):
    for name in ("a.npz", "a", "a.jpg"):
        assert main("kernel", "uniform", "--total-steps", 9, "--plot", tmp_path / name) == 2
        out, error = capsys.readouterr()
        assert (out, list(tmp_path.iterdir())) == ("", [])
        assert "--plot must be a file that ends in .png, .pdf, .svg" in error
    assert main("kernel", "uniform", "--total-steps", 9, "--plot", tmp_path / "new" / "a.svg") == 0
    assert (tmp_path / "new" / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("specs", [["uniform"], ["uniform", "beta(1,1)"], ["ema(0.9)", "static"]])
@pytest.mark.parametrize("steps", [9, 99, 25030])
def test_the_picture_has_labelled_ticks_and_equal_weights_are_flat(specs, steps):
    figure = printing.figure([kernels.build(spec) for spec in specs], steps)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len({label for label in labels if label}) >= 2
    for line in axes.lines:
        weights = line.get_ydata()[line.get_ydata() > 0]
        if "uniform" in specs:
            heights = axes.transData.transform(np.stack([0 * weights, weights], axis=1))[:, 1]
            assert np.ptp(heights) < 1
        assert low < weights.min() or low == high * 1e-12
        assert weights.max() < high


def test_a_reader_that_stops_is_no_error():
    """As `| head -0` does: the reading end of the pipe is closed before anything is written."""
    command = [sys.executable, "-m", "wmateacher.cli", "kernel", "uniform", "--total-steps", "99"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
