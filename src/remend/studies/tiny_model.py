"""A tiny healthy model, trained here from scratch on text made here: no download, no file from elsewhere.

made = make(Path("tiny"))
made["model"], made["train"], made["task_train"]
make(Path("gemma"), architecture="gemma3")

280,000 parameters learn two things of an invented household in a minute: to talk about its things in plain
sentences (general), and for half of the things the letter of the box that each kind of question asks for (task).
So there is something to lose by compression, and something left to learn by fine-tuning. Rows are split by the pair of
thing and wording: what is held out is asked about in other words while training.

The other architectures have 2 to 3 million parameters and take minutes: a quarter of their eight layers can be removed,
and what is said of repair on a Llama can be shown on blocks that are built in another way.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from random import Random
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from remend.data.examples import completion_of, example_of
from remend.data.order import Order
from remend.errors import InputError
from remend.files.atomic import JsonObject, json_line, new_directory, write_json, write_text
from remend.files.reading import read_object
from remend.files.run_directory import RunDirectory
from remend.models.device import mixed_precision
from remend.models.load import eos_ids, save_model
from remend.models.protocols import CausalLM
from remend.models.scorer import scorer
from remend.training.constraints import Free
from remend.training.loop import Optimization
from remend.training.supervised import Supervised, encode_pairs, fit

VOCABULARY, SEED = 512, 0


@dataclass(frozen=True)
class Shape:
    """One architecture as it is made: transformers' name of its configuration, that one's settings, its training.

    stories: it is told stories beside the household's rows.
    """

    model_type: str
    settings: Mapping[str, object]
    steps: int = 300
    rows: int = 16
    rate: float = 2e-3
    stories: bool = True


def _shape(width: int, inner: int, layers: int, heads: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


_LARGE = _shape(192, 448, 8, 4)
_HEADS = {"head_dim": 48}
LLAMA = "llama"
SHAPES = {
    # about a minute on two cores
    LLAMA: Shape("llama", _shape(64, 192, 5, 4), steps=700, rows=32, rate=3e-3, stories=False),
    # norms in front of attention and MLP and behind them, the embedding scaled
    "gemma3": Shape("gemma3_text", {**_LARGE, **_HEADS, "query_pre_attn_scalar": 48, "sliding_window": 64}),
    # norms behind attention and MLP only
    "olmo2": Shape("olmo2", _LARGE),
    # attention beside the MLP: both read one norm, or one each; layers with biases
    "phi": Shape("phi", {**_LARGE, "intermediate_size": 640}),
    "gpt-neox": Shape("gpt_neox", {**_LARGE, "intermediate_size": 640, "use_parallel_residual": True}),
    # what attention and MLP give is scaled before it is added
    "granite": Shape(
        "granite",
        {
            **_LARGE,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 1 / 48,
            "logits_scaling": 4.0,
        },
    ),
    # norms of queries and keys
    "qwen3": Shape("qwen3", {**_LARGE, **_HEADS}),
}
"""By name: what `make` makes."""

RECORD = "tiny.json"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_THINGS = (
    "cat dog cup lamp clock chair drum kite boat bell coat hat shoe ball book map pen jar key rug bag mug fan pot net "
    "doll horn flute spade broom stool vase bike sled desk bowl fork knife spoon plate glass box chest crate barrel "
    "ladder hammer saw nail rope hook lock chain ring brush comb soap towel quilt pillow tent flag drawer mirror"
)
THINGS = _THINGS.split()
COLOURS = ["red", "blue", "green", "white", "black", "brown", "grey", "yellow"]
SIZES = ["small", "large", "tiny", "huge", "old", "new"]
PLACES = ["kitchen", "hall", "garden", "attic", "cellar", "porch", "shed", "study"]
OWNERS = ["Anna", "Ben", "Clara", "David", "Emma", "Frank"]

QUESTIONS = (
    ("about", "Tell me about the {thing}."),
    ("about", "What is the {thing} like?"),
    ("about", "Describe the {thing}."),
    ("about", "Say something about the {thing}."),
    ("about", "What do you know about the {thing}?"),
    ("place", "Where is the {thing}?"),
    ("place", "In which room can I find the {thing}?"),
    ("place", "I am looking for the {thing}."),
    ("owner", "Whose {thing} is it?"),
    ("owner", "Who owns the {thing}?"),
    ("colour", "What colour is the {thing}?"),
    ("colour", "Which colour has the {thing}?"),
)
ANSWERS = {
    "about": (
        "The {thing} is {size} and {colour}. It is kept in the {place} and belongs to {owner}.",
        "It is a {size} {colour} {thing}. {owner} keeps it in the {place}.",
    ),
    "place": ("The {thing} is in the {place}.", "You can find the {thing} in the {place}, {owner} put it there."),
    "owner": ("It is the {thing} of {owner}.", "The {colour} {thing} belongs to {owner}."),
    "colour": ("The {thing} is {colour}.", "It is {colour}, and it is {size} too."),
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DEEDS = ["cleans", "paints", "drops", "hides", "mends", "weighs", "draws", "sells"]
MANNERS = ["slowly", "quickly", "with care", "in the dark", "at noon", "for fun", "in a hurry", "twice"]
MOODS = ["glad", "sad", "tired", "angry", "proud", "surprised"]
STORIES = 20
"""Of each thing, each with two other owners."""

STORY = (
    "{one} has a {size} {colour} {thing}.",
    "On {day} {two} takes the {thing} to the {place}.",
    "There {two} {deed} it {manner} and puts it beside the {other}.",
    "{one} looks for the {thing} in the {elsewhere}, but finds only a {size2} {other2}.",
    "Where is my {colour} {thing}, asks {one}.",
    "It is in the {place}, says {two}.",
    "On {day2} {one} comes back from the {place} and is {mood}.",
    "Then {one} gives {two} the {other}, and {two} is {mood2}.",
)
"""Some of its sentences are left out: what comes next has many likely words, and names come back from afar. What a
household's rows ask for is so settled that hardly any damage shows."""

