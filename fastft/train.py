"""deepspeed fastft/train.py --cfg FILE [key.sub=value ...]"""

import os
import sys

# `deepspeed fastft/train.py` puts this folder first on sys.path: the package's own modules must not shadow others, and
# the package itself must be importable from a checkout.
_here = os.path.dirname(os.path.abspath(__file__))
if sys.path and os.path.abspath(sys.path[0]) == _here:
    sys.path[0] = os.path.dirname(_here)

from fastft.__main__ import command  # noqa: E402

if __name__ == "__main__":
    command(["train", *sys.argv[1:]])
