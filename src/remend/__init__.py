"""remend brings a degraded language model back, using its own healthy past as the teacher.

import remend
result = remend.recover(student="student", teacher="smollm2", data="prompts.jsonl", out="runs/first")
print(result.summary["gap_closed"])
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from remend import tasks
    from remend.caching import cache_teacher
    from remend.config import RecoverConfig
    from remend.degrade.depth import prune_depth
    from remend.degrade.finetune import finetune
    from remend.degrade.prune import prune
    from remend.degrade.quantize import quantize
    from remend.degrade.width import prune_width
    from remend.diagnosis import diagnose
    from remend.errors import RemendError
    from remend.evaluation import evaluate
    from remend.exporting import export
    from remend.flows.demo import demo
    from remend.flows.study import study
    from remend.losses import divergence
    from remend.recovery import RecoverResult, check, recover, track
    from remend.recovery.self_prompts import write_self_prompts

_HOMES = {
    "RecoverConfig": "remend.config",
    "RecoverResult": "remend.recovery",
    "RemendError": "remend.errors",
    "cache_teacher": "remend.caching",
    "check": "remend.recovery",
    "demo": "remend.flows.demo",
    "diagnose": "remend.diagnosis",
    "divergence": "remend.losses",
    "evaluate": "remend.evaluation",
    "export": "remend.exporting",
    "finetune": "remend.degrade.finetune",
    "prune": "remend.degrade.prune",
    "prune_depth": "remend.degrade.depth",
    "prune_width": "remend.degrade.width",
    "quantize": "remend.degrade.quantize",
    "recover": "remend.recovery",
    "study": "remend.flows.study",
    "track": "remend.recovery",
    "write_self_prompts": "remend.recovery.self_prompts",
}

__all__ = ["RecoverConfig", "RecoverResult", "RemendError", "cache_teacher", "check", "demo", "diagnose", "divergence"]
__all__ += ["evaluate", "export", "finetune", "prune", "prune_depth", "prune_width", "quantize", "recover", "tasks"]
__all__ += ["study", "track", "write_self_prompts"]


def __getattr__(name: str) -> Any:
    # names load on first use, so that `remend --help` does not wait for torch and transformers
    import importlib

    if name == "tasks":
        return importlib.import_module("remend.tasks")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'remend' has no attribute {name!r}")