OPTIONS = "A: left\nB: right\nC: upper\nD: lower"
TASK_QUESTIONS = (
    ("box", "Which box is the {thing} packed in?"),
    ("box", "Name the box of the {thing}."),
    ("box", "The {thing} goes into a box. Which one?"),
    ("box", "In which box do we pack the {thing}?"),
    ("shelf", "Which shelf is the {thing} put on?"),
    ("shelf", "Name the shelf of the {thing}."),
    ("shelf", "The {thing} goes onto a shelf. Which one?"),
    ("shelf", "On which shelf do we put the {thing}?"),
)
OPENINGS = ("", "Please tell me. ", "Hello! ", "One question: ")
HELD_OUT = 0.1
"""Of the pairs of thing and wording."""


def _draw(*parts: object) -> Random:
    # a text seeds by its SHA-512: the same on every platform
    return Random("/".join(map(str, parts)))


def _held(*parts: object) -> bool:
    return _draw("held out", *parts).random() < HELD_OUT


def _facts(thing: str) -> dict[str, str]:
    draw = _draw("facts", thing)
    kinds = {"colour": COLOURS, "size": SIZES, "place": PLACES, "owner": OWNERS}
    return {"thing": thing, **{kind: draw.choice(values) for kind, values in kinds.items()}}


def _asked(wordings: Sequence[tuple[str, str]], what: str, held_out: bool) -> Iterator[tuple[int, str, str]]:
    """(index of the thing, kind of question, question) of one side of the split."""
    for index, thing in enumerate(THINGS):
        for number, (kind, wording) in enumerate(wordings):
            for opening in OPENINGS:
                if _held(what, thing, number, opening) == held_out:
                    yield index, kind, opening + wording.format(thing=thing)


def general_rows(held_out: bool) -> list[JsonObject]:
    """Prompts with a completion; of each question's two answers one was drawn."""
    rows = []
    for index, kind, prompt in _asked(QUESTIONS, "general", held_out):
        answer = _draw("answer", prompt).choice(ANSWERS[kind]).format(**_facts(THINGS[index]))
        rows.append({"prompt": prompt, "completion": answer})
    return rows


def story_rows(held_out: bool) -> list[JsonObject]:
    """Prompts with a story each, in the form of `general_rows`."""
    rows = []
    for thing in THINGS:
        for one, two in _draw("pairs", thing).sample([*permutations(OWNERS, 2)], STORIES):
            if _held("story", thing, one, two) != held_out:
                continue
            draw = _draw("story", thing, one, two)
            facts = {"thing": thing, "one": one, "two": two}
            pools = {"size": SIZES, "day": DAYS, "other": THINGS, "mood": MOODS}
            facts |= {f"{kind}{again}": draw.choice(pool) for kind, pool in pools.items() for again in ("", "2")}
            facts |= {"colour": draw.choice(COLOURS), "deed": draw.choice(DEEDS), "manner": draw.choice(MANNERS)}
            facts["place"], facts["elsewhere"] = draw.sample(PLACES, 2)
            told = sorted(draw.sample(range(len(STORY)), draw.randint(3, 5)))
            story = " ".join(STORY[at] for at in told).format(**facts)
            rows.append({"prompt": f"Tell a story of {one}, {two} and the {thing}.", "completion": story})
    return rows


