"""fastft: move what a prompt teaches into a few trained parameters."""

__version__ = "0.1.0"
