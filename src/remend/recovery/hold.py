"""What training must not give back: the student's constraint, and the recipe's adapter."""

from __future__ import annotations

from remend.data.order import derive_seed
from remend.models.adapters import add_lora
from remend.models.protocols import CausalLM
from remend.recovery.begin import Run
from remend.recovery.repair import Repaired
from remend.training.constraints import Constraint, freeze_healthy_embeddings, kind_of
from remend.training.teachers import Teacher


def hold(run: Run, student: CausalLM, reference: Teacher, repaired: Repaired) -> Constraint:
    """The student's constraint. Adds the recipe's adapter to the student, in place."""
    plan, config = run.plan, run.plan.config
    if config.lora is not None:
        lora, seed = config.lora, derive_seed(config.seed, "lora")
        add_lora(
            student,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            dropout=lora.dropout,
            seed=seed,
            base=config.student,
        )
    facts = plan.facts
    if facts.compressed and not config.train_embeddings and config.train == "all":
        freeze_healthy_embeddings(student, reference.model)
    start, rate = repaired.start, plan.learning_rate
    origin = None if plan.placed.teacher.by_block else reference.model  # without steps nothing starts from it
    return kind_of(facts).hold(student, facts, origin=origin, start=start, rate=rate)
