"""Facts of a plan that never was, for arithmetic that is worked out by hand."""

from __future__ import annotations

from remend.models.sizes import Size
from remend.recovery.estimate import Facts, StreamWork

SMALL = Size(
    parameters=2_000_000,
    embeddings=500_000,
    matrices=1_500_000,
    active=1_500_000,
    vocabulary=5_000,
    width=100,
    layers=2,
    cached=400,
    grams=40_000,
    fits=9_000_000,
    groups=((100, 250), (500, 100)),
    sides=3_000,
)
STREAM = StreamWork("recover", rows=8, prompt=20.0, longest=30, shown=20.0, answer=10, held_out=16)
FACTS = Facts(
    student=SMALL,
    reference=SMALL,
    streams=[STREAM],
    device="cpu",
    itemsize=4,
    reference_itemsize=4,
    by_block=False,
    reference_by_block=False,
    mapped=False,
    reference_mapped=False,
    steps=6,
    evaluations=0,
    checkpoints=3,
    saved_checkpoints=2,
    updates=2,
    rows_at_once=64,
    batch=8,
    micro_batches=1,
    recomputes=False,
    train="all",
    codes=1_000_000,
    scales=160_000,
    base=None,
    trained=1_500_000,
    held=1_000_000,
    head_trained=False,
    optimizer="adamw",
    copies=0,
    averages=False,
    repair=0,
    repair_prompt=20.0,
    repair_answer=64,
    repair_rows=65_536,
    repair_given=False,
    written=0,
    best=False,
    saved_itemsize=4,
    activation=3_000,
    chunk=800,
)
