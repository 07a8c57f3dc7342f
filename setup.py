"""The compiled CPU backend; everything else about the package is in pyproject.toml.

Each instruction set is compiled from its own file with its own flags, and the fastest one the processor has
is chosen when the library runs: one wheel fits every x86-64. Without a compiler the package installs as pure
Python.
"""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = ["bindings", "cpu_features", "threads", "ranks", "matching", "portable"]
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx2",
    "-mfma",
    "-mprefer-vector-width=512",
]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-pthread",
]
SANITIZE = os.environ.get("RESIDUAL_KERNELS_SANITIZE")  # what -fsanitize= takes; see `make sanitize`
if SANITIZE:
    # Every set's loops then run on any processor, with the vectors the compiler makes of them.
    X86_FLAGS = {name: [] for name in X86_FLAGS}
    FLAGS += [
        "-DEMULATE",
        "-O1",
        f"-fsanitize={SANITIZE}",
        "-fno-omit-frame-pointer",
        "-fno-sanitize-recover=undefined",
    ]


class BuildExtension(build_ext):
    """Gives the file of an instruction set its flags,
    and says in one line when there is no compiler to use."""

    def build_extension(self, extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(output, source, suffix, arguments, postargs, options):
            name = os.path.splitext(os.path.basename(source))[0]
            compile_one(output, source, suffix, arguments, [*postargs, *X86_FLAGS.get(name, [])], options)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(extension)
        except (
            Exception
        ) as error:  # a compiler can fail in as many ways as there are compilers; the package works without
            if SANITIZE:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(
                f"residual_kernels: the CPU extension was not built ({reason}); installing without it, "
                "the torch backend computes instead",
                file=sys.stderr,
            )


def extensions() -> list[Pybind11Extension]:
    if sys.platform == "win32":
        return []  # the loops use the vector types of GCC and Clang; Windows runs the torch backend
    return [
        Pybind11Extension(
            "residual_kernels._cpp",
            [f"csrc/{name}.cpp" for name in [*SOURCES, *(X86_FLAGS if X86 else [])]],
            depends=[str(header) for header in Path("csrc").glob("*.h")],
            define_macros=[("WITH_X86_KERNELS", "1")] if X86 else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])],
            cxx_std=17,
            optional=True,
        )
    ]


ParallelCompile().install()  # the files of an extension at once, on all cores
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
