"""The cells of the table: what is asked of the command line, and how the answer is checked without remend.

Each check reads what was written with transformers and safetensors alone. It returns the fault in words, or an empty
string. So it holds for any way in which remend gets there, and it can't make the same mistake.

Legend: E experts, O outputs, I inputs, G groups of neighbouring inputs, N positions, V tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D

Check = Callable[[], str]

FORMAT, GROUP, LARGEST, BITS = "int4-g32-sym", 32, 8, 4.5
"""The grid of all cells: 16 points, one scale of 16 bits for 32 neighbouring inputs, codes from -8 to 7."""
WHOLE = 0.99
"""The share of the decoder's matrix weights that a degradation must have reached."""
STUDENTS = {"rtn": "rtn", "2:4": "two-four", "depth-bi": "depth-bi", "width": "width", "heads": "heads", "ft": "ft"}
"""Which cells make a student that the cell `rec` recovers, and where it lies."""
FITTED = {"rtn", "two-four"}
"""Students that repair fits in closed form, so that even two steps win something back."""
NOISE = 1e-5
"""Nats a token below which a KL tells nothing; Granite's small logits give such."""
NEEDS: dict[str, tuple[str, ...]] = {"rec": tuple(STUDENTS), "diag": ("rtn",), "dense": ("rtn", "rec")}
NEEDS |= dict.fromkeys(("c-t", "gguf"), ("rtn",))
"""Cells that use what others made."""
GATES = {"gate", "router", "shared_expert_gate"}
"""Last names of what chooses experts; it stays dense."""
TRANSPOSED = {"gpt_oss"}
"""Architectures that store an expert as [inputs, outputs]."""


@dataclass(frozen=True)
class Place:
    """A model of the zoo, a directory for what is made of it, and the data that all models share."""

    reference: Path
    work: Path
    prompts: Path
    pairs: Path

    def made(self, *names: str) -> list[Path]:
        """What of these is there, after the cells before: students, and recoveries that came to their end."""
        places = [self.work / name for name in names]
        return [place for place in places if any((place / file).is_file() for file in ("config.json", "summary.json"))]


@dataclass(frozen=True)
class Job:
    """One call of the command line, and what must be true when it says that it went well."""

    name: str
    words: Sequence[object]
    check: Check


