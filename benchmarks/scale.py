"""How far is the arithmetic of memory from what a recovery holds? Models with random weights, of several sizes.

    python benchmarks/scale.py --out DIR [--sizes 10m 30m 67m 135m] [--ways all scales norms adapter] [--steps 2]

For each size a healthy model is written shard by shard in bfloat16, `remend degrade quantize` makes a student of it,
and `remend recover` runs in a process of its own for each way of training; the first one repairs too. A thread samples
the process's anonymous memory (RssAnon + RssShmem of /proc/self/status), from which what the imports take is
subtracted: files that are mapped don't count. glibc is told to map every block above 128 KiB, so that what is freed
goes back: by default it raises that limit to 32 MiB as it goes, and keeps small models' tensors for reuse
(MALLOC_MMAP_THRESHOLD_ in the environment sets another limit). Beside each phase's peak stands what `remend check` says
of the same recipe. What is in DIR already is not run again; predictions are made anew each time. Weights are random:
nothing is said of quality. Two more ways are `8bit` (adamw-8bit) and `disk` (repaired block by block). Any name that
`remend plan` knows is a size too (Qwen2.5-0.5B, Qwen2.5-1.5B).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAYS: Mapping[str, Sequence[str]] = {
    "all": ("repair_samples=8",),
    "scales": ("train=scales", "repair=false"),
    "norms": ("train=norms", "repair=false"),
    "adapter": ("lora.rank=16",),
    "8bit": ("optimizer=adamw-8bit", "repair=false"),
    "disk": ("steps=0", "placement=disk", "repair_samples=8"),
}
"""What the recipes differ in: what moves, in how many bits its moments are held, and where blocks are kept."""

USUAL = ("all", "scales", "norms", "adapter")
"""Ways that are run where none is named."""

COMMON = ("held_out=4", "max_new_tokens=8", "batch_size=8", "save_every=0", "updates_per_rollout=1", "dtype=float32")

_NAMES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
LLAMA: Mapping[str, Mapping[str, int]] = {
    "10m": dict(zip(_NAMES, (10, 256, 768, 4, 2, 8_192), strict=True)),
    "30m": dict(zip(_NAMES, (24, 192, 576, 3, 1, 98_304), strict=True)),
    "67m": dict(zip(_NAMES, (16, 512, 1_536, 8, 4, 32_768), strict=True)),
    "135m": dict(zip(_NAMES, (30, 576, 1_536, 9, 3, 49_152), strict=True)),
}
"""Shapes of Llama with heads of 64; embeddings are tied, and hold 21%, 65%, 25% and 21% of the parameters."""

SHARD = 2**28
"""Bytes of a file of weights, at most one tensor more."""

EVERY = 0.005
"""Seconds between two samples of memory."""


def config_of(size: str, layers: int | None = None) -> Any:
    """The transformers configuration of a size, with so many layers in place of its own number."""
    from transformers import AutoConfig

    from remend.models.shapes import shape_named

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048}
    shape = {} if size in LLAMA else shape_named(size).config()
    if size in LLAMA:
        shape = {"model_type": "llama", **LLAMA[size], "head_dim": 64, "tie_word_embeddings": True}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    return AutoConfig.for_model(shape.pop("model_type"), **shape, **ends)


def tensors_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Name and random values of every weight, one after the other; only one is alive at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for number, (name, shape) in enumerate((n, p.shape) for n, p in model.named_parameters()):
        generator = torch.Generator().manual_seed(number)
        if len(shape) == 1:
            yield name, (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
            continue
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32) * (shape[-1] ** -0.5)
        yield name, drawn.to(torch.bfloat16)


def write_model(size: str, directory: Path, layers: int | None = None) -> None:
    """A model of the size with random weights, shard by shard, and a tokenizer that names all of its tokens."""
    from safetensors.torch import save_file

    config = config_of(size, layers)
    config.dtype = "bfloat16"
    directory.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {}
    where: dict[str, str] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(held, directory / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in tensors_of(config):
        held[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in held.values()) >= SHARD:
            flush()
    if held:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    tokenizer_of(config.vocab_size).save_pretrained(directory)
    config.save_pretrained(directory)


def tokenizer_of(vocabulary: int) -> Any:
    """A tokenizer of bytes whose other tokens no text has: every row of the model has a name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused-{number}>" for number in range(len(names), vocabulary)]
    core = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names[:3])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    kinds = ("RssAnon:", "RssShmem:")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))


