"""Builds the emulator and calls the CUDA launchers on CPU tensors.

``csrc/cuda/*.cu`` are compiled as plain C++ against ``include/``; see ``emulator.cpp`` for what is watched. Adding an
op: its launcher in launchers.cpp and its structure in STRUCTURES, a structure within it as if its fields stood there.
"""

from __future__ import annotations

import ctypes as c
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.conftest import ROOT

HERE = Path(__file__).parent
OF_CUTLASS = "summed_products.cu"  # instructions of sm_90a, which nothing here has
FILES = [
    *sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.name != OF_CUTLASS),
    HERE / "faults.cu",
    HERE / "launchers.cpp",
    HERE / "emulator.cpp",
]
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-attributes", "-fno-extern-tls-init",
    "-D__CUDA_ARCH__=900", "-DFASTFT_TARGET=emulated",
    *(f"-I{path}" for path in (HERE / "include", ROOT / "csrc" / "include", ROOT / "csrc" / "cuda")),
]  # fmt: skip
# Without the sanitizers' libraries: emulator.cpp has the functions that they call.
WATCHED = [
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,null",
    "--param", "tsan-instrument-func-entry-exit=0", "-x", "c++",
]  # fmt: skip


def compiler() -> str | None:
    """GCC: others put other calls before accesses."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return found if "Free Software Foundation" in version else None


def build(compiler: str) -> Path:
    """The library, from build/ where these sources have been compiled before."""
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, *WATCHED]).encode())
    for path in [*sorted((ROOT / "csrc").rglob("*")), *sorted(HERE.rglob("*"))]:
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    library = folder / "emulated.so"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds
        if not library.exists():
            for old in folder.parent.glob("*/"):
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir()
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    folder = library.parent

    def compile_one(path: Path) -> str:
        out = str(folder / f"{path.name}.o")
        flags = WATCHED if path.suffix == ".cu" else []
        run([compiler, *FLAGS, *flags, "-c", str(path), "-o", out])
        return out

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, FILES))
    run([compiler, "-shared", "-Wl,-z,defs", *objects, "-o", f"{library}.part"])
    os.replace(f"{library}.part", library)


def structure(fields: str) -> type[c.Structure]:
    """A header's structure, its fields in their order: "name name: type name: type"."""
    types = {"ptr": c.c_void_p, "i64": c.c_int64, "i32": c.c_int32, "f64": c.c_double, "f32": c.c_float,
             "bool": c.c_bool}  # fmt: skip
    found = re.findall(r"([\w\s]+): (\w+)", fields)
    pairs = [(name, types[kind]) for names, kind in found for name in names.split()]
    return type("Args", (c.Structure,), {"_fields_": pairs})


STRUCTURES = {
    "log_softmax_kl": structure("""student teacher weights kl stats grad: ptr
        rows vocab student_stride teacher_stride grad_stride: i64 temperature beta: f64 direction dtype: i32"""),
    "log_softmax_kl_backward": structure("""grad_kl student teacher stats grad: ptr
        rows vocab student_stride teacher_stride: i64 temperature beta: f64 direction dtype: i32"""),
    "cross_entropy": structure("""logits labels nll: ptr rows vocab logits_stride ignore_index: i64
        write_grad: bool dtype: i32"""),
    "topk_kl": structure("""logits ids log_probs weights scratch kl: ptr rows vocab k logits_stride: i64
        temperature beta: f64 tail write_grad: bool direction dtype: i32"""),
    "index_check": structure("index: ptr count columns vocab ignore source: i64 record: ptr"),
    "relu": structure("x y mask: ptr count: i64 dtype: i32"),
    "relu_backward": structure("dy mask dx: ptr count: i64 dtype: i32"),
    "rms_norm": structure("x weight y rstd: ptr rows width: i64 eps: f64 dtype weight_dtype: i32"),
    "rms_norm_backward": structure("""dy x weight rstd dx partials dweight: ptr rows width: i64
        dtype weight_dtype: i32"""),
    "rotary": structure("""q y_q: ptr heads q_batch q_head q_token y_q_batch y_q_head y_q_token: i64
        k y_k: ptr kv_heads k_batch k_head k_token y_k_batch y_k_head y_k_token: i64
        cos sin: ptr cos_batch cos_token sin_batch sin_token batch tokens size rotated: i64 transposed: bool
        dtype angle_dtype: i32"""),
    "swiglu": structure("gate up y: ptr count: i64 dtype: i32"),
    "swiglu_backward": structure("dy gate up dgate dup: ptr count: i64 dtype: i32"),
    "row_reduce": structure("values weights out row_scale: ptr rows: i64 mean is_double: bool"),
    "dequantise_4bit": structure("""packed code absmax absmax8 absmax_code absmax_scale out: ptr
        first count block absmax_block: i64 absmax_offset: f32 dtype: i32"""),
    "dequantise_8bit": structure("values scale out: ptr rows K: i64 dtype: i32"),
    "lora_down": structure("""x a: ptr a_stride_0 a_stride_1: i64 u packed_a scratch: ptr
        M K r x_stride u_stride: i64 scaling: f64 dtype: i32"""),
    "lora_up": structure("""y u b: ptr b_stride_0 b_stride_1: i64 packed_b: ptr
        M N r y_stride u_stride: i64 dtype: i32"""),
    "lora_down_outer": structure("""y a: ptr a_stride_0 a_stride_1: i64 du u g scratch: ptr
        M N r y_stride du_stride u_stride: i64 scaling: f64 dtype: i32"""),
    "lora_outer": structure("""u y g: ptr g_stride_0 g_stride_1: i64 packed_u sums scratch: ptr
        M N r y_stride u_stride: i64 dtype: i32"""),
    "bias_adamw": structure("""params grads tensors device_tensors device_chunk_tensor groups: ptr
        count chunks group_count: i64 exp_avg exp_avg_sq scales master steps status partials tickets lr grad_scale
        found_inf: ptr total: i64 max_grad_norm: f64 skip_non_finite is_double: bool"""),
}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}


