"""wmateacher: a teacher that is a weighted average of the student's whole trajectory."""

from wmateacher import kernels, losses
from wmateacher.teacher import WMATeacher

__all__ = ["WMATeacher", "kernels", "losses"]
