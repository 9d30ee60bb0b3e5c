"""Losses between the teacher's and the student's next-token distributions, one file each, and their chunked sums."""

from remend.maths.losses.agreement import Agreement, agreement
from remend.maths.losses.chunked import Head, HeadTarget, Target, chunked_cross_entropy_sum, chunked_loss_sum
from remend.maths.losses.loss import LOSSES, Loss, choose, described, divergence, log_probabilities, of_beta
from remend.registry import register_all

__all__ = [
    "LOSSES",
    "Agreement",
    "Head",
    "HeadTarget",
    "Loss",
    "Target",
    "agreement",
    "choose",
    "chunked_cross_entropy_sum",
    "chunked_loss_sum",
    "described",
    "divergence",
    "log_probabilities",
    "of_beta",
]

register_all(__name__)