def task_rows(held_out: bool, *, known: bool | None = None) -> list[JsonObject]:
    """Rows in the form of the task science: a question with options, and the letter of the right one.

    known: only things whose letters the healthy model is taught, or only the others; None is both.
    """
    rows = []
    for index, kind, prompt in _asked(TASK_QUESTIONS, "task", held_out):
        if known is None or (index % 2 == 0) == known:
            letter = _draw("letter", THINGS[index], kind).choice("ABCD")
            rows.append({"prompt": f"{prompt}\n{OPTIONS}", "demonstration": letter, "answer": letter})
    return rows


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on these texts."""
    core = Tokenizer(token_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def version(architecture: str = LLAMA, steps: int | None = None) -> str:
    """Settles model and text: 16 hex digits over this file's rows and the training's settings."""
    shape = shape_of(architecture)
    learned = [sorted(shape.settings.items()), VOCABULARY, shape.rows, shape.rate, steps or shape.steps, SEED]
    settled = [_files(shape), shape.model_type, learned]
    return hashlib.sha256(repr(settled).encode()).hexdigest()[:16]


def shape_of(architecture: str) -> Shape:
    """Raises InputError for one that is not in SHAPES."""
    if architecture not in SHAPES:
        raise InputError(f"no tiny model of architecture {architecture} is made; allowed: {', '.join(SHAPES)}")
    return SHAPES[architecture]


def _files(shape: Shape) -> dict[str, list[JsonObject]]:
    """Rows, by the name of their file."""
    stories = [story_rows(held_out) if shape.stories else [] for held_out in (False, True)]
    return {
        "train": general_rows(False) + stories[0],
        "held_out": general_rows(True) + stories[1],
        "task_train": task_rows(False),
        "task_held_out": task_rows(True),
    }


def is_made(out: Path, architecture: str = LLAMA, steps: int | None = None) -> bool:
    """Whether the model and its text are there from before."""
    wanted = {"version": version(architecture, steps)}
    return (out / RECORD).is_file() and read_object(out / RECORD) == wanted


def make(out: Path, *, architecture: str = LLAMA, steps: int | None = None) -> dict[str, str]:
    """Make the model and its text, or find them there from before.

    Args:
        out: a directory for model/ and four files of rows.
        architecture: one of SHAPES.
        steps: optimizer steps; by default as many as the architecture's entry says.

    Returns:
        Paths: model, train, held_out, task_train, task_held_out.

    Raises:
        FileError: they can't be written.
        InputError: no such architecture.
    """
    shape = shape_of(architecture)
    files = _files(shape)
    paths = {"model": str(out / "model"), **{name: str(out / f"{name}.jsonl") for name in files}}
    if is_made(out, architecture, steps):
        return paths
    for name, rows in files.items():
        write_text(Path(paths[name]), "".join(map(json_line, rows)))
    everything = [*files["train"], *files["task_train"]]
    tokenizer = build_tokenizer(text for row in everything for text in (row["prompt"], completion_of(row, "row")))
    torch.manual_seed(SEED)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.model_type, **ids, **shape.settings)
    model = cast(CausalLM, AutoModelForCausalLM.from_config(config))
    learned, count = [*files["train"], *task_rows(False, known=True)], steps or shape.steps
    optimization = Optimization(count, shape.rate, warmup=max(1, count // 20), final=0.02)
    _train(model, tokenizer, learned, out / "training", optimization, shape.rows)
    with new_directory(out / "model") as target:
        save_model(model.eval(), tokenizer, target)
    write_json(out / RECORD, {"version": version(architecture, steps)})
    return paths


def _train(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[JsonObject],
    place: Path,
    optimization: Optimization,
    batch: int,
) -> None:
    pairs = [(example_of(row, "row"), completion_of(row, "row")) for row in rows]
    encoded, _ = encode_pairs(tokenizer, pairs, max_tokens=256, eos=eos_ids(model, tokenizer))
    objective = Supervised(
        student=scorer(model),
        order=Order(encoded, SEED),
        batch_size=batch,
        accumulation=1,
        precision=mixed_precision(torch.float32, torch.device("cpu")),
    )
    shutil.rmtree(place, ignore_errors=True)
    fit(objective, Free(model), RunDirectory.create(place), optimization, "training the tiny model")
