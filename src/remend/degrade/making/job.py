"""What all degradations share: load the reference, change a copy, probe it, save it with its record."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.console import console, stage, warn
from remend.data.examples import Example, bundled, choose, data_hash, load_examples, without
from remend.data.given import write_rows
from remend.data.templates import Encoded, dropped_text, encode_within
from remend.degrade.kinds import Calibrated, DegradeSettings
from remend.degrade.making.shares import require_known, skipped
from remend.errors import InputError, RemendError
from remend.files.atomic import JsonObject, new_directory, write_json, write_text
from remend.files.run_directory import occupied
from remend.files.signed import signed
from remend.models.accounting import LEFT_OUT
from remend.models.activations.walk import Sites, check_walk, completions, walk
from remend.models.blocks.placement import Placed, numbers_in, place
from remend.models.device import choose_device
from remend.models.find import CARD, ModelSource, fetch_model, find_model, hash_files, origin_note
from remend.models.load import CARD_OF_PARTS, load_model, load_tokenizer, save_model
from remend.models.matrices import Matrix, account, matrices
from remend.models.origin import origin_of
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.room import room_of
from remend.models.sampling.answers import answer
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer
from remend.models.written import FILES, RECORD, hashes_of
from remend.registry import Registry
from remend.report.card import Card, left_out, named, part_of_damage, relation_of, ways_to_use
from remend.training.measure import compare, pool
from remend.training.teachers.frozen import Frozen

if TYPE_CHECKING:
    from remend.degrade.making.by_block import BlockWork

Apply = TypeVar("Apply", bound=Callable[..., object])

PROBE_PROMPTS, PROBE_TOKENS = 32, 48
CALIBRATION_TOKENS = 64
"""Completion tokens of a calibration sample: 48 samples with their prompts are about 4,000 rows a layer."""

IN_MEMORY = 10
"""Bytes that a degradation takes of a number of the model: the reference and its copy in float32, codes, and space."""

LONGEST = 2**62
"""Tokens of a prompt, where the model sets no limit."""

DENSE_BITS = 16
"""Of a weight that is not packed, as models are served."""


@dataclass
class Damage:
    """What a degradation works on.

    reference: the healthy model, not to be changed; student: a copy that is.
    settings: what is asked for.
    unreached: matrices that no calibration token came to (experts, mostly), which were changed without it.
    work: what is done block by block, where the blocks are not in memory; reference and student are then one model.
    """

    reference: CausalLM
    student: CausalLM
    tokenizer: Tokenizer
    source: ModelSource
    settings: DegradeSettings
    calibration_hash: str | None = None
    calibrated_on: Sequence[Example] = ()
    unreached: list[str] = field(default_factory=list)
    work: BlockWork | None = None
    _rollouts: list[Rollout] | None = None

    def calibration(self) -> list[Rollout]:
        """The reference's own completions, sampled once.

        Raises InputError when there is no prompt, or where the model can't be walked.
        """
        if self._rollouts is None:
            seed = self.settings.seed
            text = self.settings if isinstance(self.settings, Calibrated) else Calibrated.model_validate({})
            if text.data is None:
                chosen = bundled("train")[: text.samples]
            else:
                chosen = choose(load_examples(text.data, columns=text.columns), text.samples, seed)
            self.calibration_hash, self.calibrated_on = data_hash(chosen), chosen
            prompts = self.encoded(chosen, CALIBRATION_TOKENS)
            check_walk(self.reference, prompts)
            self._rollouts = completions(
                self.reference, self.tokenizer, prompts, max_new_tokens=CALIBRATION_TOKENS, seed=seed
            )
        return self._rollouts

    def encoded(self, examples: Sequence[Example], answer: int) -> list[Encoded]:
        """Examples as prompts, without those, named in a warning, that leave the model no room for an answer.

        Raises InputError where none is left, and for rows that the model can't read.
        """
        room = room_of(self.reference, self.reference.config)
        limit, why = room.prompt_limit(LONGEST, answer)
        prompts, dropped = encode_within(self.tokenizer, examples, limit, rows=room.rows)
        if dropped:
            text = dropped_text(dropped, len(examples), "prompts", why)
            if not prompts:
                raise InputError(f"{text}; none is left. Give shorter ones with data.")
            warn(text)
        return prompts


@dataclass
class Changed:
    """What a degradation made.

    student: the changed model.
    entry: its part of degradation.json: kind, method, and what else describes it.
    files: writes what lies beside the model (a grid, say) into a directory.
    bits_per_weight: of the decoder's matrices, as packed, scales included; 16 for dense ones.
    packed_bytes: the whole model as packed; None counts every parameter at 16 bits.
    """

    student: CausalLM
    entry: JsonObject
    files: Callable[[Path], None] | None = None
    bits_per_weight: float = DENSE_BITS
    packed_bytes: int | None = None


def run_job(settings: DegradeSettings, model: str, out: str | Path) -> JsonObject:
    """Load `model`, damage a copy as `settings` ask, measure and save it; see kinds.degrade."""
    out = Path(out)
    if problem := occupied(out):
        raise InputError(problem)
    damage, hashes = _load(model, settings)
    if damage.work is not None:
        from remend.degrade.making.by_block import run_by_block

        return run_by_block(damage, damage.work, model, hashes, out)
    with stage(settings.title()):
        changed = settings.change(damage)
        if not changed.entry.get("kind"):
            raise InputError(
                f'{type(settings).__name__}.change describes its damage without a "kind"; its Changed needs one in '
                'entry, e.g. {"kind": "noise"}'
            )
    if isinstance(settings, Calibrated) and settings.data is not None and damage.calibration_hash is None:
        text = f"data {settings.data} has no effect: {settings.title()} needs no calibration"
        warn(text)
    record = record_of(damage, changed, model, hashes)
    with stage(f"saving {out}"), new_directory(out) as target:
        save_model(changed.student, damage.tokenizer, target)
        write_rows(out, target)
        if changed.files:
            changed.files(target)
        write_record(target, damage, changed.student, record)
    if settings.probe:  # after the saving: whatever fails here, the work is not lost
        probed(damage, lambda: changed.student, model, out, record)
    return record


def write_record(directory: Path, damage: Damage, student: CausalLM, record: JsonObject) -> None:
    """Write degradation.json and the card beside a model's files, whose hashes the record gets."""
    record[FILES] = hashes_of(directory)
    write_json(directory / RECORD, signed(record))
    _write_card(directory, damage, student, record)


