"""`fastft doctor` says what attention will be, and why not something else."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from fastft import doctor
from fastft.cli import main
from fastft.models import flash


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"]["gpu"] == "none is visible"
    assert main(["doctor"]) == 0
    assert "attention: cpu" in capsys.readouterr().out


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_with_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for module in ("flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    old = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: None)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", old)
    flash.select.cache_clear()
    found = doctor._attention(True)
    flash.select.cache_clear()
    if capability == (9, 0):
        assert found["fa3"].startswith("flash-attn 3 cannot be imported: ")
        assert found["fa2"].endswith("flash_attn_varlen_func has no argument return_attn_probs")
        assert found["varlen"] == "torch.nn.attention.varlen used for float16 and bfloat16"
        assert found["sdpa"].endswith("used for what no other takes")
    else:
        assert found["varlen"] == "torch.nn.attention.varlen has no kernels for compute capability 7.5"
        assert found["sdpa"].endswith("used for everything")