def write_data(directory: Path) -> tuple[Path, Path]:
    """Prompts for recoveries, and pairs to fine-tune on."""
    who = ["a cat", "the sea", "my aunt", "an owl", "the moon", "a baker", "our dog", "the king", "a tree", "the bus"]
    prompts = [{"prompt": f"Tell me about the number {i} and why {who[i % 10]} likes it."} for i in range(30)]
    pairs = [{"prompt": f"Say {i}", "completion": f"The answer is {i}."} for i in range(12)]
    paths = directory / "prompts.jsonl", directory / "pairs.jsonl"
    for path, rows in zip(paths, (prompts, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


# what is called ------------------------------------------------------------------------------------------------------


def _degrade(name: str, kind: str, *words: object, check: Callable[[Path, Path], str]) -> Callable[[Place], list[Job]]:
    def jobs(place: Place) -> list[Job]:
        out = place.work / name
        call = ["degrade", kind, place.reference, *words, "--out", out]
        return [Job(name, call, partial(check, place.reference, out))]

    return jobs


def _fine_tune(place: Place) -> list[Job]:
    out = place.work / "ft"
    call = ["degrade", "finetune", place.reference, "--data", place.pairs, "--steps", 2, "--no-probe", "--out", out]
    return [Job("ft", call, partial(fine_tuned, place.pairs, place.reference, out))]


def _recover(place: Place, student: Path, *settings: str, check: Callable[[Path, Path, Path], str]) -> Job:
    out = place.work / f"recovered-{student.name}"
    few = ["steps=2", "max_new_tokens=8", "batch_size=2", "held_out=4", "repair_samples=8", "dtype=float32", *settings]
    files = ["--student", student, "--teacher", place.reference, "--data", place.prompts, "--out", out]
    return Job(f"of {student.name}", ["recover", *few, *files], partial(check, place.reference, student, out))


def _copy(place: Place) -> Path:
    copy = place.work / "copy"
    if not copy.is_dir():
        shutil.copytree(place.reference, copy)
    return copy


def _recover_copy(place: Place) -> list[Job]:
    return [_recover(place, _copy(place), "steps=0", check=untouched)]


def _recover_students(place: Place) -> list[Job]:
    return [_recover(place, student, check=recovered) for student in place.made(*STUDENTS.values())]


def _diagnose(place: Place) -> list[Job]:
    out, students = place.work / "diagnosis", [_copy(place), *place.made("rtn")]
    named = [word for student in students for word in ("--student", student)]
    call = ["diagnose", "--reference", place.reference, *named, "--rows", 48, "--out", out]
    return [Job("diagnose", call, partial(diagnosed, out))]


def _export(container: str, *names: str, plain: bool = False) -> Callable[[Place], list[Job]]:
    def jobs(place: Place) -> list[Job]:
        sources = [*place.made(*names), *([place.reference] if plain else [])]
        found = []
        for source in sources:
            model = source / "model" if (source / "model").is_dir() else source
            whose = "reference" if source == place.reference else source.name
            out = place.work / f"{container}-{whose}"
            call = ["export", source, "--format", container, "--out", out]
            found.append(Job(f"of {whose}", call, partial(same_model, model, out, container)))
        return found

    return jobs


def on_whole_grid(reference: Path, student: Path) -> str:
    """The cells rtn and gptq."""
    fault = _whole(reference, student, lambda weight: _on_grid(weight).float().mean())
    bits = _record(student)["bits_per_weight"]
    return fault or ("" if abs(bits - BITS) < 0.2 else f"{bits:.2f} bits per weight are said, and it is {BITS}")


def two_of_four(reference: Path, student: Path) -> str:
    """The cell 2:4: zeros where they must be, as many as are said, and what is left is as it was."""
    fault = _whole(reference, student, lambda weight: _at_most_two(weight).float().mean())
    before, after = matrices(load(reference)), matrices(load(student))
    moved = [name for name, kept in after.items() if not torch.equal(kept, before[name] * (kept != 0))]
    if fault or moved:
        return fault or f"weights that were kept changed: {_few(moved)}"
    said, zeros = _record(student)["sparsity"], sum(int((kept == 0).sum()) for kept in after.values())
    own = zeros / sum(kept.numel() for kept in after.values())
    return "" if abs(said - own) < 0.01 else f"{said:.1%} zeros are said, and there are {own:.1%}"


def _record(student: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((student / "degradation.json").read_text(encoding="utf-8"))
    return found


FEW: tuple[object, ...] = ("--samples", 6, "--no-probe")
PRUNE = "prune"
"""Depth and width are called by their older names, which every version takes."""


def _cells() -> dict[str, Callable[[Place], list[Job]]]:
    quantize = ("--format", FORMAT)
    depth, width = ("--method", "depth", "--layers"), ("--method", "width", "--ffn")
    return {
        "rtn": _degrade("rtn", "quantize", *quantize, check=on_whole_grid),
        "gptq": _degrade("gptq", "quantize", *quantize, "--method", "gptq", *FEW, check=on_whole_grid),
        "2:4": _degrade("two-four", PRUNE, "--method", "wanda", "--sparsity", "2:4", *FEW, check=two_of_four),
        "depth": _degrade("depth", PRUNE, *depth, "0,", *FEW, check=blocks_left_out),
        "depth-bi": _degrade("depth-bi", PRUNE, *depth, 1, *FEW, check=blocks_left_out),
        "width": _degrade("width", PRUNE, *width, 0.25, *FEW, check=columns_left_out),
        "heads": _degrade("heads", PRUNE, *width, 0, "--heads", 1, *FEW, check=columns_left_out),
        "ft": _fine_tune,
        "rec-copy": _recover_copy,
        "rec": _recover_students,
        "diag": _diagnose,
        "dense": _export("dense", "rtn", "recovered-rtn"),
        "c-t": _export("compressed-tensors", "rtn", "recovered-rtn"),
        "gguf": _export("gguf", "rtn", "recovered-rtn", plain=True),
    }


# how it is checked: weights ------------------------------------------------------------------------------------------


def load(directory: Path, **how: Any) -> Any:
    """A model in float32 by transformers alone. Raises AssertionError where files and model don't fit each other."""
    kind = AutoModelForCausalLM
    if "gguf_file" not in how:
        kind = getattr(transformers, AutoConfig.from_pretrained(directory).architectures[0])
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **how)
    lost = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert how or not lost, f"files and model don't fit each other: {lost}"
    return model.eval()


def matrices(model: Any) -> dict[str, Tensor]:
    """The decoder's matrix weights, [O, I] or [E, O, I]: of linear layers, Conv1D and experts, by an own count.

    Left out are the head, what chooses experts, and towers that see or hear.
    """
    head, seen = model.get_output_embeddings(), {}
    decoder = "language_model" if hasattr(model.config, "vision_config") else ""
    transposed = model.config.model_type in TRANSPOSED
    for name, module in model.named_modules():
        if module is head or decoder not in name or name.split(".")[-1] in GATES:
            continue
        if isinstance(module, nn.Linear):
            seen[f"{name}.weight"] = module.weight.detach()
        elif isinstance(module, Conv1D):
            seen[f"{name}.weight"] = module.weight.detach().T
        elif not isinstance(module, (nn.Embedding, nn.Conv1d)):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or own.endswith("bias") or own == "A_log":
                    continue
                assert parameter.ndim == 3, f"{name}.{own} {tuple(parameter.shape)} is of a kind that nobody counted"
                seen[f"{name}.{own}"] = parameter.detach().transpose(1, 2) if transposed else parameter.detach()
    return seen


def _whole(reference: Path, student: Path, reached: Callable[[Tensor], Tensor]) -> str:
    """Whether nearly all matrix weights were reached, and nothing else was changed."""
    before, after = load(reference), load(student)
    weights = matrices(after)
    shares = {name: float(reached(weight)) for name, weight in weights.items()}
    size = sum(weight.numel() for weight in weights.values())
    share = sum(shares[name] * weight.numel() for name, weight in weights.items()) / size
    states = before.state_dict(), after.state_dict()
    if states[0].keys() != states[1].keys():
        return f"has other parameters: {_few(sorted(states[0].keys() ^ states[1].keys()))}"
    others = [name for name in states[0] if name not in weights and not torch.equal(states[0][name], states[1][name])]
    untouched = [name for name, own in shares.items() if own < WHOLE]
    if share < WHOLE:
        return f"{1 - share:.0%} of the decoder's matrix weights were not reached: {_few(untouched)}"
    return f"changed though they are no matrices of the decoder: {_few(others)}" if others else ""


def _on_grid(weight: Tensor) -> Tensor:
    """For each group whether its weights are small whole multiples of one number, and so on a grid of 16 points.

    The scale is unknown: the smallest gap between two weights is one step, or two, or three, …
    """
    size = GROUP if weight.shape[-1] % GROUP == 0 else weight.shape[-1]
    groups = weight.double().reshape(-1, size)
    ordered = torch.cat([groups, torch.zeros_like(groups[:, :1])], 1).sort(1).values
    gaps = ordered.diff(dim=1)
    tiny = 1e-5 * groups.abs().amax(1, keepdim=True)
    step = gaps.masked_fill(gaps <= tiny, torch.inf).amin(1, keepdim=True)
    step = step.masked_fill(step.isinf(), 1.0)  # all are zero
    fits = torch.zeros(len(groups), dtype=torch.bool)
    for parts in range(1, LARGEST + 1):
        codes = groups / step * parts
        fits |= ((codes - codes.round()).abs().amax(1) < 1e-3) & (codes.abs().amax(1) < LARGEST + 0.5)
    return fits


def _at_most_two(weight: Tensor) -> Tensor:
    """For each four neighbouring inputs whether two or more are zero."""
    return (weight.reshape(-1, 4) != 0).sum(1) <= 2


# how it is checked: answers ------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of three rows of fixed tokens, in one plain pass: [3, N, V]."""
    ids = torch.randint(3, 380, (3, 40), generator=torch.Generator().manual_seed(3))
    answer: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return answer


def _unlike(expected: Any, model: Any, what: str) -> str:
    there, here = logits(expected), logits(model)
    if not here.isfinite().all():
        return "logits are not finite"
    off, largest = float((there - here).abs().max()), float(there.abs().max())
    return f"logits differ by {off:.3g} of {largest:.3g} from {what}" if off > 1e-4 * largest else ""


def blocks_left_out(reference: Path, student: Path) -> str:
    """Depth: the student answers as the reference whose removed blocks hand on what they get."""
    gone = _record(student)["removed_layers"]
    expected, shallow = load(reference), load(student)
    blocks = _blocks(expected)
    if not gone or len(_blocks(shallow)) != len(blocks) - len(gone):
        return f"{gone} are said to be removed, and {len(_blocks(shallow))} blocks of {len(blocks)} are left"
    for index in gone:
        blocks[index].forward = partial(_through, blocks[index].forward)
    return _unlike(expected, shallow, f"the reference without blocks {gone}")


def _blocks(model: Any) -> nn.ModuleList:
    """The largest list of modules that has as many as the configuration says there are layers."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def _through(forward: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What the block would have returned, with its input in place of its output."""
    result = forward(*values, **named)
    given = values[0] if values else named["hidden_states"]
    return (given, *result[1:]) if isinstance(result, tuple) else given


def columns_left_out(reference: Path, student: Path) -> str:
    """Width: the student answers as the reference whose removed channels and heads write nothing."""
    expected = load(reference)
    with torch.no_grad():
        for name, kept in load_file(student / "remend" / "width.safetensors").items():
            owner, _, kind = name.rpartition(".")
            module = expected.get_submodule(owner)
            weight = (module.down_proj if kind == "channels" else module.o_proj).weight
            units = weight.shape[1] if kind == "channels" else expected.config.get_text_config().num_key_value_heads
            stays = torch.zeros(units).index_fill(0, kept.long(), 1.0)
            assert int(stays.sum()) < units, f"nothing was removed from {owner}"
            weight.mul_(stays.repeat_interleave(weight.shape[1] // units))
    return _unlike(expected, load(student), "the reference with these columns zero")


def fine_tuned(pairs: Path, reference: Path, student: Path) -> str:
    """Fine-tuning: the rows that were trained on became likelier."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(reference)
    losses = []
    for model in (load(reference), load(student)):
        total = 0.0
        for row in rows:
            asked = _prompt(tokenizer, row["prompt"])
            answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            total -= float(_log_probabilities(model, asked, answer).gather(1, torch.tensor([answer]).T).sum())
        losses.append(total)
    before, after = losses
    return "" if after < before else f"the loss on its rows went from {before:.4f} to {after:.4f}"


def untouched(reference: Path, student: Path, run: Path) -> str:
    """Recovery of a copy in no steps: KL is 0, answers are the reference's own, and the model is saved as it was."""
    kl = json.loads((run / "summary.json").read_text(encoding="utf-8"))["degraded"]["kl"]
    if kl != 0:
        return f"KL of an untouched copy is {kl}"
    return _same_tensors(load(student), load(run / "model")) or _measured(reference, student, run)


def recovered(reference: Path, student: Path, run: Path) -> str:
    """Recovery: grid and zeros hold, and what was measured is what transformers computes from what was saved."""
    before, after = matrices(load(student)), matrices(load(run / "model"))
    if before.keys() != after.keys():
        return f"has other matrices: {_few(sorted(before.keys() ^ after.keys()))}"
    alive = [n for n, w in after.items() if _at_most_two(before[n]).all() and (w[before[n] == 0] != 0).any()]
    if alive:
        return f"zeros came back: {_few(alive)}"
    if (student / "remend" / "grid.safetensors").is_file():
        left = [n for n, w in after.items() if (_on_grid(before[n]) & ~_on_grid(w)).any()]
        if left or (fault := _off_stored_grid(run / "model")):
            return f"left the grid: {_few(left)}" if left else fault
    said = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    there, here = said["degraded"]["kl"], said["recovered"]["kl"]
    if student.name in FITTED and here >= there > NOISE:
        return f"nothing was won back: KL was {there:.5f}, and is {here:.5f}"
    return _measured(reference, student, run)


def _off_stored_grid(directory: Path) -> str:
    """Whether the saved weights are scale times code, bit for bit, as the file that describes the grid says.

    A matrix has its parameter's name there, an expert this and its number.
    """
    model, stored = load(directory), load_file(directory / "remend" / "grid.safetensors")
    weights = {**model.state_dict(), **matrices(model)}
    names, off = [key.removesuffix(".codes") for key in stored if key.endswith(".codes")], []
    for name in names:
        codes_OI, scales_OG = stored[f"{name}.codes"].float() - LARGEST, stored[f"{name}.scales"].float()
        whole, _, expert = name.rpartition(".")
        weight_OI = weights[name] if name in weights else weights[whole][int(expert)]
        value_OI = codes_OI * scales_OG.repeat_interleave(codes_OI.shape[1] // scales_OG.shape[1], 1)
        if not torch.equal(value_OI, weight_OI):
            off.append(name)
    return f"not scale times code: {_few(off)}" if off or not names else ""


def _measured(reference: Path, student: Path, run: Path) -> str:
    """Whether the run's answers and figures are those of plain passes by transformers, on its held-out prompts.

    The reference's answers must be its own first choices, and the sums of KL on them are computed once more.
    """
    said = {name: _rows(run / f"{name}.jsonl") for name in ("samples", "reference", "held_out")}
    tokenizer = AutoTokenizer.from_pretrained(reference)
    teacher, models = load(reference), {"degraded": load(student), "recovered": load(run / "model")}
    if not said["samples"].keys() & said["reference"].keys():
        return "no held-out prompt was answered"
    for key in said["samples"].keys() & said["reference"].keys():
        asked, answer = _prompt(tokenizer, said["samples"][key]["prompt"]), said["reference"][key]["completion"]
        right_NV = _log_probabilities(teacher, asked, answer)
        chosen_N = right_NV.gather(1, torch.tensor([answer]).T)[:, 0]
        if (off := float((right_NV.amax(1) - chosen_N).max())) > 1e-3:
            return f"an answer of the reference is not its own: a token is {off:.3g} nats below the first choice"
        for name, model in models.items():
            other_NV = _log_probabilities(model, asked, answer)
            own, theirs = float((right_NV.exp() * (right_NV - other_NV)).sum()), said["held_out"][key][f"kl_sum_{name}"]
            if abs(own - theirs) > 1e-5 + 1e-3 * abs(own):
                return f"KL of the {name} model was measured as {theirs:.5f}, and is {own:.5f}"
    return ""


def _prompt(tokenizer: Any, text: str) -> list[int]:
    asked = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def _log_probabilities(model: Any, asked: list[int], answer: list[int]) -> Tensor:
    """Of all tokens at each place of the answer, in one plain pass: [N, V]."""
    every: Tensor = model(input_ids=torch.tensor([[*asked, *answer]]), use_cache=False).logits[0]
    return every[len(asked) - 1 : -1].double().log_softmax(-1)


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def diagnosed(directory: Path) -> str:
    """Diagnosis: a copy is found to be one, and a student on a grid is not."""
    said = json.loads((directory / "diagnosis.json").read_text(encoding="utf-8"))
    others: list[dict[str, Any]] = said.pop("others", [])
    if said["behaviour"]["kl"] != 0 or any(abs(layer["cka"] - 1) > 1e-6 for layer in said["layers"]):
        return f"an untouched copy has KL {said['behaviour']['kl']}, CKA {[layer['cka'] for layer in said['layers']]}"
    return "" if all(other["behaviour"]["kl"] > 0 for other in others) else "a student on a grid has KL 0"


def same_model(source: Path, directory: Path, container: str) -> str:
    """Exports: transformers reads the same tensors and computes the same logits."""
    how: dict[str, Any] = {}
    if container == "gguf":
        how["gguf_file"] = "model.gguf"
    if container == "compressed-tensors":
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    expected, model = load(source), load(directory, **how)
    return _same_tensors(expected, model) or _unlike(expected, model, "what was exported")


def _same_tensors(expected: Any, model: Any) -> str:
    there, here = expected.state_dict(), model.state_dict()
    unlike = [n for n in there if n in here and not torch.equal(there[n], here[n])] + sorted(there.keys() ^ here.keys())
    return f"tensors differ: {_few(unlike)}" if unlike else ""


def _few(names: list[str]) -> str:
    """Names without the numbers of their layers, each once."""
    plain = dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join([*plain][:4]) + (f" and {len(plain) - 4} more" if len(plain) > 4 else "")


CELLS = _cells()
"""What the table's columns ask, in the order in which they run."""
