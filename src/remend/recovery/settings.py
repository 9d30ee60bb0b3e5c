"""The recipe: what `remend recover` and `remend check` read.

Every default is documented with its source; docs/explanation/defaults.md is the page for users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from remend.data.sources import COLUMNS_HELP, ColumnsSetting
from remend.errors import InputError
from remend.files.run_directory import AUTO, AUTO_STEPS, steps_a_checkpoint, updates_a_round
from remend.files.settings import (
    MOST_TOKENS,
    NO_FLOAT16,
    PLACEMENT,
    Arithmetic,
    Gone,
    Number,
    Placement,
    Settings,
    as_number,
    build,
    finite,
    shard_size,
)
from remend.models.lora import LoraConfig

OptionalNumber = Annotated[float | None, BeforeValidator(as_number), AfterValidator(finite)]

MOST = 1_000_000
"""Prompts per step, and steps: beyond any run, and what is counted one by one still ends."""

WARM_UP = 5
"""Steps of warm-up where the recipe names none."""

SELF = "self"
"""As `data`: the reference writes the prompts itself."""


def _on_off(value: object) -> object:
    # YAML 1.1 reads on and off as booleans
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _policy(value: object) -> str | float:
    value = as_number(_on_off(value)) if value not in ("on", "off") else value
    if value in ("on", "off") or (isinstance(value, float) and 0 <= value <= 1):
        return value
    raise ValueError("allowed: on, off, or the share of completions that the student samples, 0 to 1")


def _length(value: Any) -> int | list[int]:
    parts = value.replace("→", "->").split("->") if isinstance(value, str) else value
    if isinstance(parts, list) and all(isinstance(part, str) and part.strip().isdecimal() for part in parts):
        parts = [int(part) for part in parts]
    ends = parts if isinstance(parts, list) else [parts]
    whole = all(isinstance(end, int) and not isinstance(end, bool) and 0 < end <= MOST_TOKENS for end in ends)
    if not whole or len(ends) != (2 if isinstance(parts, list) else 1) or ends != sorted(ends):
        raise ValueError(
            f"allowed: a number of tokens from 1 to {MOST_TOKENS}, or two of them, [16, 96], for one that grows"
        )
    return cast(int | list[int], parts)


class Auto(int):
    """`steps: auto`: at most so many; fewer after a repair that leaves nothing to win (`recovery.plateau`)."""

    __str__ = int.__repr__  # in a sentence it is the number

    def __repr__(self) -> str:
        return AUTO


def _steps(value: object) -> int:
    if value == AUTO or isinstance(value, Auto):
        return Auto(AUTO_STEPS)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    raise ValueError(f"allowed: a number of steps from 0 to {MOST}, or auto")


def _nameable(value: str) -> str:
    longest = max(len(part.encode("utf-8", "replace")) for part in value.split("/"))
    if longest > 255:
        raise ValueError(f"a name of {longest} bytes; no file and no folder can have one of over 255")
    return value


ShardSize = Annotated[str, PlainValidator(shard_size)]


Name = Annotated[str, AfterValidator(_nameable)]
"""Of a file, a folder or a hub id."""


Steps = Annotated[int, PlainValidator(_steps), PlainSerializer(lambda n: AUTO if isinstance(n, Auto) else n)]


Policy = Annotated[str | float, PlainValidator(_policy)]


Length = Annotated[int | list[int], PlainValidator(_length)]


class EmaConfig(Settings):
    """The moving average of the student's weights that teaches where a stream says `teacher: ema`."""

    rate: Number = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the way that ema goes to the student each time (SDFT authors' code: 0.01)",
    )
    every: int = Field(1, ge=1, description="ema follows after every n steps")


class PlacementConfig(Settings):
    """Where the weights of student and teacher are; one word stands for both."""

    student: Placement = Field("auto", description=PLACEMENT)
    teacher: Placement = Field("auto", description="likewise, of the healthy model")

    @model_validator(mode="before")
    @classmethod
    def _both(cls, values: object) -> object:
        return {"student": values, "teacher": values} if isinstance(values, str) else values


