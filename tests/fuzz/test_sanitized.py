"""The C++ kernels under the address and undefined-behaviour sanitizers, on buffers of exactly the promised size."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "planish" / "kernels" / "csrc"


_PROGRAMS = {
    "w4a16": (("isa", "pool", "w4a16"), 300),
    "smoothed": (("isa", "pool", "host_threads", "smoothed"), 150),
    "linear": (("isa", "pool", "read", "linear", "linear_avx2", "linear_avx512", "linear_neon"), 200),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", _PROGRAMS)
def test_a_kernel_touches_no_byte_that_is_not_its_own(program, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    names, rounds = _PROGRAMS[program]
    target = tmp_path / program
    build = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build += [f"-I{SOURCES}", str(HERE / f"{program}_sanitized.cpp"), *(str(SOURCES / f"{name}.cpp") for name in names)]
    subprocess.run([*build, "-o", str(target), "-lpthread", "-ldl"], check=True, capture_output=True, text=True)
    run = subprocess.run([target, str(rounds)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "clean\n"
