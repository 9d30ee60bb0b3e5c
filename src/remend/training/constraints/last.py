"""Train the end of a student: its output head and its last three layers.

After layers were removed, "Reassessing Layer Pruning in LLMs" (arXiv 2411.15558) found this better than an adapter,
which makes it a rival for students that lost layers.
"""

from __future__ import annotations

from remend.models.layers import decoder_layers
from remend.models.protocols import CausalLM
from remend.training.constraints.kind import Constraint, Start, StudentFacts
from remend.training.constraints.part import OnPart, PartKind

LAYERS = 3
"""Of the decoder's end, as in arXiv 2411.15558."""


class LastKind(PartKind):
    """Students of which the head and the last layers are trained freely, so that they lie on no grid and no mask."""

    moving = "last"
    words = f"the head and the last {LAYERS} layers alone move"

    def lost(self, facts: StudentFacts) -> str | None:
        """Why a student can't be trained so."""
        held = facts.recognised
        if facts.train != self.moving or facts.adapted or not (held.stored or held.mask):
            return None
        what = held.stored.format.name if held.stored else "a mask"
        return (
            f"train: last moves weights freely, and the student is held to {what}; take train: all, which keeps it "
            "there, or as_dense: true"
        )

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        return OnPart(model, end_of(model), repaired=start is not None)


def end_of(model: CausalLM) -> set[str]:
    """Names of the parameters of the output head and of the last LAYERS blocks; the last norm is not among them.

    A head that is tied to the embeddings is one parameter with them, and moves as it does in the paper's code.
    Raises InputError for a model whose blocks can't be found.
    """
    modules = [*decoder_layers(model)[-LAYERS:], model.get_output_embeddings()]
    ours = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ours}
