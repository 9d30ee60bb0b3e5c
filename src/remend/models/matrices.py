"""The weight matrices of a decoder, whatever keeps them: what can be quantized, pruned and refitted.

transformers keeps a matrix in one of four ways, and a method that changes weights should not care which:

    nn.Linear   weight [O, I]
    Conv1D      weight [I, O] (GPT-2)
    experts     one parameter for all of them, [E, O, I] or [E, I, O] (GPT-OSS); each expert is a matrix of its own
    stacks      the same where a model has code of its own for it: STACKS says how each is laid out

`Matrix` shows each as [O, I]. `account` sorts all weights of a model, so that nothing is left out unseen.

Legend: O rows (outputs), I columns (inputs), E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from remend.models.frozen_linear import FrozenLinear
from remend.models.protocols import CausalLM

EXPERT_PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of a module of experts, as transformers names them in every architecture (its module integrations.moe)."""

STACKS: dict[str, dict[str, bool]] = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
    "JetMoeParallelExperts": {"weight": False},
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
    "RecurrentGemmaRglru": {"input_gate_weight": True, "recurrent_gate_weight": True},
    "ZambaMambaMixer": {"x_proj_weight": False, "dt_proj_weight": False},
}
"""Parameters that hold several matrices, by class of transformers, and whether they hold each as [I, O].

The matrices are those of experts or of heads. DBRX lays them one below the other, [E · O, I] or [E · I, O]; the others
have a dimension for them. A test holds each entry against the products of the model's own forward pass.
"""

_NO_PRODUCT = re.compile(r"(^|[._])(bias|A_log|dt_bias|D)$")
"""Parameters with two or more dimensions that multiply nothing: biases of experts, decays of state-space models."""

_TOWER = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|visual_projection|image_encoder|audio_tower|audio_model"
    r"|multi_modal_projector|embed_tokens_extend)\."
)
"""Parts that read images and sound, in models that keep them inside their decoder."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix.

    name: of the layer; of an expert's the parameter's name and the expert's number, 'model.….experts.down_proj.3'.
    module: that holds it.
    parameter: full name of the parameter that it is, or is a part of.
    expert: its number in that parameter; None where the parameter is the matrix.
    transposed: the parameter holds it as [I, O].
    piled: how many matrices lie one below the other in a parameter of two dimensions; None where they don't.
    """

    name: str
    module: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool = False
    piled: int | None = None

    @property
    def key(self) -> str:
        """Its name in a file of codes: the parameter's name, or the expert's."""
        return self.parameter if self.expert is None else self.name

    def of(self, tensor: Tensor) -> Tensor:
        """The part [O, I] of a tensor that is shaped like the parameter (its gradient, say): a view, not a copy."""
        apart = tensor if self.piled is None else tensor.view(self.piled, -1, tensor.shape[1])
        part = apart if self.expert is None else apart[self.expert]
        return part.T if self.transposed else part

    @property
    def weight_OI(self) -> Tensor:
        """A view without gradient: what is written into it changes the model."""
        tensor: Tensor = getattr(self.module, self.parameter.rpartition(".")[2])
        return self.of(tensor.detach())

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.weight_OI.shape[1])

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.weight_OI.shape[0])

    @property
    def bias_O(self) -> Tensor | None:
        """What the layer adds to its product, or None."""
        name = self.parameter.rpartition(".")[2]
        of_several = f"{name.removesuffix('_weight')}_bias"
        bias = getattr(self.module, "bias" if self.expert is None else of_several, None)
        if bias is None or self.expert is None:
            return bias
        chosen: Tensor = bias.detach()[self.expert]
        return chosen


@dataclass(frozen=True)
class Account:
    """All weights of a model, each in one place, by parameter name and number of values.

    A parameter that several layers share is one weight, and stands under the first of its names.

    matrices: of the decoder, by name; the head and embeddings are none.
    routers: what chooses experts; it stays dense.
    unknown: parameters of two or more dimensions in the decoder that are no matrix that remend knows.
    towers: parameters that read no text (a vision or audio tower and what joins it). The head is none, nor is what
        some models put in front of its product.
    """

    matrices: dict[str, Matrix] = field(default_factory=dict)
    routers: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    towers: dict[str, int] = field(default_factory=dict)


def decoder_of(model: CausalLM) -> nn.Module:
    """The part that reads text: of a multi-modal model the text model, else all but the head."""
    asked = getattr(model, "get_decoder", None)
    decoder, head = asked() if callable(asked) else None, model.get_output_embeddings()
    if not isinstance(decoder, nn.Module) or (isinstance(head, nn.Module) and decoder in set(head.modules())):
        return model.base_model  # some call their head the decoder
    return decoder


