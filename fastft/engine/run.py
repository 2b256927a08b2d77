"""A whole run: prepare, teach, evaluate the base, train, evaluate the student, report."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastft import peft
from fastft.config import Config
from fastft.data.sequences import (
    Sequence,
    Window,
    answer_tokens,
    batches,
    make_windows,
    passages,
    question_prompt,
)
from fastft.data.store import StoreWriter, TeacherStore, store_key
from fastft.distributed import Ranks
from fastft.engine.launch import start
from fastft.engine.progress import Reporter, peak_memory_bytes
from fastft.engine.trainer import NonFiniteStep, Trainer, list_checkpoints
from fastft.errors import DataError, FastftError, Interrupted, NonFiniteLossError
from fastft.methods import distill
from fastft.methods.evaluation import QuestionSet, Scores, evaluate, recovery, total
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.report import before_after, write_report
from fastft.tasks import Document, Question, load_documents, select


@dataclass
class Base:
    """The frozen model with what identifies it."""

    lm: PackedCausalLM
    text: Text
    path: str
    fingerprint: str
    tokenizer_fingerprint: str


@dataclass
class Prepared:
    """All that training and evaluation read."""

    windows: list[Window]
    sequences: list[Sequence]
    evaluated: list[QuestionSet]
    control: list[QuestionSet]
    questions_written: int = 0


@dataclass
class Clock:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str):
        begin = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begin


class StopRequest:
    """Ctrl-C and SIGTERM: while training, the step is finished first; elsewhere the run ends at once."""

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame) -> None:
        self.signum = self.signum or signum
        if not self.deferred:
            raise Interrupted("stopped before training; nothing is lost: the same command starts again", signum)


def run(config: Config) -> dict[str, Any]:
    """Run a config from start to end; returns what summary.json holds."""
    stop = StopRequest()
    stop.install()
    began = time.monotonic()
    documents = load_documents(config.data)
    learned = select(documents, config.data.documents)
    ranks = start(config.deepspeed.threads_per_rank)
    out = Reporter(enabled=ranks.is_first)
    clock = Clock()
    output_dir = Path(config.output_dir)
    resumed = open_output_dir(config, output_dir, ranks)

    with clock.measure("load"):
        base = load_base(config, ranks)
    count = sum(p.numel() for p in base.lm.parameters())
    out.line(
        f"model      {config.model.name_or_path}  {count:,} parameters  {config.model.dtype}  {base.lm.device}  "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''} x {torch.get_num_threads()} threads  "
        f"ZeRO-{config.deepspeed.zero_stage}"
    )

    with clock.measure("prepare"):
        prepared = prepare(config, base, documents, learned, ranks, out)
    tokens = sum(len(s.token_ids) for s in prepared.sequences)
    kinds = {k: sum(s.kind == k for s in prepared.sequences) for k in ("passage", "self_study", "question")}
    out.line(
        f"prepare    {len(learned)} document{'s' if len(learned) > 1 else ''}, {len(prepared.windows)} contexts of up "
        f"to {max(len(w.token_ids) for w in prepared.windows)} tokens; "
        + ", ".join(f"{n} {k.replace('_', '-')}" for k, n in kinds.items() if n)
        + f" sequences, {tokens:,} tokens"
    )

    with clock.measure("teach"):
        store, found = teach(config, base, prepared, ranks, out)
    out.line(
        f"teach      {store.offsets[-1]:,} {config.distill.targets} targets, {store.nbytes / 2**20:.1f} MiB, "
        + ("found in " if found else "written to ")
        + str(store.folder)
    )

    with clock.measure("evaluate_base"):
        before = evaluate_base(config, base, prepared, ranks, out)

    torch.manual_seed(config.seed)
    trained = peft.inject(base.lm.model, config.peft)
    number = sum(p.numel() for p in trained.values())
    out.line(
        f"train      {config.peft.kind}: {number:,} of {count + (number if config.peft.kind != 'full' else 0):,} "
        f"parameters ({100 * number / count:.3f} %), {config.train.steps} steps of {config.train.batch_size} sequences"
    )
    trainer = Trainer(base.lm, trained, config, ranks)
    with clock.measure("train"):
        history = train(config, trainer, prepared, store, base, output_dir, resumed, stop, ranks, out)

    with clock.measure("evaluate_student"):
        trainer.lm.eval()
        after = {}
        for name, sets in (("evaluated", prepared.evaluated), ("control", prepared.control)):
            if sets:
                after[name] = run_evaluation(
                    config, base, sets, ranks, out, name="student", in_context=False, answers=name == "evaluated"
                )
    tensors = trainer.trained_tensors()
    summary = summarize(config, prepared, before, after, history)
    if ranks.is_first:
        peft.save_adapter(output_dir / "adapter", tensors, config.peft, base_model=base.path, model=base.lm.model)
        clock.seconds["total"] = time.monotonic() - began
        summary["seconds"] = {k: round(v, 3) for k, v in clock.seconds.items()}
        summary["peak_memory_bytes"] = peak_memory_bytes()
        summary["trained_parameters"] = number
        write_json(output_dir / "summary.json", summary)
        write_report(output_dir, config, summary)
        out.show(before_after(summary))
        if tensors:
            out.line(f"adapter    {output_dir / 'adapter'}")
        out.line(f"report     {output_dir / 'report.html'}")
        out.line(f"summary    {output_dir / 'summary.json'}  ({clock.seconds['total']:.0f} s in all)")
    ranks.barrier()
    return summary


def open_output_dir(config: Config, folder: Path, ranks: Ranks) -> Path | None:
    """Make the run's folder and write config.yaml; returns the checkpoint to resume from, if any.

    Raises FastftError where another run is there and neither overwrite nor resume is set.
    """
    problem, checkpoint = None, None
    if ranks.is_first:
        existing = (folder / "config.yaml").is_file()
        if folder.is_dir() and any(folder.iterdir()) and not existing:
            problem = f"output_dir={folder}: the folder holds something other than a run; choose another or empty it"
        elif existing and config.resume == "auto":
            found = list_checkpoints(folder / "checkpoints")
            checkpoint = found[-1] if found else None
            if checkpoint is None and (folder / "summary.json").is_file():
                problem = f"output_dir={folder}: this run is complete; set overwrite=true to run it again"
        elif existing and not config.overwrite:
            problem = (
                f"output_dir={folder} holds another run; set resume=auto to go on with it, overwrite=true to "
                "replace it, or choose another folder"
            )
        if problem is None:
            if existing and config.overwrite:
                for name in ("adapter", "checkpoints"):
                    shutil.rmtree(folder / name, ignore_errors=True)
                for name in ("metrics.jsonl", "summary.json", "report.html"):
                    (folder / name).unlink(missing_ok=True)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "config.yaml", config.dump())
            except OSError as error:
                problem = f"output_dir={folder}: cannot be written: {error.strerror}"
    problem, checkpoint = ranks.gather((problem, checkpoint))[0]
    if problem:
        raise FastftError(problem)
    return checkpoint


def load_base(config: Config, ranks: Ranks) -> Base:
    m = config.model
    if ranks.is_first:
        path = loading.resolve(m.name_or_path, config.cache_path)
    ranks.barrier()
    path = loading.resolve(m.name_or_path, config.cache_path)
    tokenizer = loading.load_tokenizer(path, revision=m.revision, trust_remote_code=m.trust_remote_code)
    model = loading.load_model(
        path,
        dtype=m.dtype,
        revision=m.revision,
        trust_remote_code=m.trust_remote_code,
        random_weights=m.random_weights,
        seed=config.seed,
    )
    loading.check_tokenizer(tokenizer, model, path)
    fingerprint = loading.fingerprint(model)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return Base(
        PackedCausalLM(model.to(ranks.device)),
        Text(tokenizer),
        path,
        fingerprint,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def prepare(
    config: Config, base: Base, documents: list[Document], learned: list[Document], ranks: Ranks, out: Reporter
) -> Prepared:
    """Contexts, student sequences and scored questions as token ids."""
    text, data, queries = base.text, config.data, config.queries
    positions = loading.max_positions(base.lm.model)

    def windows_of(document: Document) -> list[Window]:
        reserve = distill.query_reserve(document, config, text)
        return make_windows(
            document, data, text.encode, text.decode, leading=text.leading, positions=positions, reserve=reserve
        )

    windows: list[Window] = []
    sequences: list[Sequence] = []
    evaluated = []
    for document in learned:
        own = windows_of(document)
        used, scored = split_questions(document, config)
        for window in own:
            index = len(windows)
            windows.append(window)
            sequences += passages(window, index, queries.passages, text.encode)
            sequences += [
                distill.question_sequence("question", q.text, answer, index, config, text)
                for q in used
                for answer in q.answers
            ]
        if scored:
            evaluated.append(question_set(document, own, scored, config, text))
    control = []
    others = [d for d in documents if d not in learned and d.questions]
    count = min(data.control_documents, len(others))
    for i in range(count):
        document = others[i * len(others) // count]
        own = windows_of(document)
        control.append(question_set(document, own, list(document.questions), config, text))
    written = 0
    if queries.self_study.count:
        with out.phase("prepare", queries.self_study.count * len(windows), "questions") as phase:
            for index, window in enumerate(windows):
                pairs = cached_questions(config, base, window, ranks, phase.advance)
                written += len(pairs)
                sequences += [
                    distill.question_sequence("self_study", q, answer, index, config, text) for q, answer in pairs
                ]
    if not sequences:
        raise DataError("there is nothing to train on: the documents gave no passages and the teacher no questions")
    longest = max(len(s.token_ids) for s in sequences) + len(text.leading)
    if positions is not None and longest > positions:
        raise DataError(f"a query takes {longest} tokens, the model holds {positions}; shorten queries.passages.tokens")
    return Prepared(windows, sequences, evaluated, control, written)


def split_questions(document: Document, config: Config) -> tuple[list[Question], list[Question]]:
    """(trained, evaluated) questions of a document; in the document_only setting none is trained."""
    questions = list(document.questions)
    if config.queries.setting == "document_only":
        return [], questions
    shuffled = [q for q in questions if q.split is None]
    random.Random(f"{config.seed}-{document.id}").shuffle(shuffled)
    cut = round(len(shuffled) * (1 - config.data.heldout_fraction))
    train = {id(q) for q in [*shuffled[:cut], *(q for q in questions if q.split == "train")]}
    return [q for q in questions if id(q) in train], [q for q in questions if id(q) not in train]


def question_set(
    document: Document, windows: list[Window], questions: list[Question], config: Config, text: Text
) -> QuestionSet:
    return QuestionSet(
        document.id,
        windows,
        [question_prompt(q.text, config.data, text.encode) for q in questions],
        [[answer_tokens(a, config.data, text.encode) for a in q.answers] for q in questions],
        [q.answers for q in questions],
    )


def cached_questions(config: Config, base: Base, window: Window, ranks: Ranks, advance) -> list[tuple[str, str]]:
    """The teacher's questions about a window, from the cache folder or written now."""
    study = config.queries.self_study
    key = store_key(
        {
            "what": "questions",
            "base": base.fingerprint,
            "tokenizer": base.tokenizer_fingerprint,
            "dtype": config.model.dtype,
            "context": window.token_ids,
            "text": window.text,
            "study": study.model_dump(mode="json"),
            "query_pattern": config.data.query_pattern,
            "batch_size": config.evaluate.batch_size,
            "seed": config.seed,
        }
    )
    path = config.cache_path / "questions" / f"{key}.json"
    try:
        pairs = [(q, a) for q, a in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        pairs = None
    if ranks.all(pairs is not None):
        advance(study.count)
        return pairs
    pairs = distill.write_questions(base.lm, window, base.text, config, ranks, seed=config.seed, advance=advance)
    if ranks.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, pairs)
    return pairs


