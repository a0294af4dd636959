"""What pyproject.toml cannot say: a wheel brings the C++ kernels, compiled for AVX2, for machines
without a compiler.
"""

import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

MARCH = {"x86_64": "x86-64-v3", "AMD64": "x86-64-v3", "aarch64": "armv8-a", "arm64": "armv8-a"}


class BuildKernels(build_py):
    """Nothing fails without a compiler: the package then runs on torch alone."""

    def run(self) -> None:
        super().run()
        compiler, march = (
            shutil.which("g++") or shutil.which("clang++"),
            MARCH.get(platform.machine()),
        )
        if compiler and march and not self.editable_mode:
            out = Path(self.build_lib, "flashdraft", "models", "csrc", "step.so")
            flags = [
                "-O3",
                f"-march={march}",
                "-fno-signed-zeros",
                "-pthread",
                "-fPIC",
                "-shared",
                "-std=c++17",
                "-w",
            ]
            sources = map(str, Path("flashdraft/models/csrc").glob("*.cpp"))
            subprocess.run([compiler, *flags, *sources, "-o", str(out)], check=False)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # the wheel is this platform's own


setup(cmdclass={"build_py": BuildKernels}, distclass=PlatformDistribution)
