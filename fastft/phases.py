"""The phases of an optimizer step, by the names of their ranges in a trace."""

# Range -> title; what is in none of them is `other`.
PHASES = {
    "data": "data",
    "sample": "on-policy sampling",
    "teach": "teacher in the step",
    "forward": "forward",
    "loss": "head and loss",
    "backward": "backward",
    "recompute": "recompute",
    "optimizer": "optimizer",
    "communication": "communication",
    "other": "rest of the loop",
}
PREFIX = "fastft."