def teach(config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> tuple[TeacherStore, bool]:
    """The teacher's targets, found in the cache folder or computed now; and which of the two."""
    d = config.distill
    description = {
        "what": "targets",
        "base": base.fingerprint,
        "tokenizer": base.tokenizer_fingerprint,
        "dtype": config.model.dtype,
        "device": base.lm.device.type,
        "windows": [w.token_ids for w in prepared.windows],
        "sequences": [(s.window, s.prompt, s.completion) for s in prepared.sequences],
        "targets": d.targets,
        "top_k": d.top_k if d.targets == "topk" else None,
        "loss_on": d.loss_on,
    }
    key = store_key(description)
    folder = config.cache_path / "teacher" / key
    store = TeacherStore.open(folder)
    if ranks.all(store is not None):
        return store, True
    lengths = [len(s.target_positions(d.loss_on)) for s in prepared.sequences]
    writer = StoreWriter(folder, distill.target_specs(d, base.lm), lengths)
    problem = None
    if ranks.is_first:
        try:
            writer.create()
        except FastftError as error:
            problem = str(error)
    problem = ranks.gather(problem)[0]
    if problem:
        raise FastftError(problem)
    with out.phase("teach", len(prepared.sequences), "sequences") as phase:
        distill.teach(
            base.lm,
            prepared.windows,
            prepared.sequences,
            d,
            writer,
            ranks,
            batch_size=config.evaluate.batch_size,
            advance=phase.advance,
        )
    ranks.barrier()
    if ranks.is_first:
        described = {k: v for k, v in description.items() if k not in ("windows", "sequences")}
        writer.finish({**described, "documents": sorted({w.document for w in prepared.windows})})
    ranks.barrier()
    store = TeacherStore.open(folder)
    if store is None:
        raise FastftError(f"{folder}: the teacher store that was just written does not read back; check the disk")
    return store, False


def run_evaluation(
    config: Config,
    base: Base,
    sets: list[QuestionSet],
    ranks: Ranks,
    out: Reporter,
    *,
    name: str,
    in_context: bool,
    answers: bool = False,
) -> list[Scores]:
    with out.phase(name, sum(len(s.prompts) for s in sets), "questions") as phase:
        return evaluate(
            base.lm,
            sets,
            base.text,
            ranks,
            in_context=in_context,
            batch_size=config.evaluate.batch_size,
            max_new_tokens=config.evaluate.max_new_tokens if answers and config.evaluate.answers else None,
            advance=phase.advance,
        )


def evaluate_base(
    config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter
) -> dict[str, dict[str, list[Scores]]]:
    """Scores of the base without and with the context, for the evaluated and the control questions."""
    scores: dict[str, dict[str, list[Scores]]] = {}
    for name, sets in (("evaluated", prepared.evaluated), ("control", prepared.control)):
        if sets:
            # The control is a likelihood; answers are generated for the evaluated questions alone.
            options = {"answers": name == "evaluated"}
            scores[name] = {
                "no_context": run_evaluation(
                    config, base, sets, ranks, out, name="no context", in_context=False, **options
                ),
                "teacher": run_evaluation(
                    config, base, sets, ranks, out, name="in context", in_context=True, **options
                ),
            }
    return scores


def train(
    config: Config,
    trainer: Trainer,
    prepared: Prepared,
    store: TeacherStore,
    base: Base,
    output_dir: Path,
    checkpoint: Path | None,
    stop: StopRequest,
    ranks: Ranks,
    out: Reporter,
) -> dict[str, Any]:
    """The optimizer steps. Returns figures of the whole: steps, tokens, last loss."""
    t = config.train
    counts = [len(s.target_positions(config.distill.loss_on)) for s in prepared.sequences]
    first = trainer.load_checkpoint(checkpoint) if checkpoint else 0
    metrics = Metrics(output_dir / "metrics.jsonl", first, enabled=ranks.is_first)
    plan = batches(
        counts,
        steps=t.steps,
        batch_size=t.batch_size,
        micro_batches=t.micro_batches,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
    )

    def loss_fn(examples: list[int]) -> torch.Tensor:
        return distill.loss_fn(trainer.engine, prepared.sequences, examples, store, config.distill, base.text.leading)

    stop.deferred = True
    loss = float("nan")
    last_line = 0
    if first:
        out.line(f"resume     from step {first} ({checkpoint})")
    with out.phase("train", t.steps, "steps") as phase:
        phase.advance(first)
        for number, micro_batches in enumerate(plan, 1):
            if number <= first:
                continue
            begin = time.monotonic()
            try:
                result = trainer.step(number, micro_batches, loss_fn, stop.signum is not None)
            except NonFiniteStep as error:
                raise describe_non_finite(error, prepared, loss_fn, base, trainer, output_dir, ranks) from None
            loss = result.loss
            if loss != loss or (t.max_grad_norm and result.grad_norm != result.grad_norm):
                raise NonFiniteLossError(
                    f"step {number}: the gradient is not finite; lower train.lr ({t.lr:g}). "
                    + kept_checkpoint(output_dir)
                )
            seconds = time.monotonic() - begin
            tokens = micro_batches[0].total_targets
            metrics.write(
                step=number,
                loss=loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                tokens_per_s=tokens / seconds,
                peak_memory_bytes=peak_memory_bytes(),
                time_s=seconds,
            )
            note = f"loss {loss:.4f}  {tokens / seconds:,.0f} tok/s  mem {peak_memory_bytes() / 2**30:.2f} GiB"
            phase.advance(1, note)
            if not out.console.is_terminal and (number - last_line >= t.log_every or number == t.steps):
                last_line = number
                left = phase.seconds / (number - first) * (t.steps - number)
                out.line(
                    f"step {number}/{t.steps}  loss {loss:.4f}  grad_norm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
                    f"tok/s {tokens / seconds:,.0f}  mem {peak_memory_bytes() / 2**30:.2f}GiB  left {left:.0f} s"
                )
            if t.eval_every and number % t.eval_every == 0 and number < t.steps and prepared.evaluated:
                trainer.lm.eval()
                scores = total(
                    run_evaluation(config, base, prepared.evaluated, ranks, out, name="student", in_context=False)
                )
                metrics.write(step=number, **{f"evaluated_{k}": v for k, v in scores.items()})
                out.line(f"step {number}/{t.steps}  nll {scores['nll']:.4f}")
            stopping = result.stop and number < t.steps
            if stopping or (t.save_every and number % t.save_every == 0 and number < t.steps):
                saved = trainer.save_checkpoint(number, output_dir / "checkpoints")
                if stopping:
                    signum = stop.signum or signal.SIGTERM
                    raise Interrupted(
                        f"stopped after step {number} of {t.steps}; checkpoint {saved}. To go on, run the same command "
                        "with resume=auto",
                        signum,
                    )
    stop.deferred = False
    return {"steps": t.steps, "loss": loss, "resumed_from": first}


def describe_non_finite(error, prepared, loss_fn, base, trainer, output_dir, ranks) -> NonFiniteLossError:
    """Find the examples behind a loss that is not finite; keep the state before the step as a checkpoint."""
    culprits = []
    size = max(ranks.gather(len(error.batch.examples)))
    with torch.no_grad():
        for i in range(size):  # every rank makes the same number of forwards
            mine = error.batch.examples[i : i + 1]
            value = loss_fn(mine or [0])
            if mine and not torch.isfinite(value):
                culprits.append(mine[0])
    culprits = sorted(c for part in ranks.gather(culprits) for c in part)
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.trained_tensors().values())
    where = "no single example alone"
    if culprits:
        s = prepared.sequences[culprits[0]]
        snippet = base.text.decode(list(s.token_ids))[:80]
        where = f"example {culprits[0]} ({s.kind}, document {prepared.windows[s.window].document!r}: {snippet!r}...)"
    if finite and error.step > 1:
        trainer.save_checkpoint(error.step - 1, output_dir / "checkpoints")
    return NonFiniteLossError(
        f"step {error.step}: the loss is {error.loss}, from {where}; no parameter was changed by this step. "
        f"{kept_checkpoint(output_dir)} Lower train.lr, or look at the example."
    )


