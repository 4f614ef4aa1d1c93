"""The compiled ops; everything else about the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "icecache.ops._native",
            sources=[
                f"src/icecache/ops/native/{name}.c"
                for name in (
                    "search",
                    "given",
                    "step",
                    "path",
                    "grow",
                    "insert",
                    "group",
                    "pack",
                    "fill",
                )
            ],
            depends=[
                f"src/icecache/ops/native/{name}.h"
                for name in (
                    *("layer", "vector", "search", "pages", "summary", "grow"),
                    *("nearest", "nearest_tile", "cut", "best"),
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
            ],
            # without a compiler the same ops run in torch, and stats() says so
            optional=True,
        )
    ]
)