class Read:
    """A tensor that a kernel may only read."""

    def __init__(self, tensor):
        self.tensor = tensor


class Write(Read):
    """A tensor that a kernel fills, and may read where it has written."""


class Emulator:
    """The launchers. ``device`` and ``order`` hold for the launches behind them."""

    def __init__(self, library: Path):
        self.path = library
        self.library = c.CDLL(str(library))
        self.library.emulator_message.restype = self.library.fault_message.restype = c.c_char_p
        self.library.faulty.argtypes = [c.c_char_p, c.c_void_p, c.c_int64]

    def device(self, major: int, shared_per_block: int, shared_per_multiprocessor: int) -> None:
        sizes = c.c_int64(shared_per_block), c.c_int64(shared_per_multiprocessor)
        self.library.emulator_device(c.c_int(major), *sizes)

    def order(self, seed: int) -> None:
        """Threads and blocks from first to last (0), from last to first (1), or in any order."""
        self.library.emulator_order(c.c_uint64(seed))

    def name_buffer(self, name: str, argument) -> None:
        """Each contiguous row apart, so that what lies between rows is nobody's."""
        writable = not isinstance(argument, Read) or isinstance(argument, Write)
        tensor = argument.tensor if isinstance(argument, Read) else argument
        rows = tensor if tensor.dim() == 2 and not tensor.is_contiguous() else tensor.reshape(1, -1)
        for i, row in enumerate(rows):
            of = f"row {i} of {name}" if len(rows) > 1 else name
            self.library.emulator_buffer(
                of.encode(), c.c_size_t(row.data_ptr()), c.c_size_t(row.numel() * row.element_size()),
                c.c_int(writable), c.c_int(isinstance(argument, Write)),
            )  # fmt: skip

    def launch(self, op: str, buffers: dict | None = None, **arguments) -> None:
        """The launcher of an op. Tensors: as they are (read and written), Read or Write; the same tensor once.

        buffers: what the kernel reaches through pointers that are in none of its arguments.
        """
        values = STRUCTURES[op]()
        self.library.emulator_forget()
        known = set()
        for name, argument in {**(buffers or {}), **arguments}.items():
            tensor = argument.tensor if isinstance(argument, Read) else argument
            if torch.is_tensor(tensor):
                if tensor.data_ptr() not in known and tensor.numel() > 0:
                    self.name_buffer(name, argument)
                known.add(tensor.data_ptr())
                tensor = tensor.data_ptr()
            if name in arguments:
                setattr(values, name, tensor)
        if getattr(self.library, f"launch_{op}")(c.byref(values)):
            raise RuntimeError(self.explained(self.library.emulator_message().decode()))

    def faulty(self, kernel: str, buffer: torch.Tensor) -> None:
        self.library.emulator_forget()
        self.name_buffer("buffer", buffer)
        if self.library.faulty(kernel.encode(), buffer.data_ptr(), buffer.numel()):
            raise RuntimeError(self.explained(self.library.fault_message().decode()))

    def explained(self, message: str) -> str:
        """With the source's line in place of an address, where binutils are at hand."""
        address = re.search(r" \[(\+0x[0-9a-f]+)\]$", message)
        tool = shutil.which("addr2line")
        if not address or not tool:
            return message
        lines = subprocess.run(
            [tool, "-ie", str(self.path), address[1]], capture_output=True, text=True, check=False
        ).stdout.split()  # fmt: skip
        ours = [Path(line).name for line in lines if ":" in line]
        return message.replace(address[0], f" ({' <- '.join(ours[:4])})")