def kept_checkpoint(output_dir: Path) -> str:
    found = list_checkpoints(output_dir / "checkpoints")
    return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint."


class Metrics:
    """metrics.jsonl: a line a step; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, first: int, enabled: bool):
        self.path = path if enabled else None
        if enabled:
            kept = []
            if first and path.is_file():
                for line in path.read_text(encoding="utf-8").splitlines():
                    if line.strip() and json.loads(line)["step"] <= first:
                        kept.append(line + "\n")
            write_text(path, "".join(kept))

    def write(self, **values: Any) -> None:
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def summarize(
    config: Config,
    prepared: Prepared,
    before: dict[str, dict[str, list[Scores]]],
    after: dict[str, list[Scores]],
    history: dict[str, Any],
) -> dict[str, Any]:
    """The final figures, for all documents together and one by one."""
    summary: dict[str, Any] = {
        "method": config.method,
        "setting": config.queries.setting,
        "peft": config.peft.kind,
        "model": config.model.name_or_path,
        "nll_no_context": None,
        "nll_teacher": None,
        "nll_student": None,
        "recovery": None,
        "control_recovery": None,
        **history,
    }
    if "evaluated" in before:
        rows = {**before["evaluated"], "student": after["evaluated"]}
        for name, scores in rows.items():
            summary |= {f"{metric}_{name}": value for metric, value in total(scores).items()}
        summary["recovery"] = recovery(summary["nll_no_context"], summary["nll_student"], summary["nll_teacher"])
        summary["documents"] = [
            {
                "id": s.document,
                "questions": len(s.prompts),
                **{f"nll_{name}": scores[i].nll_per_token for name, scores in rows.items()},
                "recovery": recovery(*(rows[n][i].nll_per_token for n in ("no_context", "student", "teacher"))),
            }
            for i, s in enumerate(prepared.evaluated)
        ]
    if "control" in before:
        rows = {**before["control"], "student": after["control"]}
        control = {name: total(scores)["nll"] for name, scores in rows.items()}
        summary |= {f"control_nll_{name}": value for name, value in control.items()}
        summary["control_recovery"] = recovery(control["no_context"], control["student"], control["teacher"])
        summary["control_documents"] = [s.document for s in prepared.control]
    return summary


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
