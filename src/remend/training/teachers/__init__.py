"""Whatever scores the student's tokens. Each file here adds one kind of teacher; importing it registers it."""

from remend.registry import register_all
from remend.training.teachers.teacher import TEACHERS, NamedTeacher, Teacher, as_directory, at_work, named

__all__ = ["TEACHERS", "NamedTeacher", "Teacher", "as_directory", "at_work", "named"]

register_all(__name__)
