"""PyTorch's own conformance test of custom operators, on all four ops."""

import pytest
import torch

from planish import kernels

_EMPTY = torch.Generator().manual_seed(0)
_PACKED = torch.randint(-(2**31), 2**31, (6, 3), generator=_EMPTY).to(torch.int32)
_SCALE = torch.rand(6, 3, generator=_EMPTY)
_ZERO = torch.randint(0, 16, (6, 3), generator=_EMPTY).to(torch.uint8)
_X = torch.randn(2, 5, 20, generator=_EMPTY)
_XQ = torch.randint(-128, 128, (2, 5, 20), generator=_EMPTY).to(torch.int8)
_BRANCH = {
    "x_zero": torch.ones(2, 5, 2, dtype=torch.int8),
    "x_group_size": 10,
    "down": torch.randn(2, 20, generator=_EMPTY),
    "up": torch.randn(6, 2, generator=_EMPTY),
    "x": _X,
    "dtype": torch.bfloat16,
}
_PLAIN = {"x_zero": None, "x_group_size": None, "down": None, "up": None, "x": None, "dtype": torch.float32}
_CASES = {
    "w4a16": ("w4a16", (_X, _PACKED, _SCALE, _ZERO, torch.ones(6)), {"bits": 4, "group_size": 8}),
    "w4a16, half": ("w4a16", (_X.half(), _PACKED, _SCALE, _ZERO, None), {"bits": 4, "group_size": 8}),
    "quantize_rows": ("quantize_rows", (_X,), {
        "bits": 8, "group_size": 7, "symmetric": False, "scale_dtype": torch.float16,
    }),
    "qgemm": ("qgemm", (_XQ, _SCALE[:2, None, :1].expand(2, 5, 1), _PACKED, _SCALE, _ZERO, None), {
        "bits": 4, "group_size": 8, **_PLAIN,
    }),
    "qgemm, branch": ("qgemm", (_XQ, torch.ones(2, 5, 2), _PACKED, _SCALE, _ZERO, torch.ones(6)), {
        "bits": 4, "group_size": 8, **_BRANCH,
    }),
    "rotate": ("rotate", (_X, torch.randn(4, 5, 5, generator=_EMPTY), torch.randperm(20, generator=_EMPTY)), {}),
    "rotate, in place": ("rotate", (_X, torch.eye(10).repeat(2, 1, 1), None), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_opcheck(case):
    op, args, kwargs = _CASES[case]
    torch.library.opcheck(getattr(torch.ops.planish, op).default, args, kwargs)


@pytest.mark.slow
def test_the_ops_survive_torch_compile_in_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x):
        return kernels.w4a16(x, _PACKED, _SCALE, _ZERO, bits=4, group_size=8)

    for rows in (2, 3):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(run(x), kernels.w4a16(x, _PACKED, _SCALE, _ZERO, bits=4, group_size=8))
