"""What the ops refuse, what `backends()` tells, and what happens without the compiled module."""

import os
import re
import subprocess
import sys

import pytest
import torch

from planish import _support, kernels
from planish.kernels import cpu, ops

_X = torch.ones(2, 20)
_PACKED = torch.zeros(6, 3, dtype=torch.int32)
_SCALE = torch.ones(6, 3)
_ZERO = torch.zeros(6, 3, dtype=torch.uint8)


def w4a16(x=_X, packed=_PACKED, scale=_SCALE, zero=_ZERO, bias=None, bits=4, group_size=8, activation_bits=None):
    return kernels.w4a16(
        x, packed, scale, zero, bias, bits=bits, group_size=group_size, activation_bits=activation_bits
    )


def qgemm(xq=torch.ones(2, 20, dtype=torch.int8), x_scale=torch.ones(2, 1), zero=_ZERO, **kwargs):  # noqa: B008
    return kernels.qgemm(xq, x_scale, _PACKED, _SCALE, zero, **{"bits": 4, "group_size": 8, **kwargs})


_REFUSED = [
    (lambda: w4a16(x=_X.int()), "w4a16: `x` must be float32, bfloat16, float16 or float64; got torch.int32."),
    (lambda: w4a16(x=torch.ones(())), "w4a16: `x` must be a tensor of at least one channel; got ()."),
    (lambda: w4a16(x=torch.ones(2, 25)), "w4a16: `packed` must be of shape (6, 4); got (6, 3)."),
    (lambda: w4a16(packed=_PACKED.long()), "`packed` must be an int32 matrix (out, words); got (torch.int64, (6, 3))."),
    (lambda: w4a16(scale=_SCALE[:, :2]), "w4a16: `scale` must be of shape (6, 3); got (6, 2)."),
    (
        lambda: w4a16(scale=_SCALE.int()),
        "w4a16: `scale` must be float32, bfloat16, float16 or float64; got torch.int32.",
    ),
    (lambda: w4a16(zero=_ZERO.char()), "w4a16: `zero` must be uint8; got torch.int8."),
    (lambda: w4a16(zero=_ZERO[:5]), "w4a16: `zero` must be of shape (6, 3); got (5, 3)."),
    (lambda: w4a16(bias=torch.ones(5)), "w4a16: `bias` must be of shape (6,); got (5,)."),
    (lambda: w4a16(bits=9), "w4a16: `bits` must be an int in [1, 8]; got 9."),
    (lambda: w4a16(activation_bits=7), "w4a16: `activation_bits` must be None, 16 or 8; got 7."),
    (lambda: w4a16(group_size=0), "w4a16: `group_size` must be an int >= 1; got 0."),
    (lambda: w4a16(scale=_SCALE.to("meta")), "w4a16: `scale` must be on cpu like the input; got 'meta'."),
    (lambda: kernels.quantize_rows(_X, bits=1), "quantize_rows: `bits` must be an int in [2, 8]; got 1."),
    (lambda: kernels.quantize_rows(_X.int()), "quantize_rows: `x` must be float32, bfloat16, float16 or float64; got"),
    (lambda: kernels.quantize_rows(_X, clip=0.0), "quantize_rows: `clip` must be a float in (0, 1]; got 0.0."),
    (lambda: kernels.quantize_rows(_X, group_size=0), "`group_size` must be None or an int >= 1; got 0."),
    (
        lambda: kernels.quantize_rows(_X, scale_dtype=torch.float64),
        "quantize_rows: `scale_dtype` must be float32, bfloat16 or float16; got torch.float64.",
    ),
    (lambda: kernels.quantize_rows(torch.ones(2, 0)), "`x` must be a tensor of at least one channel; got (2, 0)."),
    (lambda: qgemm(bias=torch.ones(6).to("meta")), "qgemm: `bias` must be on cpu like the input; got 'meta'."),
    (lambda: qgemm(x_scale=torch.ones(2, 1).int()), "qgemm: `x_scale` must be float32, bfloat16, float16 or float64;"),
    (
        lambda: qgemm(x=_X.to("meta"), down=torch.ones(2, 20), up=torch.ones(6, 2)),
        "qgemm: `x` must be on cpu like the input; got 'meta'.",
    ),
    (lambda: kernels.rotate(_X, torch.ones(4, 5, 5).to("meta")), "`blocks` must be on cpu like the input; got 'meta'."),
    (lambda: qgemm(xq=_X), "qgemm: `xq` must be int8; got torch.float32."),
    (lambda: qgemm(x_scale=torch.ones(2, 3)), "qgemm: `x_scale` must be of shape (2, 1); got (2, 3)."),
    (lambda: qgemm(x_zero=torch.ones(2, 1)), "qgemm: `x_zero` must be int8; got torch.float32."),
    (lambda: qgemm(x_group_size=0), "qgemm: `x_group_size` must be None or an int >= 1; got 0."),
    (lambda: qgemm(dtype=torch.int8), "qgemm: `dtype` must be float32, bfloat16, float16 or float64; got torch.int8."),
    (lambda: qgemm(x=_X), "qgemm: `down, up, x` must be all given or all None; got [False, False, True]."),
    (
        lambda: qgemm(x=_X, down=torch.ones(2, 20), up=torch.ones(6, 3)),
        "qgemm: `up` must be of shape (6, 2); got (6, 3).",
    ),
    (lambda: kernels.rotate(_X, torch.ones(4, 5, 4)), "`blocks` must be of shape (count, size, size); got (4, 5, 4)."),
    (lambda: kernels.rotate(_X, torch.ones(3, 5, 5)), "`blocks` must be blocks that cover 20 channels; got (3, 5, 5)."),
    (
        lambda: kernels.rotate(_X, torch.ones(4, 5, 5), torch.ones(20)),
        "rotate: `index` must be int64 or int32; got torch.float32.",
    ),
    (
        lambda: kernels.rotate(_X, torch.ones(4, 5, 5), torch.arange(19)),
        "rotate: `index` must be of shape (20,); got (19,).",
    ),
]