class AlignmentConfig(Settings):
    """A second signal beside the divergence: hidden states that are like the teacher's (after arXiv 2606.05682)."""

    measure: Literal["cka", "l2"] = Field(
        "cka", description="what is compared: cka is 1 − debiased CKA, l2 the relative squared distance"
    )
    weight: Number = Field(
        0.5, gt=0, le=100, description="length of this signal's gradient as a share of the divergence's"
    )
    layers: list[int] | None = Field(None, description="layers of the student that are compared; by default all")


class LossConfig(Settings):
    """A loss by name with its parameters; what is not given has the loss's own default, and is filled in.

    A name alone, `loss: jsd`, is the loss with all its defaults.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="the loss; a wrong name lists all")

    @property
    def parameters(self) -> dict[str, object]:
        """Everything but the name."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: object) -> object:
        if isinstance(values, str):
            values = {"name": values}
        if isinstance(values, LossConfig) or (isinstance(values, Mapping) and "name" not in values):
            return values
        if not isinstance(values, Mapping) or not isinstance(name := values["name"], str):
            raise ValueError(
                "a loss is its name, as jsd, or a mapping with name and parameters: {name: jsd, beta: 0.5}"
            )
        from remend.maths.losses import choose  # it waits for torch, and help texts do not

        return {"name": name, **choose(name, {k: v for k, v in values.items() if k != "name"}).parameters}


def _only_loss(loss: LossConfig | None, info: ValidationInfo) -> LossConfig | None:
    if loss is not None and info.data.get("beta") is not None:
        raise ValueError(
            f"beta ({info.data['beta']:g}) is given too, and both choose the loss; leave one out. Over a recipe "
            "that has one of them, give null for it: beta=0.5 loss=null, or loss.name=jsd beta=null"
        )
    return loss


class StreamConfig(Settings):
    """One source of training signal. What is not given is the recipe's own."""

    aliases: ClassVar[Mapping[str, str]] = {"max_completion_length": "max_new_tokens"}

    data: Name | None = Field(
        None, min_length=1, description="prompts, as in the recipe; self: the reference writes them"
    )
    columns: ColumnsSetting | None = Field(None, strict=False, description="as in the recipe")
    teacher: Name | None = Field(
        None, min_length=1, description="a model, a cache, or ema, live, initial, base (views of the student)"
    )
    demonstrations: bool = Field(False, description="show the teacher the row's demonstration")
    policy: Policy = Field("on", description="on: the student's completions; off: the teacher's; a number: share of on")
    weight: Number = Field(1.0, ge=0, description="what the stream's mean loss is multiplied by in the sum")
    share: Number = Field(
        1.0, gt=0, description="how many of a step's prompts are the stream's, relative to the other streams"
    )
    beta: OptionalNumber = Field(None, ge=0, le=1, description="as in the recipe")
    loss: LossConfig | None = Field(None, strict=False, description="as in the recipe")
    top_k: int | None = Field(None, ge=1, description="as in the recipe")
    max_new_tokens: Length | None = Field(None, description="as in the recipe")
    temperature: OptionalNumber = Field(None, gt=0, le=5, description="as in the recipe")
    skip_first_tokens: int | None = Field(None, ge=0, description="as in the recipe")
    eval_data: Name | None = Field(None, description="as in the recipe")
    held_out: int | None = Field(None, ge=1, description="as in the recipe")
    task: str | None = Field(None, description="graders by name (remend tasks ls): the gate then measures task scores")

    _one = field_validator("loss", mode="after")(_only_loss)


