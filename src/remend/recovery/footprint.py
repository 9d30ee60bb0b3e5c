"""What a recovery holds in memory: bytes by kind, phase by phase. Arithmetic on facts alone, for `check` and `plan`.

A phase's figure is that of its fullest moment. Each moment is a function here that names what is alive then, as the
code does it; docs/measurements/scale.md has predicted peaks beside measured ones. What no file stands behind is
counted: of weights that are mapped from their file the part that is never written counts nothing.

Legend: P parameters, Q numbers in the decoder's matrices, V rows of the vocabulary, D width, I columns and O rows of
matrices that read one input, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remend.models.sizes import Size
from remend.recovery.estimate import Facts, FrozenBase, tokens_of

Bytes = Mapping[str, int]
"""By kind, see KINDS."""

KINDS: Mapping[str, str] = {
    "program": "Python with torch and transformers, and the tokenizers",
    "student": "the student's weights in float32, or under an adapter as they are held, and the adapter's beside them",
    "teacher": "the reference's weights",
    "blocks": "weights of the blocks that are there, where a model's come one by one",
    "codes": "the grid's codes, scales and zeros",
    "masters": "float32 weights that the optimizer moves in place of those on the grid",
    "gradients": "of what is trained",
    "moments": "AdamW's two of what is trained, as far as they are on the device",
    "teachers' copies": "of moving averages and of the student as it came in",
    "Gram matrices": "of repair, with their factors and what is solved by them",
    "weights laid out": "copies of weights in which products are taken",
    "activations": "what a backward pass keeps, or what layers see of repair's text",
    "logits": "of a chunk of positions, or of the rows that are sampled",
    "cache": "keys and values of the rows that are sampled",
}
"""What a kind is."""

PROGRAM = 650 * 2**20
"""Bytes of Python with torch and transformers, mapped libraries among them."""

OBJECTS, BUFFERS = 16 * 2**20, 32 * 2**20
"""Of these what comes after the imports: objects of configurations and models, and from the first pass on what oneDNN
and MKL keep for themselves, whatever the size of the model; measured with 10 million parameters."""

NAMED = 512
"""Bytes of a token in the tokenizers of student and teacher and in what compares them; measured with 98,304 tokens."""

LOSS, MEASURE = 6, 7
"""Tensors of a chunk of positions by the vocabulary that are alive at once: both models' logits and log-probabilities;
in training both probabilities too, in measuring one, a difference and a product."""

MEASURED_ROWS = 8
"""Completions of a forward pass that measures (training.measure.compare)."""

BATCH_TOKENS = 2048
"""Tokens of a forward pass of repair (models.activations.passes)."""

MOST_KEPT = 2**30
"""Bytes of inputs of a block's last layer that repair keeps (models.activations.passes)."""

STREAMS = 12
"""Tensors [N, D] of repair's text at once: what enters a block of student and teacher, the student's and the teacher's
stream before it and the teacher's after it and after attention, inputs of the teacher's two groups and outputs of its
two writers, and the student's attention with and without padding."""

LAID_OUT = 4 * 2**30
"""A CPU lays no more weights out for sampling than so many bytes (models.sampling.prepacked)."""

SMALL = 4096
"""Numbers of a tensor from which on adamw-8bit holds its moments in 8 bits,"""

SHARING = 256
"""and numbers that share a float32 scale then."""

ROOM = 64
"""Tokens that a cache has room for behind a prompt at least (models.sampling.kv_cache)."""


@dataclass(frozen=True)
class Memory:
    """Bytes alive at once by kind, at the fullest moment of each phase, in order."""

    by_phase: Mapping[str, Bytes]

    @property
    def parts(self) -> Bytes:
        """Of training, by kind."""
        return self.by_phase["training"]

    @property
    def phases(self) -> Mapping[str, int]:
        """In all, by phase."""
        return {phase: sum(held.values()) for phase, held in self.by_phase.items()}

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max(self.phases.values())


def memory_of(facts: Facts) -> Memory:
    """What a run holds in memory on the device that it runs on, in bytes, in the phases that a run's clock knows."""
    by_phase = dict(moments_of(facts))
    by_phase["training"] = _fullest(by_phase.pop("sampling"), by_phase["training"])
    return Memory(by_phase)


def loaded_bytes(facts: Facts) -> int:
    """What both models hold once they are loaded, in bytes; the program apart."""
    return sum(held for kind, held in _models(facts, 0).items() if kind != "program")


