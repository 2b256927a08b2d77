"""What a run will take before it is started: bytes by part and phase, seconds by part, and what to change."""

from fastft.memory import resident_at_start
from fastft.plan.hardware import Device, this_device, unknown_gpu
from fastft.plan.planner import Plan, Planner, planned, planner
from fastft.plan.workload import Workload, counted

resident_at_start()  # before a caller has loaded anything
__all__ = ["Device", "Plan", "Planner", "Workload", "counted", "planned", "planner", "this_device", "unknown_gpu"]
