"""Datasets as plain Python values: one file each, no model and no tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from fastft.config import DataConfig
from fastft.tasks import documents, narrativeqa
from fastft.tasks.base import Document, Question, select

DOCUMENT_TASKS: dict[str, Callable[[DataConfig], list[Document]]] = {
    "documents": documents.load,
    "narrativeqa": narrativeqa.load,
}

__all__ = ["DOCUMENT_TASKS", "Document", "Question", "load_documents", "select"]


def load_documents(config: DataConfig) -> list[Document]:
    """Every document of the configured task; raises DataError where there is none."""
    return DOCUMENT_TASKS[config.task](config)
