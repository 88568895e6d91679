"""Build of the native kernels (nanobind); everything else about the package is in pyproject.toml.

The extension is optional: without a working C++ compiler the package installs all the same and runs
on the NumPy/torch oracles. SCONE_SANITIZE=1 builds it with ASan and UBSan (docs/lookup.md).
"""

import os
from pathlib import Path

import nanobind
from setuptools import Extension, setup

ROOT = Path(__file__).parent
# -O1 after -O3: a build of half the time, and still the paths that the tests take
SANITIZERS = [
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
EXTRA = SANITIZERS if os.environ.get("SCONE_SANITIZE") == "1" else []
NANOBIND = Path(nanobind.source_dir()).parent

setup(
    ext_modules=[
        Extension(
            "scone.kernels._native",
            # nanobind's own sources come as one file made for such builds
            sources=[
                *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels/native").glob("*.cpp")),
                str(NANOBIND / "src/nb_combined.cpp"),
            ],
            depends=sorted(
                str(p.relative_to(ROOT))
                for p in (ROOT / "kernels/native").iterdir()
                if p.suffix in (".hpp", ".inl")
            ),
            include_dirs=[nanobind.include_dir(), str(NANOBIND / "ext/robin_map/include"), "kernels/native"],
            # No -march=native: one binary for all hosts, faster paths are chosen at run time.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-pthread",
                "-DNDEBUG",
                *EXTRA,
            ],
            extra_link_args=["-pthread", *EXTRA],
            optional=True,
        )
    ]
)
