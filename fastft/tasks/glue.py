"""Tasks of GLUE (Wang et al. 2019, arXiv 1804.07461) and, for each, a set of another distribution.

RTE, MNLI: does text1 entail text2?     HANS (McCoy et al. 2019, arXiv 1902.01007): word overlap without entailment
QQP: do two questions ask the same?     PAWS-QQP (Zhang et al. 2019, arXiv 1904.01130): word overlap without it
CoLA: is a sentence acceptable?         CoLA-OOD: sentences of other publications

Pairing and the patterns `minimal`, `gpt3` and `eval_harness` follow Mosbach et al. 2023 (aclanthology
2023.findings-acl.779, code uds-lsv/llmft), with the space in front of the label word and not at the query's end.
`llmft_*` are those that its scripts pass to in-context learning: the query of `llmft_minimal` ends in a space though
the label word brings its own, and where a line break was meant the shell leaves a backslash and an n.
`lm_eval` is what lm-evaluation-harness 0.4 asks, character by character; the paper's `eval_harness` has a blank behind
the premise of RTE, leaves MNLI's hypothesis without its full stop, and has QQP's question and answer in one line.
benchmarks/compare_lm_eval.py compares prompts and likelihoods.
"""

from __future__ import annotations

import ast
import re

from fastft.tasks.classification import ClassificationTask, Pattern, columns

LITERAL = r"\n\n"  # four characters, no line break

ENTAILMENT = {
    "minimal": Pattern("{text1} {text2} ?", ("Yes", "No")),
    "gpt3": Pattern("{text1} question: {text2} Yes or No? answer:", ("Yes", "No")),
    "eval_harness": Pattern("{text1} \nQuestion: {text2} True or False?\nAnswer:", ("True", "False")),
    "lm_eval": Pattern("{text1}\nQuestion: {text2} True or False?\nAnswer:", ("True", "False")),
    "llmft_minimal": Pattern("{text1} {text2} ? ", ("Yes", "No"), LITERAL, shown="{text1} {text2} ?"),
    "llmft_gpt3": Pattern("{text1} question: {text2} Yes or No? answer:", ("Yes", "No"), LITERAL),
    "llmft_eval_harness": Pattern(
        r"{text1} \nQuestion: {text2} True or False? \nAnswer:",
        ("True", "False"),
        LITERAL,
        shown=r"{text1} \nQuestion: {text2} True or False?\nAnswer:",
    ),
}
ENTAILMENT_OR_NEUTRAL = {
    "minimal": Pattern("{text1} {text2} ?", ("Yes", "Maybe", "No")),
    "eval_harness": Pattern(
        "{text1}\nQuestion: {text2} True, False or Neither?\nAnswer:", ("True", "Neither", "False")
    ),
    "lm_eval": Pattern(
        "{text1}\nQuestion: {text2} True, False or Neither?\nAnswer:",
        ("True", "Neither", "False"),
        sentences=("text2",),
    ),
}
PARAPHRASE = {
    "minimal": Pattern("{text1} {text2} ?", ("No", "Yes")),
    "eval_harness": Pattern(
        "Question 1: {text1}\nQuestion 2: {text2}\nQuestion: Do both questions ask the same thing? Answer:",
        ("No", "Yes"),
    ),
    "lm_eval": Pattern(
        "Question 1: {text1}\nQuestion 2: {text2}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "llmft_minimal": Pattern("{text1} {text2} ? ", ("No", "Yes"), LITERAL, shown="{text1} {text2} ?"),
    "llmft_eval_harness": Pattern(
        r"Question 1: {text1}\nQuestion 2: {text2}\nQuestion: Do both questions ask the same thing? Answer:",
        ("No", "Yes"),
        LITERAL,
    ),
}
ACCEPTABILITY = {
    "minimal": Pattern("{text1} ?", ("No", "Yes"), separator=" "),
    "gpt3": Pattern("grammatical: {text1} Yes or No? answer:", ("No", "Yes")),
    "lm_eval": Pattern("{text1}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "llmft_minimal": Pattern("{text1} ? ", ("No", "Yes"), " ", shown="{text1} ?"),
}

SENTENCES = {"text1": "sentence1", "text2": "sentence2"}
PREMISE = {"text1": "premise", "text2": "hypothesis"}
QUESTIONS = {"text1": "question1", "text2": "question2"}
SENTENCE = {"text1": "sentence"}
TWO, THREE = {0: 0, 1: 1}, {0: 0, 1: 1, 2: 2}
WITHOUT_NEUTRAL, NEUTRAL_MERGED = {0: 0, 1: None, 2: 1}, {0: 0, 1: 1, 2: 1}
GLUE = "nyu-mll/glue"


def text_of_literal(text: str) -> str:
    """PAWS-QQP is released with each sentence as Python writes its bytes, b'...'; anything else stays as it is."""
    if not re.fullmatch(r"b(?:'.*'|\".*\")", text, re.DOTALL):
        return text
    try:
        return ast.literal_eval(text).decode().strip()
    except (SyntaxError, ValueError):
        return text


def mnli(name: str, labels: dict[int, int | None], patterns: dict[str, Pattern]) -> list[ClassificationTask]:
    """MultiNLI, and its pairs of other genres than the training data's."""
    read, hub = columns(PREMISE, labels), f"{GLUE}:mnli"
    return [
        ClassificationTask(name, read, patterns, "mnli", hub, {"validation": "validation_matched"}),
        ClassificationTask(
            f"{name}_mismatched",
            read,
            patterns,
            "mnli_mismatched",
            hub,
            {"validation": "validation_mismatched"},
            has_train=False,
        ),
    ]


TASKS = [
    ClassificationTask("rte", columns(SENTENCES, TWO), ENTAILMENT, "rte", f"{GLUE}:rte"),
    *mnli("mnli", THREE, ENTAILMENT_OR_NEUTRAL),
    # HANS has two labels: Mosbach et al. leave out the neutral pairs; McCoy et al. count them as no entailment.
    *mnli("mnli_binary", WITHOUT_NEUTRAL, ENTAILMENT),
    *mnli("mnli_merged", NEUTRAL_MERGED, ENTAILMENT),
    ClassificationTask(
        "hans",
        columns(PREMISE, TWO, groups=("heuristic", "subcase")),
        ENTAILMENT,
        "hans",
        "jhu-cogsci/hans",
        has_train=False,
    ),
    ClassificationTask("qqp", columns(QUESTIONS, TWO), PARAPHRASE, "qqp", f"{GLUE}:qqp"),
    ClassificationTask(
        "paws_qqp", columns(SENTENCES, TWO, decode=text_of_literal), PARAPHRASE, "paws_qqp", has_train=False
    ),
    ClassificationTask("cola", columns(SENTENCE, TWO), ACCEPTABILITY, "cola", f"{GLUE}:cola"),
    ClassificationTask("cola_ood", columns(SENTENCE, TWO), ACCEPTABILITY, "cola_ood", has_train=False),
]