class RecoverConfig(Settings):
    """What `remend recover` and `remend check` read. Paths are relative to the working directory."""

    gone: ClassVar[Mapping[str, Gone]] = {
        "scales": Gone(
            "fixed",
            "since version 0.2: scales learned beside the weights won next to nothing; they stay as stored",
            others=("learned",),
        ),
        "importance_clip": Gone(
            None,
            "since version 0.2: likelihood ratios for the tokens of an older student brought no gain "
            "(docs/measurements/speed.md). Leave it out; stale tokens count like fresh ones",
        ),
    }

    aliases: ClassVar[Mapping[str, str]] = {
        "reference": "teacher",
        "model_name_or_path": "student",
        "teacher_model_name_or_path": "teacher",
        "teacher_model": "teacher",
        "output_dir": "out",
        "per_device_train_batch_size": "batch_size",
        "gradient_accumulation_steps": "gradient_accumulation",
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "save_steps": "save_every",
        "save_total_limit": "keep_checkpoints",
        "eval_steps": "eval_every",
        "max_completion_length": "max_new_tokens",
    }
    hints: ClassVar[Mapping[str, str]] = {
        "fp16": f"{NO_FLOAT16}; save_dtype: float16 writes a trained model for inference in it",
        "bf16": "true is dtype: bfloat16, and false is dtype: float32; auto, the default, chooses by the hardware",
        "torch_dtype": "dtype is of the arithmetic, save_dtype of the saved model; trained weights are float32",
        "logging_steps": "every step is a row of metrics.jsonl; remend report --watch RUN shows them on the way",
        "max_length": "a prompt has at most max_prompt_tokens, an answer max_new_tokens",
        "max_seq_length": "a prompt has at most max_prompt_tokens, an answer max_new_tokens",
        "max_prompt_length": "max_prompt_tokens is the limit; longer prompts are dropped, and never cut",
        "push_to_hub": "a finished run is uploaded by remend push RUN ORG/NAME, and never without being asked",
        "hub_model_id": "a finished run is uploaded by remend push RUN ORG/NAME",
        "deepspeed": "several GPUs share a step with torchrun or accelerate launch; a model is not sharded over them "
        "yet",
        "fsdp": "several GPUs share a step with torchrun or accelerate launch; a model is not sharded over them yet",
        "resume_from_checkpoint": "remend recover --resume RUN goes on from the last checkpoint",
        "warmup_ratio": "warmup_steps is a number of steps",
        "lr_scheduler_type": "the rate warms up for warmup_steps, then a cosine takes it to final_learning_rate",
        "optim": "the optimizer is AdamW; optimizer says where its moments are",
        "per_device_eval_batch_size": "measuring chooses its own batches",
        "use_peft": "lora: {rank: 16} trains an adapter",
        "lora_r": "adapters are lora: {rank: 16, alpha: 32}, or lora.r=16",
        "lora_alpha": "adapters are lora: {rank: 16, alpha: 32}, or lora.alpha=32",
        "lora_dropout": "adapters are lora: {rank: 16, dropout: 0.05}, or lora.dropout=0.05",
        "lora_target_modules": "adapters are lora: {rank: 16, targets: [q_proj, v_proj]}, or lora.targets",
        "load_in_4bit": "give a student that is stored in few bits: its format is found in its files, and kept",
        "lmbda": "policy of a stream is the share of completions that the student samples",
        "dataset_name": "data is a file, a folder, or a hub id, org/name[/configuration][@revision][:split]",
        "dataset_config": "it is part of data: org/name/configuration[@revision][:split]",
        "dataset_text_field": "columns: {text: FIELD} names the column",
        "dry_run": "remend check says what a run would do, and trains nothing",
        "type": "the shape of rows (chat messages, ShareGPT, Alpaca, …) is recognised; columns maps other names",
        "num_generations": "each prompt is answered once a step; epochs or steps say how often it comes again",
    }
    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "Models": ("student", "teacher", "out", "trust_remote_code"),
        "Data": (
            *("data", "columns", "streams", "eval_data", "held_out", "max_prompt_tokens", "self_prompts"),
            "demonstration_template",
        ),
        "Training": (
            *("steps", "epochs", "prompts_per_step", "batch_size", "gradient_accumulation", "gradient_checkpointing"),
            *(
                "learning_rate",
                "warmup_steps",
                "final_learning_rate",
                "weight_decay",
                "optimizer",
                "max_grad_norm",
                "beta",
                "loss",
                "top_k",
            ),
            *("max_new_tokens", "skip_first_tokens", "updates_per_rollout", "temperature", "ema", "bootstrap"),
            *("bootstrap_steps", "off_policy_passes", "alignment"),
        ),
        "Compression and adapters": (
            *("repair", "repair_samples", "repair_text", "train_embeddings", "as_dense", "layer_map", "train", "lora"),
            *("merge",),
        ),
        "Measuring": ("eval_every", "diagnose_every", "select", "patience", "report_to"),
        "Running": (
            *("save_every", "keep_checkpoints", "save_dtype", "max_shard_size", "dtype", "attn_implementation"),
            *("device", "placement", "seed"),
        ),
    }

    student: Name = Field(
        min_length=1, description="the damaged model: directory, GGUF file, hub id[@revision], smollm2"
    )
    teacher: Name | None = Field(
        None,
        min_length=1,
        description="the healthy model, in the same forms as the student; base: the model under the student's adapter",
    )
    data: Name | None = Field(
        None,
        min_length=1,
        description="prompts: a file (JSON lines, JSON, CSV, parquet), a folder, a hub id, or self, the default: the "
        "reference writes them",
    )
    columns: ColumnsSetting | None = Field(None, strict=False, description=COLUMNS_HELP)
    out: str = Field(
        min_length=1,
        description="a new directory for everything the run writes; by default runs/DATE-STUDENT, with one process",
    )
    streams: dict[str, StreamConfig] | None = Field(
        None, strict=False, description="several sources of signal at once: {name: {data, teacher, weight, …}}"
    )

    steps: Steps = Field(
        Auto(AUTO_STEPS),
        description="optimizer steps; auto: 40, and after a repair fewer where they win nothing on prompts set apart. "
        "40 take 135M parameters 2 minutes on two cores; large models need more",
    )
    epochs: OptionalNumber = Field(
        None, gt=0, description="in place of steps: how often the training prompts are gone through, 0.5 for half"
    )
    prompts_per_step: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="prompts per step, of all processes together; by default batch_size · gradient_accumulation, "
        "however many processes there are",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=MOST,
        description="prompts per micro-batch at most (TRL's trainers have 8; the figures here were measured with 8)",
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=MOST,
        description="how many micro-batches a step of one process has, where prompts_per_step is left out; a step "
        "samples all its rollouts first",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute layers in the backward pass; by default where activations would fill half the memory",
    )
    learning_rate: OptionalNumber = Field(
        None,
        gt=0,
        le=1,
        description="AdamW's peak; by default it follows what is trained and the model's size "
        "(docs/explanation/defaults.md)",
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="linear warm-up, then cosine (SDFT authors' code: cosine with warm-up); by default 5",
    )
    final_learning_rate: Number = Field(0.1, ge=0, le=1, description="where the cosine ends, as a share of the peak")
    weight_decay: Number = Field(
        0.0, ge=0, lt=1, description="AdamW's weight decay; 0 as in TRL's and the SDFT authors' configurations"
    )
    optimizer: Literal["adamw", "adamw-host", "adamw-8bit"] = Field(
        "adamw",
        description="where AdamW's moments are: beside the weights; in the host's memory (adamw-host, as exact); or in "
        "8 bits (adamw-8bit, by bitsandbytes)",
    )
    max_grad_norm: Number = Field(
        1.0, gt=0, description="gradients longer than this are clipped (transformers' default)"
    )
    beta: OptionalNumber = Field(
        0.0, ge=0, le=1, description="0 forward KL (teacher‖student), 1 reverse KL, between: GKD's JSD"
    )
    loss: LossConfig | None = Field(
        None,
        strict=False,
        description="in place of beta: a loss by name, or {name, …} with its parameters; a wrong name lists all",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="compare the teacher's k likeliest tokens and the rest as one; by default the full vocabulary",
    )
    max_new_tokens: Length = Field(
        48,
        description="tokens per rollout; [16, 96] grows over the run. Long ones cost more and start worse (arXiv "
        "2607.13124)",
    )
    skip_first_tokens: int | None = Field(
        None, ge=0, description="completion tokens left out of the loss; by default 3 with demonstrations, else 0"
    )
    demonstration_template: str | None = Field(
        None,
        min_length=1,
        description="text with {prompt} and {demonstration} that the teacher is shown; by default a sentence around "
        "both",
    )
    updates_per_rollout: int | None = Field(
        None,
        ge=1,
        description="steps that one round of sampling feeds, each completion once; by default 2 (1 where "
        "bootstrap_steps is odd)",
    )
    ema: EmaConfig = Field(
        default_factory=lambda: build(EmaConfig, {}, "ema"),
        strict=False,
        description="{rate, every} of the teacher ema",
    )
    bootstrap: Literal["repair", "auto", "on", "off"] = Field(
        "off",
        description="first train on the teacher's completions: for bootstrap_steps (on), while the student's are "
        "degenerate (auto), or on those that a repair was fitted to (repair)",
    )
    bootstrap_steps: int | None = Field(
        None,
        ge=1,
        description="at most this many steps; by default a third of them, and with repair as many as its answers "
        "are enough for",
    )
    off_policy_passes: int = Field(2, ge=1, description="how often a completion of the teacher is trained on")
    self_prompts: int | None = Field(
        None, ge=2, description="how many prompts data: self writes; by default one per trained row, at most 512"
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="longer prompts are dropped, never cut (SDFT authors' code: 1024)"
    )
    repair: bool = Field(True, description="first refit a compressed student in closed form (GPTQ, least squares)")
    repair_samples: int | None = Field(
        None,
        ge=1,
        description="answers of the teacher that repair is fitted to: by default 400 for a grid of 4 bits or more and "
        "600 for the rest; more win back more, and take longer",
    )
    repair_text: Name | None = Field(
        None,
        min_length=1,
        description="rows with their answers, or texts, as data takes them: what repair is fitted to in place of "
        "answers of the teacher",
    )
    train_embeddings: bool = Field(
        False, description="train a compressed student's embeddings and head even where they are still the teacher's"
    )
    as_dense: bool = Field(
        False, description="give up a quantization format that can't be held, and train ordinary weights"
    )
    layer_map: list[int] | None = Field(
        None, description="for a student with fewer layers: the teacher's number of each; by default found by weights"
    )
    train: Literal["all", "scales", "norms", "last"] = Field(
        "all",
        description="what moves: all weights; scales of a grid with its norms, its codes staying; norms alone; or "
        "last, the head and the last three layers (arXiv 2411.15558). An adapter is lora",
    )
    lora: LoraConfig | None = Field(
        None,
        strict=False,  # a mapping is welcome
        description="{rank, alpha, targets, dropout}: train an adapter beside frozen weights; wants a higher rate",
    )
    merge: bool = Field(False, description="fold the trained adapter into the dense weights before saving")
    alignment: AlignmentConfig | None = Field(
        None, strict=False, description="{measure, weight, layers}: pull hidden states towards the teacher's too"
    )
    temperature: Number = Field(
        1.0, gt=0, le=5, description="sampling temperature of the rollouts; 1 samples what the student itself would say"
    )

    eval_data: Name | None = Field(
        None, description="prompts to measure with, in the same forms; without it, held_out of the data are set apart"
    )
    held_out: int | None = Field(None, ge=1, description="prompts set apart; by default the smaller of 64 and 10%")
    eval_every: int = Field(
        0, ge=0, description="measure on the held-out prompts every n steps; 0: before and after only"
    )
    diagnose_every: int = Field(
        0, ge=0, description="CKA of every layer with the reference every n steps, into track.jsonl; 0: never"
    )
    select: Literal["last", "best"] | None = Field(
        None,
        description="which weights are saved: last, or best of the evaluated steps by weighted gap closed; by default "
        "best where eval_every has some evaluated; where steps: auto looks at prompts set apart, the best there",
    )
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations in a row without a better one")
    save_every: int | None = Field(
        None,
        ge=0,
        description="write a checkpoint every n steps, where a round of sampling ends, and at the end; 0: none; by "
        "default every quarter of the steps, or every 50 if that is fewer",
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="how many checkpoints stay; one holds weights and both AdamW moments, 12 bytes per trained "
        "parameter",
    )

    dtype: Arithmetic = Field(
        "auto",
        description="dtype of the arithmetic; auto: bfloat16 where the hardware has it. Trained weights are float32",
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="how student and teacher compute attention: eager, sdpa, flex_attention, or what else transformers "
        "has; by default its own choice, mostly sdpa",
    )
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:1, mps")
    placement: PlacementConfig = Field(
        default_factory=lambda: build(PlacementConfig, {}, "placement"),
        strict=False,
        description="where weights are kept: auto, device, host or disk, or {student, teacher} with one of these each. "
        "host and disk need steps: 0",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None,
        description="dtype of the saved model; auto, the default: that of the student's files where it rounds "
        "nothing, else "
        "float32. Another rounds, and the final figures are those of the rounded model",
    )
    max_shard_size: ShardSize | None = Field(
        None, description="size of one file of saved weights at most, such as 5GB; by default transformers' limit"
    )
    report_to: str | None = Field(None, description="a tracker that accelerate knows: tensorboard, wandb, trackio, …")
    seed: int = Field(
        0, ge=0, lt=2**31, description="random seed of the order of prompts, the rollouts and the held-out choice"
    )
    trust_remote_code: bool = Field(
        False,
        description="let a model directory run its own Python. Only the command can say so: in a file it is refused",
    )

    @classmethod
    def own_names(cls, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """See Settings; bf16: true, as transformers has it, is dtype: bfloat16."""
        named = super().own_names(values, origin)
        if named.get("bf16") is not True:
            return named
        del named["bf16"]
        if named.get("dtype", "bfloat16") != "bfloat16":
            where = f"{origin}: " if origin else ""
            raise InputError(
                f"{where}bf16: true is dtype: bfloat16, and dtype: {named['dtype']} is given too; leave one of them out"
            )
        return {**named, "dtype": "bfloat16"}

    @classmethod
    def missing(cls, values: Mapping[str, object]) -> list[str]:
        """What a recipe without streams must name itself; and steps beside epochs, of which one is to be left out."""
        steps, epochs, said = values.get("steps"), values.get("epochs"), []
        if steps is not None and epochs is not None:
            said.append(
                f"steps ({steps}) and epochs ({epochs}) are both given, and each says how long to train; leave one "
                "out. Over a recipe that has the other, give null for that: epochs=2 steps=null"
            )
        if not (values.get("streams") or values.get("teacher") is not None):
            said.append(f'"teacher" is missing ({cls.model_fields["teacher"].description})')
        return said

    @property
    def prompts_a_step(self) -> int:
        """`prompts_per_step`, or without it those of the micro-batches; of all processes together."""
        return self.prompts_per_step or self.batch_size * self.gradient_accumulation

    @property
    def updates_a_round(self) -> int:
        """`updates_per_rollout`, or without it mostly 2: a CPU samples 16 rows hardly slower than 8.

        See docs/measurements/speed.md.
        """
        return updates_a_round(self.model_dump())

    @property
    def steps_a_checkpoint(self) -> int:
        """`save_every`, or without it a quarter of the steps, in whole rounds of sampling; 0 for no checkpoints."""
        return steps_a_checkpoint(self.model_dump())

    @property
    def warm_up(self) -> int:
        """`warmup_steps`, or without it WARM_UP, or all steps of a run that is shorter."""
        return min(WARM_UP, self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def selects(self) -> Literal["last", "best"]:
        """`select`, or without it the best where any step is evaluated, else the last."""
        return self.select or ("best" if 0 < self.eval_every <= self.steps else "last")

    _switch = field_validator("bootstrap", mode="before")(_on_off)
    _one = field_validator("loss", mode="after")(_only_loss)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: object) -> object:
        """A recipe with a loss has no beta, and one with neither has the default beta; steps may be null for epochs."""
        if not isinstance(values, Mapping):
            return values
        values = {key: value for key, value in values.items() if key != "steps" or value is not None}
        if values.get("beta") is not None:
            return values
        values = {key: value for key, value in values.items() if key != "beta"}
        return {**values, "beta": None} if values.get("loss") is not None else values