@dataclass
class Watched:
    """The peak of anonymous memory in each phase, and the seconds that it took, while `watching` runs."""

    phase: str = "loading"
    peaks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Sample until it has ended."""
        began = time.monotonic()
        while not self.ended.wait(EVERY):
            now, phase = time.monotonic(), self.phase
            self.peaks[phase] = max(self.peaks.get(phase, 0), anonymous())
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - began
            began = now


def watch(words: Sequence[str], target: Path) -> None:
    """Carry out a line of remend's in this process, and write the peak of each phase."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import remend.recovery.preflight
    import remend.recovery.run  # noqa: F401
    from remend.__main__ import main as remend_main
    from remend.recovery.clock import Clock

    gc.collect()
    seen, imports, enter = Watched(), anonymous(), Clock.enter

    def noted(clock: Clock, phase: str, *, shown: bool = True) -> None:
        seen.phase = phase or "report"
        enter(clock, phase, shown=shown)

    Clock.enter = noted  # type: ignore[method-assign, assignment]
    sampler = threading.Thread(target=seen.look, daemon=True)
    sampler.start()
    sys.argv = ["remend", *words]
    code: Any = 0
    try:
        remend_main()
    except SystemExit as ended:  # typer ends every command so
        code = ended.code
    seen.ended.set()
    sampler.join()
    if code:
        raise SystemExit(code)
    peaks = {phase: peak - imports for phase, peak in seen.peaks.items()}
    kept = {"imports": imports, "peaks": peaks, "seconds": seen.seconds, "words": list(words)}
    target.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def carried_out(*words: str) -> None:
    """Run this interpreter; what it printed is shown where it fails."""
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}:\n{done.stdout[-3000:]}")


def recipe(out: Path, size: str, way: str, steps: int) -> list[str]:
    """The words of a recovery."""
    place = out / size
    own = [f"student={place / 'student'}", f"teacher={place / 'teacher'}", f"data={out / 'prompts.jsonl'}"]
    count = [] if any(word.startswith("steps=") for word in WAYS[way]) else [f"steps={steps}"]
    return [*own, f"out={place / way}", *count, *COMMON, *WAYS[way]]


def predicted(words: Sequence[str]) -> Mapping[str, int]:
    """Bytes by phase of a recipe, as `remend check` has them, above what the imports take."""
    from remend.files.settings import parse_overrides
    from remend.recovery.footprint import BUFFERS, OBJECTS, PROGRAM, memory_of
    from remend.recovery.forecast import facts_of
    from remend.recovery.job import settings
    from remend.recovery.preflight import preflight

    overrides = parse_overrides([word for word in words if not word.startswith("out=")])
    checked = preflight(settings(overrides={**overrides, "out": "not-run"}))
    checked.raise_problems()
    assert checked.plan is not None
    imports = PROGRAM - OBJECTS - BUFFERS
    return {phase: held - imports for phase, held in memory_of(facts_of(checked.plan)).phases.items()}


def table(results: Mapping[tuple[str, str], Any], said: Mapping[tuple[str, str], Mapping[str, int]]) -> str:
    """Markdown."""
    lines = [
        "| size | train | phase | measured, MiB | predicted, MiB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (size, way), found in results.items():
        for phase, peak in found["peaks"].items():
            guess = said[size, way].get(phase)
            if guess is not None:
                ratio = f"{guess / peak:.2f}" if peak > 0 else "-"
                lines.append(f"| {size} | {way} | {phase} | {peak / 2**20:.0f} | {guess / 2**20:.0f} | {ratio} |")
    return "\n".join(lines)


def prepare_prompts(file: Path) -> None:
    """48 short prompts."""
    if not file.exists():
        rows = [{"prompt": f"Tell me about number {number}."} for number in range(48)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(out: Path, size: str) -> None:
    """What the recoveries of a size read."""
    prepare_prompts(out / "prompts.jsonl")
    place = out / size
    if not (place / "teacher" / "config.json").exists():  # which is written last
        write_model(size, place / "teacher")
    if not (place / "student").exists():
        words = ("degrade", "quantize", str(place / "teacher"), "--format", "int4-g64-sym", "--method", "rtn")
        carried_out("-m", "remend", *words, "--no-probe", "--out", str(place / "student"))


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(LLAMA))
    parser.add_argument("--ways", nargs="+", default=list(USUAL), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(args.words, args.watch)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**17))
    os.environ["REMEND_CACHE"] = str((args.out / "cache").absolute())
    results, said = {}, {}
    for size in args.sizes:
        prepare(args.out, size)
        for way in args.ways:
            kept, words = args.out / f"{size}-{way}.json", recipe(args.out, size, way, args.steps)
            if not kept.exists():
                carried_out(__file__, "--out", str(args.out), "--watch", str(kept), "--", "recover", *words)
            results[size, way] = json.loads(kept.read_text(encoding="utf-8"))
            said[size, way] = predicted(words)
        print(table(results, said), flush=True)


if __name__ == "__main__":
    main()
