"""The compiled ops; everything else about the package stands in pyproject.toml."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildAtOnce(build_ext):
    """Compiles the sources of an extension beside each other, as many as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], **how: Any) -> list[str]:
            with ThreadPoolExecutor(num_cores()) as pool:
                objects = pool.map(lambda source: compile_some([source], **how), sources)
                return [each for some in objects for each in some]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_some


# with gcc the library shares torch's threads: both ask for libgomp by the same name
openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []

setup(
    # elsewhere compilers that come up at the same time trip over each other
    cmdclass={} if sys.platform == "win32" else {"build_ext": BuildAtOnce},
    ext_modules=[
        Extension(
            "icecache.ops._native",
            sources=[
                f"src/icecache/ops/native/{name}.c"
                for name in (
                    *("search", "descend", "given", "row", "remainder", "step"),
                    *("dense", "decode", "path", "grow", "insert", "group", "pack"),
                    *("fill", "products", "distances", "wide"),
                    *("linear", "block", "forward", "team"),
                )
            ],
            depends=[
                f"src/icecache/ops/native/{name}.h"
                for name in (
                    *("layer", "vector", "search", "row", "remainder", "step", "insert", "decode"),
                    *("pages", "summary", "grow"),
                    *("nearest", "nearest_tile", "cut", "best", "above", "dots", "products"),
                    *("wide", "wide8", "wide16", "wide_body"),
                    *("linear", "block", "forward", "team"),
                )
            ],
            libraries=[] if sys.platform == "win32" else ["m"],
            # sums may be reordered and numbers are finite, so that loops become vector code
            extra_compile_args=[
                "-O3",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fassociative-math",
                "-fno-signed-zeros",
                "-ffinite-math-only",
                *openmp,
            ],
            extra_link_args=openmp,
            # without a compiler the same ops run in torch, and stats() says so
            optional=True,
        )
    ],
)
