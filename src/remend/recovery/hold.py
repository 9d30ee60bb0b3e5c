"""What training must not give back: the student's constraint, and the recipe's adapter."""

from __future__ import annotations

from remend.data.order import derive_seed
from remend.models.adapters import add_lora
from remend.models.protocols import CausalLM
from remend.recovery.begin import Run
from remend.recovery.plan import Plan
from remend.recovery.repair import Repaired
from remend.training.constraints import Constraint, freeze_healthy_embeddings, kind_of
from remend.training.teachers import Teacher


def learning_rate(plan: Plan) -> float:
    """The recipe's learning rate, or the one for what is trained."""
    given = plan.config.learning_rate
    return kind_of(plan.facts).learning_rate(plan.facts, repaired=plan.repairs) if given is None else given


def hold(run: Run, student: CausalLM, reference: Teacher, repaired: Repaired) -> Constraint:
    """The student's constraint. Adds the recipe's adapter to the student, in place."""
    plan, config = run.plan, run.plan.config
    if config.lora is not None:
        lora, seed = config.lora, derive_seed(config.seed, "lora")
        add_lora(student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed, base=config.student)
    facts = plan.facts
    if facts.compressed and not config.train_embeddings:
        freeze_healthy_embeddings(student, reference.model)
    rate = learning_rate(plan)
    return kind_of(facts).hold(student, facts, origin=reference.model, start=repaired.start, rate=rate)
