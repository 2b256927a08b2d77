"""Thin driver of CMake + Ninja: everything about the build itself is in CMakeLists.txt.

pip install .                          a wheel (add --no-build-isolation to build against the installed torch)
pip install -e .                       editable
python setup.py build_ext --inplace    into fastft/, incrementally

Environment: FASTFT_CUDA, FASTFT_CUDA_ARCHS, FASTFT_CUTLASS, CUTLASS_DIR, FASTFT_WERROR (see CMakeLists.txt), MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self):
        package = Path(self.get_ext_fullpath("fastft._build")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        # One folder per interpreter: object files are reused by the next build, whichever command starts it.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # The interpreter's own cmake and ninja first: an older one may come first on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise SystemExit("fastft: cmake was not found; pip install cmake ninja pybind11")
        options = [f"-DPython_EXECUTABLE={sys.executable}"]
        for name in ("FASTFT_CUDA", "FASTFT_CUDA_ARCHS", "FASTFT_CUTLASS", "CUTLASS_DIR", "FASTFT_WERROR"):
            # Unset goes back to the default, whatever an earlier configure has cached.
            options.append(f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options], check=True, env=env)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True, env=env)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True, env=env)

    def get_outputs(self):
        package = Path(self.get_ext_fullpath("fastft._build")).parent
        return [self.get_ext_fullpath("fastft._build"), str(package / "_C_fastft.so")]


setup(
    ext_modules=[Extension("fastft._build", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
