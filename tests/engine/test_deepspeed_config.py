"""What DeepSpeed is told."""

from types import SimpleNamespace

import pytest
from torch import nn

from fastft.config import validate
from fastft.engine.deepspeed_config import derive


@pytest.mark.parametrize(("layers", "live"), [([nn.Linear(4, 4), nn.Linear(4, 8)], 80), ([], None)])
def test_zero_3_gathers_two_layers_where_the_model_names_them(layers, live):
    lm = SimpleNamespace(layers=layers, parameters=nn.ModuleList(layers).parameters)
    zero = derive(validate({"output_dir": "run"}), 2, lm)["zero_optimization"]
    assert zero.get("stage3_max_reuse_distance") == live