def moments_of(facts: Facts) -> dict[str, Bytes]:
    """`memory_of` by phase and kind, with the student's sampling apart from the steps that it feeds."""
    main, student, reference = facts.streams[0], facts.student, facts.reference
    came, wide = _models(facts, 0), {"weights laid out": _widened(facts)}
    moved = _plus(_models(facts, _written(facts)), wide)
    theirs = facts.reference_itemsize
    answering = [
        _sampling(facts, reference, main.held_out, main.prompt, main.answer, itemsize=theirs, ours=False),
        _sampling(facts, student, main.held_out, main.prompt, main.answer, drawn=True),
        _measuring(facts, main.held_out, main.answer),
    ]
    measured = _fullest(*(_plus(came, wide, moment) for moment in answering))
    buffers = BUFFERS if came["program"] else 0
    loaded = _fullest(came, *_reading_base(facts, came))
    phases: dict[str, Bytes] = {"loading": {**loaded, "program": came["program"] - buffers}}
    if facts.written:
        phases["prompts"] = measured
    phases["baseline"] = measured
    if facts.repair:
        phases["repair"] = _fullest(*_repair(facts))
    if facts.by_block:
        parts = {"blocks": 2 * 4 * student.block}  # and as it is written
        phases |= {"sampling": came, "training": came, "saving": _plus(came, parts), "measuring": measured}
        return {phase: _named(alive) for phase, alive in phases.items()}
    held = _plus(moved, _held(facts))
    trained = _plus(held, {"moments": moment_bytes(facts)})
    phases["sampling"] = _plus(trained, _own_answers(facts))
    phases["training"] = _fullest(*(_plus(trained, moment) for moment in (_forward(facts), _update(facts))))
    phases["saving"] = _plus(held, {"codes": facts.held})  # a code is a byte
    phases["measuring"] = _plus(measured, {"student": _adapter(facts)})
    return {phase: _named(alive) for phase, alive in phases.items()}


def _models(facts: Facts, written: int) -> dict[str, int]:
    """What stays: program, weights, and the scales of the student's grid.

    `written`: numbers of the student that were written, and are mapped from its file no more.
    """
    student, reference, base = facts.student, facts.reference, facts.base
    names = NAMED * (student.vocabulary + (reference.vocabulary if reference else 0)) // 2
    kept = (reference.outside if facts.reference_by_block else reference.parameters) if reference else 0
    theirs = 0 if facts.reference_mapped else kept
    came = student.outside if facts.by_block else student.parameters - (base.numbers if base else 0)
    ours = 4 * ((0 if facts.by_block else written) if facts.mapped else came)
    if base:
        ours += base.held + 4 * student.vectors  # which each model over the base has for itself
    if base and base.shared and reference:
        # in another dtype than float32 a model over the base has its own copies of all but the frozen layers
        theirs = student.vectors if facts.reference_itemsize == 4 else student.parameters - base.numbers
    return {
        "program": PROGRAM + names if facts.device == "cpu" else 0,
        "student": ours,
        "teacher": facts.reference_itemsize * theirs,
        "codes": 0 if facts.by_block and facts.device != "cpu" else facts.scales,
    }


def _reading_base(facts: Facts, came: Bytes) -> list[Bytes]:
    """On a CPU the base is there in float32 before its layers are held in fewer bytes, and before the reference is."""
    if facts.base is None or facts.device != "cpu" or facts.mapped:
        return []
    return [{**came, "student": 4 * facts.student.parameters, "teacher": 0}]


def _theirs(facts: Facts) -> FrozenBase | None:
    """The base that the reference reads."""
    return facts.base if facts.base and facts.base.shared else None


def _widened(facts: Facts) -> int:
    """The weight of a frozen layer while it is multiplied; a CPU keeps the place of the largest."""
    base, dtype = facts.base, facts.itemsize
    if base is None or not base.numbers or (base.held == dtype * base.numbers and not base.packed):
        return 0
    return dtype * facts.student.widest


def _written(facts: Facts) -> int:
    """Numbers of the student's weights that training, or a repair before it, writes."""
    if facts.train == "last" or (facts.train == "all" and not facts.codes):
        return facts.trained
    moved = facts.codes if facts.train in ("all", "scales") else 0
    return max(moved, facts.student.matrices if facts.repair else 0)


def _held(facts: Facts) -> Bytes:
    """Beside the models from the first step to the last. Codes that were mapped with the student's file stay so."""
    keeps = facts.train in ("scales", "norms") and (facts.repair or facts.device != "cpu")
    return {
        "masters": 4 * facts.held,
        "teachers' copies": 4 * facts.copies * facts.trained,
        "codes": facts.codes if keeps else 0,
        "student": _adapter(facts),
    }


def _adapter(facts: Facts) -> int:
    """An adapter's own weights."""
    return 4 * facts.trained if facts.train == "adapter" else 0


