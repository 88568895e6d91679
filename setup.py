"""Build of the native kernels (nanobind); everything else about the package is in pyproject.toml.

The extension is optional: without a working C++ compiler the package installs all the same and runs
on the NumPy/torch oracles. SCONE_SANITIZE=1 builds it with ASan and UBSan (docs/lookup.md).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class ParallelBuild(build_ext):
    """Compiles the sources of an extension side by side, where setuptools takes one after the other."""

    def build_extension(self, ext: Extension) -> None:
        compile_in_turn = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_in_turn([source], **options), sources))
            return [name for names in objects for name in names]

        self.compiler.compile = compile_side_by_side
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_in_turn


setup(
    cmdclass={"build_ext": ParallelBuild},
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
    ],
)
