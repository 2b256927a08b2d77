"""Context distillation as a plain transformers + PEFT loop: what `narrativeqa_recovery.py` compares fastft with.

python benchmarks/plain_distillation.py --model FOLDER --document FILE.json --json FILE

It is written as somebody would who knows both libraries: the document is encoded once (`past_key_values`), questions
are sampled from the teacher and answered greedily in batches, the teacher's logits are computed once and kept, batches
are padded on the right to their longest sequence, LoRA comes from PEFT with its defaults. It imports nothing of fastft.

What fastft's own configuration does differently (no questions, short passages of which every other one stands in the
question's pattern, AdamW with a short memory, LoRA+) is an option each, so that recipe and engine can be told apart:

    --pattern chat --loss-on all --questions 0 --passages 32 8 8 --passage-pattern both --steps 24 --warmup 2
    --lr 1.5e-3 --betas 0.7 0.9 --lora-plus 8

--document holds {"text": ..., "questions": [{"question": ..., "answers": [...]}, ...]}; the questions are only scored.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, get_linear_schedule_with_warmup

PATTERNS = {  # context, question, answer, what ends an answer
    "chat": (
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "{}",
        "<|im_end|>\n",
    ),
    "plain": ("{}\n\n", "Question: {}\nAnswer:", " {}", "\n"),
}
ASKS = {
    "chat": "<|im_start|>user\nWrite one short question about the text above.<|im_end|>\n<|im_start|>assistant\n",
    "plain": "Question:",
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--document", type=Path, required=True)
    p.add_argument("--json", type=Path, required=True)
    p.add_argument("--pattern", choices=PATTERNS, default="chat")
    p.add_argument("--loss-on", choices=("all", "completion"), default="completion")
    p.add_argument("--questions", type=int, default=64)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--passages", type=int, nargs=3, default=(64, 24, 32), metavar=("TOKENS", "PROMPT", "STRIDE"))
    p.add_argument(
        "--passage-pattern", choices=("text", "both"), default="text", help="both: every other as a question"
    )
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    p.add_argument("--lora-plus", type=float, default=1.0, help="learning rate of lora_B over that of lora_A")
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--eval-every", type=int, default=10)
    p.add_argument("--target", type=float, default=0.8, help="stop once this recovery is reached (above 1: never)")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    document = json.loads(a.document.read_text())
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16).eval()
    context_pattern, question_pattern, answer_pattern, end = PATTERNS[a.pattern]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    context = encode(context_pattern.format(document["text"]))
    began = time.perf_counter()
    with torch.no_grad():
        encoded = model(torch.tensor([context]), past_key_values=DynamicCache(), logits_to_keep=1).past_key_values

    def cache_for(batch: int) -> DynamicCache:
        repeated = copy.deepcopy(encoded)
        repeated.batch_repeat_interleave(batch)
        return repeated

    def answer_with_context(prompts: list[str], **options) -> list[str]:
        """Continuations of each prompt behind the context, up to a line's end."""
        found = []
        for start in range(0, len(prompts), 32):
            batch = tokenizer(
                prompts[start : start + 32],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            n = len(batch.input_ids)
            ids = torch.cat([torch.tensor(context).expand(n, -1), batch.input_ids], 1)
            mask = torch.cat([torch.ones(n, len(context), dtype=torch.long), batch.attention_mask], 1)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache_for(n),
                stop_strings=["\n", "<|im_end|>", "?"] if options.get("do_sample") else ["\n", "<|im_end|>"],
                tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            found += [t.strip().split("\n")[0].strip() for t in texts]
        return found

    def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, s in enumerate(sequences):
            ids[i, : len(s)] = torch.tensor(s)
            mask[i, : len(s)] = 1
        return ids, mask

    @torch.no_grad()
    def gold_nll(in_context: bool) -> float:
        nll, count = 0.0, 0
        pairs = [
            (encode(question_pattern.format(q["question"])), encode(answer_pattern.format(text)))
            for q in document["questions"]
            for text in q["answers"]
        ]
        for start in range(0, len(pairs), 32):
            batch = pairs[start : start + 32]
            ids, mask = padded([q + answer for q, answer in batch])
            options = {}
            if in_context:
                mask = torch.cat([torch.ones(len(batch), len(context), dtype=torch.long), mask], 1)
                options = {"past_key_values": cache_for(len(batch)), "position_ids": positions(ids)}
            logits = model(ids, attention_mask=mask, **options).logits
            for row, (q, answer) in zip(logits, batch, strict=True):
                log_probs = row[len(q) - 1 : len(q) + len(answer) - 1].float().log_softmax(-1)
                nll -= log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()
                count += len(answer)
        return nll / count

    def positions(ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(context), len(context) + ids.shape[1]).expand(len(ids), -1)

    seconds = {"context": time.perf_counter() - began}

    began = time.perf_counter()
    asked = answer_with_context(
        [ASKS[a.pattern]] * a.questions, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
    )
    asked = [q for q in dict.fromkeys(asked) if q.endswith("?")]
    answers = answer_with_context([question_pattern.format(q) for q in asked], do_sample=False, max_new_tokens=24)
    seconds["questions"] = time.perf_counter() - began if a.questions else 0.0

    examples = [
        (encode(question_pattern.format(q)), encode(answer_pattern.format(x) + end))
        for q, x in zip(asked, answers, strict=True)
        if x
    ]
    written = len(examples)
    text = encode(document["text"])
    length, given, stride = a.passages
    for number, start in enumerate(range(0, max(1, len(text) - given), stride)):
        piece = text[start : start + length]
        q, x = piece[:given], piece[given:]
        if a.passage_pattern == "both" and number % 2:
            q = encode(question_pattern.format(tokenizer.decode(q).strip()))
            x = encode(answer_pattern.format(tokenizer.decode(x).strip()) + end)
        examples.append((q, x))
    examples = [(q, x) for q, x in examples if x]

    began = time.perf_counter()
    teacher: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, len(examples), 16):
            batch = examples[start : start + 16]
            ids, mask = padded([q + x for q, x in batch])
            mask = torch.cat([torch.ones(len(batch), len(context), dtype=torch.long), mask], 1)
            logits = model(
                ids, attention_mask=mask, position_ids=positions(ids), past_key_values=cache_for(len(batch))
            ).logits
            for row, (q, x) in zip(logits, batch, strict=True):
                first = len(q) - 1 if a.loss_on == "completion" else 0
                teacher.append(row[first : len(q) + len(x)].clone())
    seconds["teach"] = time.perf_counter() - began

    nll_no_context, nll_teacher = gold_nll(False), gold_nll(True)
    student = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if "lora_B" not in name]},
        {"params": [p for name, p in trained.items() if "lora_B" in name], "lr": a.lr * a.lora_plus},
    ]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=tuple(a.betas), weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, a.warmup, a.steps)
    order: list[int] = []
    shuffle = random.Random(a.seed)
    seconds["train"] = 0.0
    curve, tokens = [], 0
    for step in range(1, a.steps + 1):
        began = time.perf_counter()
        student.train()
        if len(order) < a.batch_size:
            order += shuffle.sample(range(len(examples)), len(examples))
        chosen, order = order[: a.batch_size], order[a.batch_size :]
        ids, mask = padded([[*examples[i][0], *examples[i][1]] for i in chosen])
        logits = student(ids, attention_mask=mask).logits
        rows = []
        for row, i in zip(logits, chosen, strict=True):
            q, x = examples[i]
            rows.append(row[len(q) - 1 if a.loss_on == "completion" else 0 : len(q) + len(x)])
        tokens += int(mask.sum())
        mine = torch.cat(rows).float().log_softmax(-1)
        theirs = torch.cat([teacher[i] for i in chosen]).float().log_softmax(-1)
        loss = F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds["train"] += time.perf_counter() - began
        if step % a.eval_every == 0 or step == a.steps:
            student.eval()
            recovery = (nll_no_context - gold_nll(False)) / (nll_no_context - nll_teacher)
            curve.append({"step": step, "recovery": recovery, "seconds": sum(seconds.values())})
            spent = sum(seconds.values())
            print(f"plain  step {step}  loss {loss.item():.4f}  recovery {recovery:.2f}  {spent:.0f} s", flush=True)
            if recovery >= a.target:
                break
    a.json.write_text(
        json.dumps(
            {
                "nll_no_context": nll_no_context,
                "nll_teacher": nll_teacher,
                "questions": written,
                "examples": len(examples),
                "curve": curve,
                "seconds": seconds,
                "train_tokens_per_step": tokens / step,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