@pytest.mark.refuses
@pytest.mark.parametrize("call", [c for c, _ in _REFUSED], ids=[m for _, m in _REFUSED])
def test_bad_arguments_are_refused_in_one_sentence(call, request):
    sentence = dict(zip((c for c, _ in _REFUSED), (m for _, m in _REFUSED), strict=True))[call]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_an_index_out_of_range_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        kernels.rotate(_X, torch.ones(4, 5, 5), torch.full((20,), 20))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        kernels.rotate(_X, torch.ones(4, 5, 5), torch.full((20,), -1))


def test_every_op_has_a_row_of_its_own_in_backends():
    rows = kernels.backends()
    assert {row.op for row in rows if row.device == "any"} == {"w4a16", "quantize_rows", "qgemm", "rotate"}
    fast = [row for row in rows if row.device == "cpu" and row.op != "decoder"]
    assert {row.op for row in fast} == {"w4a16", "quantize_rows", "qgemm", "rotate"}
    (whole,) = [row for row in rows if row.op == "decoder"]
    assert whole.kernel == ("absent" if cpu.absence else f"compiled ({cpu.isa})")
    assert {row.kernel.split(",")[0] for row in fast} == {"reference" if cpu.absence else f"compiled ({cpu.isa})"}


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only where CI=true must the compiled module be there")
def test_the_compiled_module_is_there():
    assert not cpu.absence, cpu.absence


def test_without_the_compiled_module_one_warning_and_the_same_numbers(monkeypatch):
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    expected = ops.w4a16_reference(x, _PACKED, _SCALE, _ZERO + 3, None, bits=4, group_size=8)
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "absence", "No module named 'planish._native'")
    monkeypatch.setattr(_support, "_warned", set())
    with pytest.warns(_support.PlanishWarning, match="the compiled module is absent") as caught:
        y = [w4a16(x=x, zero=_ZERO + 3) for _ in range(2)]
    assert len(caught) == 1
    assert torch.equal(y[0], expected)
    assert torch.equal(y[1], expected)
    assert kernels.backends()[0].kernel == "reference"
    assert "No module named" in kernels.backends()[0].why
    with pytest.raises(ImportError, match="the compiled module is absent"):
        cpu.run_w4a16(x, _PACKED, _SCALE, _ZERO, None, group_size=8, instructions="portable")


@pytest.mark.parametrize(
    "run",
    [
        lambda: kernels.quantize_rows(_X, bits=4, group_size=7)[0],
        lambda: qgemm(dtype=torch.float64),
        lambda: qgemm().double(),
        lambda: kernels.rotate(_X, torch.ones(4, 5, 5), torch.arange(19, -1, -1)),
    ],
    ids=["quantize_rows", "qgemm, float64", "qgemm", "rotate"],
)
def test_without_the_compiled_module_the_other_ops_warn_once_and_give_the_same(run, monkeypatch):
    expected = run()
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(_support, "_warned", set())
    with pytest.warns(_support.PlanishWarning, match="the compiled module is absent") as caught:
        results = [run() for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(bool(cpu.absence), reason="the compiled module is absent")
@pytest.mark.parametrize("name", ["portable", "sse9"])
def test_the_environment_may_name_the_instruction_set(name):
    program = "from planish.kernels import cpu; print(cpu.isa)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PLANISH_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "portable":
        assert run.stdout.strip() == name, run.stderr
    else:
        assert "planish.kernels: `PLANISH_ISA` must be one of portable" in run.stderr


@pytest.mark.skipif(bool(cpu.absence), reason="the compiled module is absent")
def test_an_instruction_set_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set sse9"):
        cpu.run_w4a16(_X, _PACKED, _SCALE, _ZERO, None, group_size=8, instructions="sse9")
