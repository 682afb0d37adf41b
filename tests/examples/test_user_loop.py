import re
from pathlib import Path

import programs

EXAMPLE = Path(__file__).parents[2] / "examples" / "user_loop.py"


def test_the_two_lines_run_and_the_teacher_is_the_better_one(tmp_path):
    done = programs.run(EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    student, teacher = map(float, re.findall(r"([\d.]+)%", done.stdout.splitlines()[-1]))
    assert teacher > student > 50


def test_it_stays_short():
    assert len(EXAMPLE.read_text().splitlines()) < 60
