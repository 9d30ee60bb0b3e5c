"""remend brings a degraded language model back, using its own healthy past as the teacher.

import remend
result = remend.recover(student="student", teacher="smollm2", data="prompts.jsonl", out="runs/first")
print(result.summary["gap_closed"])
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "RecoverConfig": "recovery.settings",
    "RecoverResult": "recovery.job",
    "RemendError": "errors",
    "cache_teacher": "training.write_cache",
    "check": "recovery.job",
    "compare": "evaluation.compare",
    "demo": "studies.demo",
    "diagnose": "diagnosis.job",
    "divergence": "maths.losses",
    "evaluate": "evaluation.job",
    "export": "exporting",
    "finetune": "degrade.finetune",
    "plan": "recovery.what_fits",
    "prune": "degrade.prune",
    "prune_depth": "degrade.depth",
    "prune_width": "degrade.width",
    "quantize": "degrade.quantize",
    "recover": "recovery.job",
    "study": "studies.study",
    "tasks": "data",
    "track": "recovery.job",
    "write_self_prompts": "recovery.self_prompts",
}
"""Where each public name lives, below remend. The imports for type checkers repeat it; a test compares the two."""

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from remend.data import tasks as tasks
    from remend.degrade.depth import prune_depth as prune_depth
    from remend.degrade.finetune import finetune as finetune
    from remend.degrade.prune import prune as prune
    from remend.degrade.quantize import quantize as quantize
    from remend.degrade.width import prune_width as prune_width
    from remend.diagnosis.job import diagnose as diagnose
    from remend.errors import RemendError as RemendError
    from remend.evaluation.compare import compare as compare
    from remend.evaluation.job import evaluate as evaluate
    from remend.exporting import export as export
    from remend.maths.losses import divergence as divergence
    from remend.recovery.job import RecoverResult as RecoverResult
    from remend.recovery.job import check as check
    from remend.recovery.job import recover as recover
    from remend.recovery.job import track as track
    from remend.recovery.self_prompts import write_self_prompts as write_self_prompts
    from remend.recovery.settings import RecoverConfig as RecoverConfig
    from remend.recovery.what_fits import plan as plan
    from remend.studies.demo import demo as demo
    from remend.studies.study import study as study
    from remend.training.write_cache import cache_teacher as cache_teacher


def __getattr__(name: str) -> Any:
    # names load on first use, so that `remend --help` does not wait for torch and transformers
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'remend' has no attribute {name!r}")
    home = f"remend.{_HOMES[name]}"
    if name == "tasks":
        return importlib.import_module(f"{home}.tasks")
    return getattr(importlib.import_module(home), name)
