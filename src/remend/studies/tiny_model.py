"""A tiny healthy model, trained here from scratch on text made here: no download, no file from elsewhere.

made = make(Path("tiny"))
made["model"], made["train"], made["task_train"]

280,000 parameters learn two things of an invented household in a minute: to talk about its things in plain
sentences (general), and for half of the things the letter of the box that each kind of question asks for (task).
So there is something to lose by compression, and something left to learn by fine-tuning. Rows are split by the pair of
thing and wording: what is held out is asked about in other words while training.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remend.data.examples import completion_of, example_of
from remend.data.order import Order
from remend.files.atomic import JsonObject, json_line, new_directory, write_json, write_text
from remend.files.reading import read_object
from remend.files.run_directory import RunDirectory
from remend.models.device import mixed_precision
from remend.models.load import eos_ids, save_model
from remend.models.scorer import scorer
from remend.training.constraints import Free
from remend.training.loop import Optimization
from remend.training.supervised import Supervised, encode_pairs, fit

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 64, 192, 5, 4, 512
STEPS, ROWS, RATE, SEED = 700, 32, 3e-3, 0
"""Of the training: about a minute on two cores."""

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


def version(steps: int = STEPS) -> str:
    """Settles model and text: 16 hex digits over this file's rows and the training's settings."""
    settled = [general_rows(False), task_rows(False), WIDTH, INNER, LAYERS, HEADS, VOCABULARY, ROWS, RATE, steps, SEED]
    return hashlib.sha256(repr(settled).encode()).hexdigest()[:16]


def is_made(out: Path, steps: int = STEPS) -> bool:
    """Whether the model and its text are there from before."""
    return (out / RECORD).is_file() and read_object(out / RECORD) == {"version": version(steps)}


def make(out: Path, *, steps: int = STEPS) -> dict[str, str]:
    """Make the model and its text, or find them there from before.

    Args:
        out: a directory for model/ and four files of rows.
        steps: optimizer steps.

    Returns:
        Paths: model, train, held_out, task_train, task_held_out.

    Raises FileError where they can't be written.
    """
    files = {
        "train": general_rows(False),
        "held_out": general_rows(True),
        "task_train": task_rows(False),
        "task_held_out": task_rows(True),
    }
    paths = {"model": str(out / "model"), **{name: str(out / f"{name}.jsonl") for name in files}}
    if is_made(out, steps):
        return paths
    for name, rows in files.items():
        write_text(Path(paths[name]), "".join(map(json_line, rows)))
    everything = [*files["train"], *files["task_train"]]
    tokenizer = build_tokenizer(text for row in everything for text in (row["prompt"], completion_of(row, "row")))
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    learned = [*files["train"], *task_rows(False, known=True)]
    _train(model, tokenizer, learned, out / "training", steps)
    with new_directory(out / "model") as target:
        save_model(model.eval(), tokenizer, target)
    write_json(out / RECORD, {"version": version(steps)})
    return paths


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[JsonObject], place: Path, steps: int
) -> None:
    pairs = [(example_of(row, "row"), completion_of(row, "row")) for row in rows]
    encoded, _ = encode_pairs(tokenizer, pairs, max_tokens=256, eos=eos_ids(model, tokenizer))
    objective = Supervised(
        student=scorer(model),
        order=Order(encoded, SEED),
        batch_size=ROWS,
        accumulation=1,
        precision=mixed_precision(torch.float32, torch.device("cpu")),
    )
    shutil.rmtree(place, ignore_errors=True)
    optimization = Optimization(steps, RATE, warmup=max(1, steps // 20), final=0.02)
    fit(objective, Free(model), RunDirectory.create(place), optimization, "training the tiny model")