def moment_bytes(facts: Facts) -> int:
    """AdamW's moments on the device that the run is on, in bytes.

    A GPU has none of those that are on the host. In 8 bits a moment takes a byte and its part of a scale; vectors that
    are shorter than SMALL keep theirs in float32.
    """
    if facts.optimizer == "adamw-host" and facts.device != "cpu":
        return 0
    if facts.optimizer != "adamw-8bit":
        return 8 * facts.trained
    size = facts.student
    vectors = 0 if facts.train == "adapter" or size.width >= SMALL else size.vectors
    whole = min(facts.trained, vectors)
    return 8 * whole + 2 * (facts.trained - whole) * (SHARING + 4) // SHARING


def _own_answers(facts: Facts) -> Bytes:
    """The student answers the prompts of a round. Autocast keeps its casts of weights that are trained."""
    rows = sum(round(s.rows * s.on_policy) for s in facts.streams) * facts.updates
    longest = max(facts.streams, key=lambda stream: stream.longest + stream.answer)
    prompt, answer = longest.longest, longest.answer
    student, itemsize = facts.student, facts.itemsize
    sampled = _sampling(facts, student, rows, prompt, answer, itemsize=itemsize, drawn=True)
    casts = facts.device != "cpu" and facts.train in ("all", "scales")
    return {**sampled, "weights laid out": _cast(facts)} if sampled and casts else sampled


def _forward(facts: Facts) -> Bytes:
    """A micro-batch whose backward pass is about to begin, with the chunk of logits that was made last.

    Gradients of earlier micro-batches are there already; those of this one take the place of its activations.
    """
    student = facts.student
    answer = max(s.answer - s.skipped for s in facts.streams)
    longest, positions = tokens_of(facts).longest, facts.batch * answer
    shared = 0 if facts.recomputes or facts.batch < 2 else min(stream.opening for stream in facts.streams)
    tokens = facts.batch * (longest - shared) + shared
    # the opening's keys and values are repeated for all rows, and joined with those of the rest
    kept = facts.activation * tokens + 2 * facts.itemsize * student.cached * facts.batch * shared
    if facts.recomputes:
        kept = 4 * student.width * student.layers * tokens + kept // max(1, student.layers)
    states = 4 * positions * student.width * (3 if facts.reference else 2)
    earlier = facts.trained if facts.micro_batches > 1 else 0
    return {
        "activations": kept + states,
        "logits": LOSS * 4 * min(facts.chunk, positions) * student.vocabulary,
        "gradients": 4 * earlier + _head(facts),
        "weights laid out": _cast(facts),
    }


def _update(facts: Facts) -> Bytes:
    """All gradients. A tied head's is added to the embedding's.

    Where scales alone move, the gradient of one matrix at a time is there with its product by the weights.
    """
    one = 2 * 4 * facts.student.largest if facts.train == "scales" else 0
    return {"gradients": 4 * facts.trained + _head(facts) + one, "weights laid out": _cast(facts)}


def _head(facts: Facts) -> int:
    """The gradient of the head, which the loss makes chunk by chunk."""
    return 4 * facts.student.vocabulary * facts.student.width if facts.head_trained else 0


def _cast(facts: Facts) -> int:
    """Copies of the matrices and the head in the arithmetic's dtype, which a pass under autocast keeps.

    A frozen layer is widened in each pass, and keeps none.
    """
    student, frozen = facts.student, facts.base.numbers if facts.base else 0
    return (
        facts.itemsize * (student.matrices - frozen + student.vocabulary * student.width) if facts.itemsize < 4 else 0
    )


def _sampling(
    facts: Facts,
    size: Size | None,
    rows: int,
    prompt: float,
    answer: int,
    *,
    itemsize: int = 4,
    drawn: bool = False,
    ours: bool = True,
) -> Bytes:
    """A model that answers: its weights as they are laid out, keys and values, and one token's logits or the prompts'
    pass through one MLP.

    itemsize: bytes of a number of its products. drawn: beside the logits there are probabilities, and their sums in
    float64. ours: it is the student.
    """
    if size is None or rows <= 0:
        return {}
    rows, start = min(facts.rows_at_once, rows), round(prompt)
    opening = rows * start * 4 * (2 * size.width + 3 * _inner(size))
    logits = rows * size.vocabulary * (24 if drawn else 4)
    return {
        "weights laid out": _laid_out(facts, size, itemsize, ours=ours),
        "blocks": _at_work(facts, ours=ours),
        "cache": rows * room_of_cache(start, answer) * size.cached * itemsize,
        "logits": logits if logits >= opening else 0,
        "activations": opening if logits < opening else 0,
    }


def _laid_out(facts: Facts, size: Size, itemsize: int, *, ours: bool) -> int:
    """Copies of weights in which a CPU samples: none of layers that are held by codes, and of those that come with
    their blocks one at a time."""
    base = facts.base if ours else _theirs(facts)
    plain = size.matrices - (base.numbers if base and base.packed else 0)
    head = size.vocabulary * size.width
    if facts.device != "cpu" or itemsize * (plain + head) > LAID_OUT:
        return 0
    return itemsize * (head + (size.widest if _comes_by_block(facts, ours=ours) else plain))