def account(model: CausalLM) -> Account:
    """Where each weight of a model belongs."""
    decoder, head, result = decoder_of(model), model.get_output_embeddings(), Account()
    inside, read = {id(part) for part in decoder.modules()}, {id(part) for part in model.base_model.modules()}
    experts = {name: count for name, part in model.named_modules() if (count := _experts_of(part))}
    apart = any(part is decoder for part in model.base_model.modules())  # so what is outside of it is the head
    ends = [part for part in model.modules() if part is head or isinstance(part, nn.Embedding)]
    met = {id(parameter) for part in ends for parameter in part.parameters(recurse=False)}
    for name, module in model.named_modules():
        if module in ends or (apart and id(module) not in read):
            continue
        held = [("weight", module.outline)] if isinstance(module, FrozenLinear) else []
        for own, parameter in (*held, *module.named_parameters(recurse=False)):
            full = f"{name}.{own}" if name else own
            if id(parameter) in met:
                continue
            met.add(id(parameter))
            if id(module) not in inside or _TOWER.search(full):
                result.towers[full] = parameter.numel()
            elif parameter.ndim < 2 or _NO_PRODUCT.search(full) or isinstance(module, (nn.Conv1d, nn.Conv2d)):
                continue
            elif parameter.ndim == 2 and _routes(name, module, int(parameter.shape[0]), experts):
                result.routers[full] = parameter.numel()
            elif parts := list(_matrices(name, module, own, parameter)):
                result.matrices.update({matrix.name: matrix for matrix in parts})
            elif sum(size > 1 for size in parameter.shape) > 1:  # else it is a vector, and multiplies number by number
                result.unknown[full] = parameter.numel()
    return result


def matrices(model: CausalLM) -> dict[str, Matrix]:
    """Every weight matrix of the decoder by name, in the model's order: not the head, embeddings or routers."""
    return account(model).matrices


def by_key(model: CausalLM) -> dict[str, Matrix]:
    """Every weight that codes may describe by its key: the decoder's matrices, its routers, the head, embeddings."""
    known = {matrix.key: matrix for matrix in matrices(model).values()}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            if parameter.ndim == 2 and own == "weight":
                known.setdefault(full, Matrix(name, module, full))
    return known


def _matrices(name: str, module: nn.Module, own: str, parameter: Tensor) -> Iterator[Matrix]:
    from transformers.pytorch_utils import Conv1D  # late: it takes seconds to import

    full, stack = f"{name}.{own}" if name else own, _stack_of(module)
    if own == "weight" and isinstance(module, nn.Linear):
        yield Matrix(name, module, full)
    elif own == "weight" and isinstance(module, Conv1D):
        yield Matrix(name, module, full, transposed=True)
    elif own in stack:
        piled = int(module.moe_num_experts) if parameter.ndim == 2 else None  # type: ignore[arg-type]
        for number in range(piled or len(parameter)):
            yield Matrix(f"{full}.{number}", module, full, number, stack[own], piled)
    elif own in EXPERT_PRODUCTS and parameter.ndim == 3 and hasattr(module, "is_transposed"):
        for expert in range(len(parameter)):
            yield Matrix(f"{full}.{expert}", module, full, expert, bool(module.is_transposed))


def _stack_of(module: nn.Module) -> dict[str, bool]:
    kind = type(module)  # code that comes with a model may use the same name for something else
    return STACKS.get(kind.__name__, {}) if kind.__module__.startswith("transformers.") else {}


def _experts_of(module: nn.Module) -> int:
    """How many experts a layer chooses from; 0 for any other module."""
    experts = getattr(module, "experts", None)
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    for part in (experts, *(child for child in module.children() if _stack_of(child))):
        for name in ("num_experts", "total_experts"):
            count = getattr(part, name, None)
            if isinstance(count, int) and count:
                return count
    return 0


def _routes(name: str, module: nn.Module, rows: int, experts: dict[str, int]) -> bool:
    """Whether a matrix of a module with so many rows chooses experts, or how much of shared ones is taken."""
    shared = getattr(module, "n_shared_experts", None) or 0
    for layer, count in experts.items():
        inner = name.removeprefix(f"{layer}.") if name.startswith(f"{layer}.") else ""
        if inner.startswith(("gate.", "router.")):
            return True
        if inner and not inner.startswith("experts.") and inner != "experts":
            return rows in (1, count, count + shared) and "." not in inner
    return False
