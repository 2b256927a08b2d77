"""The libraries' chatter. Called before torch and transformers are imported, which read some of this then."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet() -> None:
    """Keep the libraries' chatter out of the run's output; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch  # reads TQDM_DISABLE

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # told, DeepSpeed does not warn that it had to guess
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers)\..*")
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