def _comes_by_block(facts: Facts, *, ours: bool) -> bool:
    return facts.by_block if ours else facts.reference_by_block


def _at_work(facts: Facts, *, ours: bool) -> int:
    """The block that runs, where a model's come one by one. A CPU looks at those of float32 in their file."""
    size = facts.student if ours else facts.reference
    if size is None or not _comes_by_block(facts, ours=ours) or (facts.mapped if ours else facts.reference_mapped):
        return 0
    return (4 if ours else facts.reference_itemsize) * size.block


def room_of_cache(prompt: int, answer: int) -> int:
    """Tokens that a cache has room for once a prompt has its answer: a full buffer grows by half. The answer's last
    token is never read."""
    room, read = prompt + max(ROOM, prompt // 2), prompt + answer - 1
    while room < read:
        room += 1 + max(ROOM, (room + 1) // 2)
    return room


def _measuring(facts: Facts, rows: int, answer: int) -> Bytes:
    """Both models' states at the completions of a pass, and a chunk of their logits."""
    size = facts.student
    positions = min(MEASURED_ROWS, rows) * answer
    return {
        "logits": MEASURE * 4 * min(facts.chunk, positions) * size.vocabulary,
        "activations": 4 * 2 * positions * size.width,
        "blocks": max(_at_work(facts, ours=ours) for ours in (True, False)),
    }


def _repair(facts: Facts) -> list[Bytes]:
    """Moments of a repair: the reference writes, the last block's text is joined, and its layers are solved; what came
    of it is measured, and is held."""
    main, student, reference = facts.streams[0], facts.student, facts.reference
    came, written = _models(facts, 0), _models(facts, student.matrices)
    masters, codes = 4 * facts.codes, facts.codes  # a code is a byte
    if facts.by_block:
        masters, codes = 0, codes // max(1, student.layers)
    done = _plus(written, {"masters": masters, "codes": codes})
    theirs, again = (reference.block if reference and facts.reference_by_block else 0), 0
    if reference and facts.reference_itemsize < 4:  # in float32
        again = 4 * (reference.outside if facts.reference_by_block else reference.parameters)
    at_work = 4 * (theirs + (student.block if facts.by_block else 0))  # which may be written into
    text = min(facts.repair_rows, round(facts.repair * (facts.repair_prompt + facts.repair_answer)))
    inner = 4 * text * _inner(student)
    kept, passing = min(MOST_KEPT, inner), 4 * BATCH_TOKENS * (2 * student.width + 3 * _inner(student))
    seen = STREAMS * 4 * text * student.width
    block = 4 * student.matrices // max(1, student.layers)  # its weights as they were
    walked = _plus(done, {"teacher": again, "weights laid out": block, "blocks": at_work})
    solved = max((gram_bytes(o, i, grid=facts.codes > 0) for o, i in student.groups), default=0)
    asked, prompt = 0 if facts.repair_given else facts.repair, facts.repair_prompt
    writing = _sampling(
        facts, reference, asked, prompt, facts.repair_answer, itemsize=facts.itemsize, drawn=True, ours=False
    )
    kept_apart = {"blocks": 4 * student.block + codes} if facts.by_block else {"masters": 4 * facts.held}
    return [
        _plus(came, writing),
        _plus(walked, {"activations": seen + 2 * inner + kept + passing}),
        _plus(walked, {"activations": seen + inner + kept, "Gram matrices": solved}),
        _plus(done, _measuring(facts, main.held_out, main.answer)),
        _plus(done, _measuring(facts, facts.repair, facts.repair_answer)),
        _plus(walked if facts.by_block else done, kept_apart),
    ]


def gram_bytes(rows: int, columns: int, *, grid: bool) -> int:
    """Bytes while matrices [rows, columns] that read one input are solved: the fullest of four moments.

    They are the Cholesky factor of the least squares, their solution, the factor of GPTQ's inverse, and its codes.
    """
    square, whole = columns * columns, rows * columns
    moments = [24 * square + 16 * whole, 16 * square + 40 * whole]
    return max([*moments, 28 * square + 12 * whole, 16 * square + 50 * whole] if grid else moments)


def _inner(size: Size) -> int:
    """Columns of the widest matrix: the MLP's width."""
    return max((columns for _, columns in size.groups), default=4 * size.width)


def _plus(*parts: Bytes) -> dict[str, int]:
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in kinds}


def _fullest(*moments: Bytes) -> Bytes:
    return max(moments, key=lambda moment: sum(moment.values()))


def _named(held: Bytes) -> Bytes:
    """In the order of KINDS, without what there is none of."""
    return {kind: held[kind] for kind in KINDS if held.get(kind)}