def probed(damage: Damage, student: Callable[[], CausalLM], model: str, out: Path, record: JsonObject) -> None:
    """Measure what a model lost that is saved in `out`, and put it into the record there; what fails is a warning."""
    try:
        made = student()
        record["probe"] = _probe(damage, made)
        write_json(out / RECORD, signed(record))
        _write_card(out, damage, made, record)
    except Exception as error:
        reason = str(error) if isinstance(error, RemendError) else f"{type(error).__name__}: {error}"
        warn(
            f"{out} is saved, but what it lost could not be measured: {' '.join(reason.split())[:300]}. To measure "
            f"it: remend diagnose --reference {model} --student {out} --data PROMPTS.jsonl --out {out}-diagnosis"
        )


def _write_card(directory: Path, damage: Damage, student: CausalLM, record: JsonObject) -> None:
    text = Card(
        title=f"{named(damage.source.spec)}, degraded",
        lead=f"A copy of a healthy model, damaged on purpose by remend {importlib.metadata.version('remend')}: a "
        "student for recoveries, not a model to use.",
        parts=[
            *left_out(CARD_OF_PARTS, list(getattr(student.config, LEFT_OUT, None) or [])),
            part_of_damage(record, "What was done"),
        ],
        origin=origin_of(fetch_model(damage.source, weights=True)),
        relation=relation_of(record),
        use=ways_to_use(),
    ).markdown()
    write_text(directory / CARD, text)


def record_of(damage: Damage, changed: Changed, model: str, hashes: Mapping[str, str]) -> JsonObject:
    """The content of degradation.json, but for what is measured and the hashes of the files.

    No time stands in it: the same command gives the same bytes, so that a student that is made again is the same.
    """
    zeros = changed.entry.get("sparsity")
    if zeros is None:
        zeros = share_of_zeros([matrix.weight_OI for matrix in matrices(changed.student).values()])
    record: JsonObject = {
        "sparsity": zeros,
        **changed.entry,
        "reference": {"model": named(model), "files": hashes},
        "bits_per_weight": changed.bits_per_weight,
        "packed_bytes": changed.packed_bytes or DENSE_BITS // 8 * sum(p.numel() for p in changed.student.parameters()),
        "seed": damage.settings.seed,
    }
    if damage.calibration_hash:
        record["calibration"] = {"prompts": len(damage.calibration()), "hash": damage.calibration_hash}
        if damage.unreached:
            record["calibration"]["unreached"] = damage.unreached
    note = origin_note(damage.source)
    if note:
        record["note"] = note
    return record


