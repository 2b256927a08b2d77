"""What a run refuses before it computes anything."""

from __future__ import annotations

import pytest

from fastft.config import validate
from fastft.distributed import Ranks
from fastft.engine.base import load_base
from fastft.engine.progress import Reporter
from fastft.errors import ModelError


def test_attention_that_was_asked_for_and_cannot_be_used(base_config):
    config = validate(base_config(model={"attention": "fa2"}))
    with pytest.raises(ModelError, match="=fa2: flash-attn 2 needs a GPU, got device cpu; use auto, or sdpa to pad"):
        load_base(config, Ranks(), Reporter(enabled=False))
    padded = load_base(validate(base_config(model={"attention": "sdpa"})), Ranks(), Reporter(enabled=False))
    assert padded.attention == "padded"
