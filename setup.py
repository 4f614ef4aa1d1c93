"""The compiled ops; everything else about the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

# with gcc the library shares torch's threads: both ask for libgomp by the same name
openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []

setup(
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
    ]
)