def share_of_zeros(weights: Sequence[Tensor]) -> float:
    """How many of some matrices' weights are exactly zero, as a share; 0 of none."""
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def _load(model: str, settings: DegradeSettings) -> tuple[Damage, dict[str, str]]:
    source = find_model(model, trust_remote_code=settings.trust_remote_code)
    if source.kind == "adapter":
        raise InputError(
            f"{model} is an adapter on a base, and degrading one without the other makes no model; degrade the base, "
            "or merge the adapter (merge: true in a recipe) and degrade that"
        )
    where = choose_device(settings.device)
    source = fetch_model(source, weights=True)
    work, placed = _placed(settings, source, where)
    tokenizer = load_tokenizer(source)
    if placed.by_block:
        with stage(f"loading {model}"):
            reference, hashes = placed.load(source, dtype=torch.float32, device=where), hash_files(source)
        return Damage(reference, reference, tokenizer, source, settings, work=work), hashes
    with stage(f"loading {model}"):
        reference = load_model(source, dtype=torch.float32, device=where).requires_grad_(False)
        hashes = hash_files(source)
    return Damage(reference, copy.deepcopy(reference), tokenizer, source, settings), hashes


def _placed(settings: DegradeSettings, source: ModelSource, device: torch.device) -> tuple[BlockWork | None, Placed]:
    """What is done block by block, and where the model is kept. Raises InputError for a placement that can't be had."""
    work = settings.by_block()
    if work is None:
        if settings.placement in ("host", "disk"):
            by_itself = ", or choose a method that looks at each matrix by itself (rtn, magnitude)"
            way = by_itself if hasattr(settings, "method") else ""
            raise InputError(
                f"placement {settings.placement} can't be had for {settings.title()}: it needs the whole model in "
                f"memory; leave placement to auto{way}"
            )
        return None, Placed()
    numbers = numbers_in(source)
    needed = None if numbers is None else IN_MEMORY * numbers
    placed = place(settings.placement, source, needed, device, settings.title())
    if placed.why:
        console.print(placed.why, soft_wrap=True)
    return (work if placed.by_block else None), placed


@torch.no_grad()
def _probe(damage: Damage, student: CausalLM) -> JsonObject:
    """Forward KL (nats per token) and top-1 agreement on the reference's greedy answers."""
    parts, prompts = scorer(damage.reference), _probe_prompts(damage)
    title = "probing: the reference answers"
    rollouts = answer(damage.reference, damage.tokenizer, prompts, title, max_new_tokens=PROBE_TOKENS)
    with stage("probing: comparing", len(prompts)) as advance:
        figures = pool(compare(scorer(student), Frozen(parts), rollouts, on_rows=advance))
    if not math.isfinite(figures["kl"]):
        raise InputError(f"the divergence is {figures['kl']}: some of its logits are not finite")
    return {"kl": figures["kl"], "top1_agreement": figures["top1_agreement"], "prompts": len(prompts)}


def _probe_prompts(damage: Damage) -> list[Encoded]:
    """The demo's held-out prompts; prompts of the data that calibration did not see, where it saw some of them.

    Where the chat template refuses the demo's, the data's are taken too.
    """
    data: str | None = getattr(damage.settings, "data", None)
    if data is None or not (isinstance(damage.settings, Calibrated) and damage.calibrated_on):
        try:
            return damage.encoded(bundled("held_out")[:PROBE_PROMPTS], PROBE_TOKENS)
        except InputError:
            if data is None:
                raise
    rows = load_examples(data, columns=getattr(damage.settings, "columns", None))
    unseen = without(rows, damage.calibrated_on) or rows
    return damage.encoded(choose(unseen, PROBE_PROMPTS, damage.settings.seed), PROBE_TOKENS)


@dataclass(frozen=True)
class Method(Generic[Apply]):
    """apply: gets a weight, and the Gram matrix of its inputs where it is calibrated, else None."""

    apply: Apply
    calibrated: bool


class Methods(Generic[Apply]):
    """Ways to change one matrix, by name."""

    def __init__(self, kind: str) -> None:
        self._methods: Registry[Method[Apply]] = Registry(kind)

    def register(self, name: str, *, source: str, calibrated: bool = False) -> Callable[[Apply], Apply]:
        """Decorator that files a function under `name`; `calibrated` ones see a layer's inputs."""

        def add(apply: Apply) -> Apply:
            self._methods.register(name, source=source)(Method(apply, calibrated))
            return apply

        return add

    def get(self, name: str) -> Method[Apply]:
        """The method called `name`. Raises InputError that lists the known names."""
        return self._methods.get(name)


