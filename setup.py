"""Compile the native parts this machine can compile; impure_fast/_build.json tells what came of each.

IMPURE_FAST_BUILD=auto (default) builds what it can, none nothing, cpu the CPU part, cuda all parts.
A demanded part (cpu; cpu and cuda) that cannot be built ends the installation.
"""

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

SOURCES = {  # part: its binding, its kernels
    "cpu": ("csrc/bindings/ops_cpu.cpp", "csrc/cpu/*.cpp"),
    "cuda": ("csrc/bindings/ops_cuda.cpp", "csrc/cuda/*.cu"),
    "info": ("csrc/bindings/info.cpp",),
}
DEMANDS = {"auto": (), "none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}
MODE = os.environ.get("IMPURE_FAST_BUILD", "auto")
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
JOB_MEMORY = 2 << 30  # bytes that one compiler may take


def why_not(part):
    """Why a part cannot be built here, in a sentence; "" if nothing stands in the way."""
    if MODE == "none" or (MODE == "cpu" and part == "cuda"):
        return f"Left out by IMPURE_FAST_BUILD={MODE}."
    if not os.path.exists(SOURCES[part][0]):
        return f"There is no source for it ({SOURCES[part][0]})."
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        return "There is no C++ compiler (c++, or what CXX names); install one or set CXX."
    try:
        module = import_module("pybind11" if part == "info" else "torch")
    except ImportError as error:
        return f"{error}: install it first, then this package with --no-build-isolation."
    if part == "cuda":
        if module.version.cuda is None:
            return f"torch {module.__version__} is built without CUDA."
        # torch guesses CUDA_HOME from nvcc, which may be a wrapper script far from the libraries.
        homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
        home = next((home for home in homes if any(Path(home, "lib64").glob("libcudart*"))), None)
        if home is None:
            return f"There is no CUDA toolkit (lib64/libcudart*) in {' or '.join(homes)}; set CUDA_HOME."
        os.environ["CUDA_HOME"] = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return ""


def jobs():
    """Compilers at once: one a core, as far as four fifths of the free memory goes."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows has none
        return 1
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, free * 4 // 5 // JOB_MEMORY))


def extension(part):
    files = [file for pattern in SOURCES[part] for file in sorted(map(str, Path().glob(pattern)))]
    include = [os.path.abspath("csrc")]
    if part == "info":
        include += [import_module("pybind11").get_include()]
        return Extension("impure_fast._info", files, include_dirs=include, extra_compile_args=FLAGS)
    torch_build = import_module("torch.utils.cpp_extension")
    make, more = (torch_build.CUDAExtension, ["-DUSE_CUDA"]) if part == "cuda" else (torch_build.CppExtension, [])
    # A square root that may set errno would keep its loop out of vectors.
    flags = {"cxx": [*FLAGS, *more, "-fno-math-errno"], "nvcc": FLAGS + more}
    return make(f"impure_fast._{part}", files, include_dirs=include, extra_compile_args=flags, py_limited_api=True)


if MODE not in DEMANDS:
    sys.exit(f"IMPURE_FAST_BUILD={MODE} is not known; use one of {', '.join(DEMANDS)}.")
reasons = {part: why_not(part) for part in SOURCES}
for part in DEMANDS[MODE]:
    if reasons[part]:
        sys.exit(f"IMPURE_FAST_BUILD={MODE} demands the {part} part. {reasons[part]}")
if "torch" in sys.modules:
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    build_ext = import_module("torch.utils.cpp_extension").BuildExtension


class BuildParts(build_ext):
    def build_extensions(self):
        planned = self.extensions
        for part in planned:  # one by one, so that under "auto" a failure costs that part alone
            self.extensions, name = [part], part.name.removeprefix("impure_fast._")
            try:
                super().build_extensions()
            except Exception as error:
                if name in DEMANDS[MODE]:
                    raise
                reasons[name] = f"It does not compile: {error}"
                part.optional = True  # nobody then asks for its file
        self.extensions = planned

    def run(self):
        super().run()
        built = [part for part in reasons if not reasons[part]]
        report: dict = {"mode": MODE, "built": built, "not_built": {part: why for part, why in reasons.items() if why}}
        if built:
            report["flags"] = FLAGS
        if "torch" in sys.modules:
            report["torch"] = sys.modules["torch"].__version__
        if "cuda" in built:
            report["cuda_architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
        path = Path("." if self.inplace else self.build_lib, "impure_fast", "_build.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


# With nothing to compile build_ext runs all the same: it writes the report.
build.sub_commands = [(name, None if name == "build_ext" else when) for name, when in build.sub_commands]
setup(ext_modules=[extension(part) for part in SOURCES if not reasons[part]], cmdclass={"build_ext": BuildParts})
