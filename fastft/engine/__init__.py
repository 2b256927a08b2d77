"""DeepSpeed, the training loop, checkpoints, metrics. The only place that imports deepspeed."""
