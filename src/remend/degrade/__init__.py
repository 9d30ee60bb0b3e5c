"""Make degraded students: what damaged models look like, under control.

A kind of damage is one file here: the settings that it takes, and how a model is changed. The command, the study's kind
and their checks are made of that. What needs torch is in making/ and is imported when a model is changed.
"""

from remend.degrade.kinds import DEGRADATIONS as DEGRADATIONS
from remend.registry import register_all

register_all(__name__)
