"""The C++ kernels under the address and undefined-behaviour sanitizers, on buffers of exactly the promised size."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "planish" / "kernels" / "csrc"


@pytest.mark.slow
def test_w4a16_touches_no_byte_that_is_not_its_own(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "sanitized"
    build = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build += [
        f"-I{SOURCES}",
        str(HERE / "w4a16_sanitized.cpp"),
        *(str(SOURCES / f"{name}.cpp") for name in ("isa", "pool", "w4a16")),
        "-o",
        str(program),
        "-lpthread",
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    run = subprocess.run([program, "300"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "clean\n"