def chosen_matrices(model: CausalLM, skip: Sequence[str]) -> dict[str, Matrix]:
    """The decoder's matrices without those that a skip pattern matches (shell patterns; see skipped).

    Raises InputError for a pattern that matches nothing, or when nothing is left.
    """
    parts = account(model)
    layers = parts.matrices
    if not layers and not parts.unknown:
        raise InputError(f"{type(model).__name__} has no weight matrix beside its head, so there is nothing to change")
    for pattern in skip:
        if not any(skipped(name, parts, [pattern]) for name in (*layers, *parts.unknown)):
            expert = [name for name, matrix in layers.items() if matrix.expert is not None][:1]
            some = ", ".join(dict.fromkeys(list(layers)[:3] + expert))
            raise InputError(f'skip "{pattern}" matches no linear layer; names are like {some}; * matches any part')
    require_known(parts, skip, model)
    kept = {n: m for n, m in layers.items() if not skipped(n, parts, skip)}
    if not kept:
        raise InputError(f"skip {', '.join(skip)} leaves no layer to change")
    return kept


def undivided(layers: Mapping[str, Matrix], number: int) -> str:
    """Those layers whose input width `number` does not divide, named for a message; empty where it divides all."""
    names = [f"{name} ({layer.in_features})" for name, layer in layers.items() if layer.in_features % number]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def change_each(
    model: CausalLM,
    chosen: Mapping[str, Matrix],
    change: Callable[[Matrix, Tensor | None], None],
    calibrated_on: Damage | None,
    title: str,
) -> None:
    """Change matrices of a model in place, one by one.

    Args:
        model: has them.
        chosen: by name.
        change: called with a matrix, and with the Gram matrix [I, I] of its inputs where it is calibrated and a token
            came to it, else None.
        calibrated_on: None where it is not. A matrix's inputs are those that what was changed before gives it. Its
            `unreached` gets the names of matrices that no token came to.
        title: of the walk through the calibration text.
    """
    if calibrated_on is None:
        for matrix in chosen.values():
            change(matrix, None)
        return

    def visit(sites: Sites) -> None:
        for matrix in sites.matrices:
            if matrix.name in chosen:
                change(matrix, sites.gram_II if sites.rows else None)
                calibrated_on.unreached += [] if sites.rows else [matrix.name]

    walk(model, calibrated_on.calibration(), visit, title=title)


def rebuild(reference: CausalLM, changes: Mapping[str, object], state: Mapping[str, Tensor]) -> CausalLM:
    """A model like `reference` with another configuration and these weights.

    It is built anew from its configuration as saved, not cut in place: so everything that transformers derives from
    that (cache indices, head counts, rotary tables) is right, and a strict load proves that it describes exactly these
    weights, and can be read again.

    Args:
        reference: a transformers causal language model; stays as it is.
        changes: attributes of its (text) configuration and their new values.
        state: the new model's state dict.

    Returns:
        The new model in evaluation mode, on the reference's device, in its dtype, with its generation configuration.

    Raises:
        InputError: the architecture can't have that configuration, or its weights are not those in `state`.
    """
    whole = cast(PreTrainedModel, reference)
    kind = type(whole)
    asked = ", ".join(f"{name} {value}" for name, value in changes.items() if isinstance(value, int))
    config = copy.deepcopy(reference.config)
    text = config.get_text_config()
    try:
        for name, value in changes.items():
            setattr(text, name, value)
        config = type(config).from_dict(config.to_dict())
        if hasattr(config, "validate"):
            config.validate()
        model = kind(config).to(device=reference.device, dtype=whole.dtype)
        wanted = model.state_dict()
        other = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
        if other:
            raise ValueError(f"its weights would be others ({', '.join(other[:2])}, …), since its blocks differ")
        model.load_state_dict(dict(state), strict=True)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:240]
        raise InputError(f"{kind.__name__} can't have {asked}: {reason}") from error
    model.tie_weights()
    model.generation_config = copy.deepcopy(whole.generation_config)
    return cast(CausalLM, model.eval())


def path_of(model: CausalLM, module: nn.Module) -> str:
    """The name of a module inside a model, e.g. 'model.layers'."""
    return next(str(name) for name, part in model.named_modules() if part is module)
