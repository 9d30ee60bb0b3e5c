"""What golden.py's comparison may find: a difference, and the reasons for those that are meant."""

from __future__ import annotations

import re
from dataclasses import dataclass

CLOSE = 1e-9
"""How much a library's formula may round a statistic otherwise."""


@dataclass(frozen=True)
class Difference:
    """What one place of one file says on each side."""

    file: str
    place: str
    """A key of JSON ('recipe.steps'), a tensor's name, or a line."""
    before: object
    after: object
    close: bool = False
    """A statistic that differs by less than CLOSE."""


@dataclass(frozen=True)
class Explained:
    """A difference that is meant, and why. Place, texts and file by regular expression, each of the whole."""

    reason: str
    place: str
    text: str = r"(.|\n)*"
    file: str = r".*"

    def fits(self, difference: Difference) -> bool:
        """Whether this is the reason."""
        texts = [value for value in (difference.before, difference.after) if value != MISSING]
        fits = re.fullmatch(self.place, difference.place) and re.fullmatch(self.file, difference.file)
        return bool(fits) and all(re.fullmatch(self.text, str(value)) for value in texts)


MISSING = "missing"
CHANGED = r"(importance_clip|scales|loss|columns|save_dtype|max_shard_size|epochs|attn_implementation|prompts_per_step)"
"""Keys of a recipe that came or went since 13d6498; their value must be the one that does nothing."""
NOTHING = r"(\"|&#34;)?(None|null|fixed)\b.*"
QUOTE = r"(\"|&#34;)"
SAVED_IN = "a run says in what it saved the model"
BY_STEPS = "the default follows the steps"
CAME_OR_WENT = "the recipe key came or went"
PROBED = "a calibrated student is probed on its own data"
CALIBRATED = r"(depth|gguf|gptq|mask|nvfp4|sparse|width)"
THE_GRID = "the grid has a folder of its own, and its header one entry"
SHARES = "degradations say which weights they reached"
STRANGERS = "an export is opened by readers without remend, and says which"
EXPORTS = r"(after|made)/(dense|gguf|nf4|packed)/"
RULES = "a GGUF header names the rules of the tokenizer, which is built by them"
"""Its tensors are compared by the export itself, and by tests/exporting/test_export_gguf.py."""
PAGES = "pages and cards were drawn anew; the files that they show are compared"
PROGRESS = "progress counts phases, in other words, and a run ends with what to do next"
WORST = "a run keeps its worst held-out prompts token by token"
JUDGED = "repair says what it could not explain, and where it held back"
REFITTED = "a compressed student's repair is fitted to seven eighths of its text, so all that comes after it is other"
OF_REPAIR = r"(unexplained|held_back|apart)"
HASHED = "what is written is hashed"
NAMED = "what is published names a model by the last part of its path"
FEW_HELD_OUT = "few held-out prompts are a warning"
EXPLAINED = [
    Explained(PAGES, r".*", file=r".*\b(report\.(md|html|json)|README\.md)"),
    Explained(PROGRESS, r"line \d+", file=r"logs/(\w+-(killed|resumed)|\d+-(study|compare|diagnose|track))\.txt"),
    Explained(
        PROGRESS,
        r"line \d+",
        r"|What to do next:|  .*|.* bits (a|per) weight, .*|probe: .*|.*(bytes|MiB)",
        r"logs/(degrade-\w+|\d+-(export|eval))\.txt",
    ),
    Explained(
        "zeros are told of pruned models alone",
        r"line \d+",
        r"sparsity: .*",
        r"logs/degrade-(gptq|int\d|nf4|nvfp4)\.txt",
    ),
    Explained(WORST, r"", "there", r".*\bworst\.jsonl"),
    Explained("each step notes the memory", r"\[\d+\]\.rss_mib", r"\d+", r".*\btiming\.jsonl"),
    Explained("each phase is timed", r"(\[\d+\](\..*)?|line \d+|)", file=r".*\btiming\.jsonl"),
    Explained(
        FEW_HELD_OUT,
        r"(.*\.)?warnings(\[\d+\])?",
        r"\[\]|.*held out to measure the recovery.*|\[.*prompts and completions'\]",
    ),
    Explained(FEW_HELD_OUT, r".*line \d+", r".*held out to measure the recovery.*"),
    Explained(JUDGED, rf"(repair\.)?{OF_REPAIR}(\[\d+\]|\..*)?", file=r".*\b(summary|repair)\.json"),
    Explained(REFITTED, r".*", file=r"(.*/)?(grid|mask|shallow|packed|gguf|narrow|study)/.*"),
    Explained(JUDGED, r".*line \d+", rf"\s*{QUOTE}?{OF_REPAIR}{QUOTE}?: .*"),
    Explained("the page names what fits", r"exports", file=r".*\bsummary\.json"),
    Explained("the page says which stream keeps the task", r"streams\.\w+\.teacher", file=r".*\bsummary\.json"),
    Explained("a table says how many prompts were held out", r"rows\[\d+\]\.held_out_prompts", r"\d+"),
    Explained("held-out prompts say their equal tokens", r"\[\d+\]\.agree_\w+", r"\d+", r".*\bheld_out\.jsonl"),
    Explained("a diagnosis says it in other words", r"(.*\.)?sentences\[\d+\]\.text", file=r".*diagnosis\.json"),
    Explained("a run says in what it saved the model", r"(.*\.)?saved(\..*)?"),
    Explained(HASHED, "(prompts_)?sha256", file=r".*teacher-cache\.json"),
    Explained(HASHED, r"\[\d+\]\.sha256", file=r".*track\.jsonl"),
    Explained(NAMED, r"reference\.model|source", file=r".*(degradation|export)\.json"),
    Explained(HASHED, r"(files|logged|sha256)(\..*)?", file=r".*(degradation|export|state|summary|best)\.json"),
    Explained(HASHED, r".*line \d+", rf"\s*{QUOTE}files{QUOTE}: .*|\s*{QUOTE}[\w./-]+{QUOTE}: {QUOTE}[0-9a-f]{{64}}.*"),
    Explained("models without hashes are told of", r"line \d+", r"warning: .* without hashes.*", r"logs/.*"),
    Explained("per token, in words", r"line \d+|estimator\.row_policy", r".* (a|per) (token|sequence)\b.*"),
    Explained(
        "files that hold hashes have another hash",
        r"(.*models\.student(\.degradation\.json)?|data\.cache)",
        r"[0-9a-f]{64}",
        r".*(manifest|inputs/cell)\.json",
    ),
    Explained("one process writes a run", r"", "there", r".*\.remend-lock"),
    Explained("a manifest names the device", r"(.*\.)?device", r"cpu|cuda", r".*(manifest|report)\.json"),
    Explained(
        "a run says how many processes shared how many prompts a step",
        r"(.*\.)?(processes|prompts_per_step)",
        r"\d+",
        r".*(manifest|report|state)\.json",
    ),
    Explained("an adapter's file has one order", r"", file=r".*adapter_model\.safetensors"),
    Explained(
        "a run says in what it saved the model", r".*line \d+", r"(the model is saved in .*|.*(saved|why|dtype).*)"
    ),
    Explained("the learning rate is printed with its source", r"line \d+", r"learning rate .*", r"logs/.*"),
    Explained("a run notes where it began", r"(.*\.)?directory", file=r".*(manifest|report)\.json"),
    Explained("a page says where to rerun", r".*line \d+", rf".*(remend recover|cd |{QUOTE}directory{QUOTE}).*"),
    Explained(BY_STEPS, r"(.*\brecipe\.)?(save_every|warmup_steps)", r"50|5|None|null"),
    Explained(BY_STEPS, r".*line \d+", rf"\s*{QUOTE}?(save_every|warmup_steps){QUOTE}?: (50|5|null),?"),
    Explained(CAME_OR_WENT, rf"(.*\brecipe\.)?(streams\.\w+\.)?{CHANGED}", NOTHING),
    Explained(CAME_OR_WENT, r".*line \d+", rf"\s*(\"|&#34;)?{CHANGED}(\"|&#34;)?: {NOTHING}"),
    Explained(CAME_OR_WENT, r"(.*\.)?lora\.dropout", r"0\.0"),
    Explained(CAME_OR_WENT, r".*line \d+", rf"\s*{QUOTE}?dropout{QUOTE}?: 0\.0,?"),
    Explained("the prompts' tokens are hashed", r"(.*\.)?tokens(_sha256)?", r"[0-9a-f]{64}"),
    Explained(
        "the prompts' tokens are hashed", r".*line \d+", rf"\s*{QUOTE}tokens(_sha256)?{QUOTE}: {QUOTE}[0-9a-f]{{64}}.*"
    ),
    Explained("eval notes how large its batches were", r"line 1", r"\{\"key\": \"\w+\", \"tokens_at_once\": \d+\}"),
    Explained(PROBED, r"probe\.(kl|top1_agreement)", file=rf"made/{CALIBRATED}/degradation.json"),
    Explained(PROBED, r"line \d+", r"probe: KL .*", rf"logs/degrade-{CALIBRATED}.txt"),
    Explained(THE_GRID, r".*\b(remend/)?(grid|width)\.safetensors", rf"[0-9a-f]{{64}}|{MISSING}"),
    Explained(THE_GRID, r".*line \d+", rf"\s*{QUOTE}(remend/)?(grid|width)\.safetensors{QUOTE}: {QUOTE}\w{{64}}.*"),
    Explained(THE_GRID, r"metadata\.(remend_grid|format|formula)", file=r"(.*/)?grid\.safetensors"),
    Explained(SHARES, r"decoder", r"\{'weights': .*"),
    Explained(STRANGERS, r"check\.(read_by|strangers)", file=EXPORTS + r"export\.json"),
    Explained(STRANGERS, r"line \d+", r"Read back and compared with the model .*", EXPORTS + r"README\.md"),
    Explained(
        STRANGERS,
        r"line \d+",
        r".*: (dense|nf4|gguf:\w+|compressed-tensors.*), (\d+ bytes|below 1 MiB|[\d.]+ MiB).*|"
        r"(all weights equal bit for bit|opening it with).*|",
        r"logs/(\d+-export|degrade-\w+)\.txt",
    ),
    Explained(
        "it unpacks when it is loaded", r"quantization_config\.dequantize", r"True|true", EXPORTS + r"config\.json"
    ),
    Explained(RULES, r"bytes", r"\d+", EXPORTS + r"export\.json"),
    Explained(RULES, r"", r"\d+ (other )?bytes", r".*/model\.gguf"),
    Explained(
        RULES, r"(bos_token|unk_token|is_local|local_files_only)", file=r"runs/gguf/model/tokenizer_config\.json"
    ),
    Explained(
        "of two commands the first one asks the reference",
        r"line \d+",
        r"the reference answers",
        r"logs/\d+-diagnose\.txt",
    ),
    Explained(SHARES, r"line \d+", r"decoder: 100\.0% (on the grid|under the mask), 0\.0% untouched .*"),
    Explained(
        "each answer of an evaluation is signed, and a first line says what was settled; its results are compared",
        r"(line \d+|\[\d+\]\.sha256)",
        file=r"after/[\w-]+\.answers\.jsonl",
    ),
    Explained(
        "a degradation's record holds no seconds", r"(calibration\.)?seconds", file=r"made/\w+/degradation\.json"
    ),
    Explained(
        "correlate says it in three sentences",
        r"(kl_only|near_the_end|quotable|teachers)",
        file=r".*/correlation\.json",
    ),
    Explained("correlate says it in three sentences", r"line \d+", r"|in short: .*|\s+.*", r"logs/\d+-correlate\.txt"),
    Explained("a diagnosis says what counts as repetition", r"limits\.repetition", r"0\.3", r".*/diagnosis\.json"),
    Explained(CAME_OR_WENT, r"(recipe\.)?optimizer", r"adamw"),
    Explained(CAME_OR_WENT, r"(recipe\.)?placement", r"{'student': 'auto', 'teacher': 'auto'}"),
    Explained(CAME_OR_WENT, r"(recipe\.)?train", r"all"),
    Explained("a run says how many rows it samples at once", r"rows_at_once", r"64", r"runs/\w+/manifest\.json"),
    Explained("a run says how many answers its repair asks for", r"repair_answers", file=r"runs/\w+/manifest\.json"),
    Explained("a run says in what its frozen base is held", r"frozen_base", file=r"runs/\w+/manifest\.json"),
]


def reason(difference: Difference) -> str | None:
    """Why the difference is meant, or None."""
    if difference.close:
        return f"a statistic, by less than {CLOSE}"
    return next((e.reason for e in EXPLAINED if e.fits(difference)), None)
