"""One product y = x W^T with the same 4-bit weight, by planish and by whoever else can do it in this process.

Each maker takes the problem and the number of a copy, and returns a call without arguments; copies hold the same values
in memory of their own. A maker raises ImportError where its package is absent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Problem:
    """Codes, scales and zero points of one matrix, an activation, and the exact result."""

    def __init__(self, n: int, k: int, m: int, group: int, threads: int, copies: int = 1) -> None:
        self.n, self.k, self.m, self.group, self.threads, self.copies = n, k, m, group, threads, copies
        g = torch.Generator().manual_seed(0)
        self.codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        # of both float16 and bfloat16, so that no rival loses anything in its own dtype
        self.scale = (torch.rand(n, k // group, generator=g) / 100 + 0.01).bfloat16().float()
        self.zero = torch.randint(4, 12, (n, k // group), generator=g, dtype=torch.uint8)
        self.x = torch.randn(m, k, generator=g)
        spread = self.zero.repeat_interleave(group, 1)
        self.weight = (self.codes.float() - spread.float()) * self.scale.repeat_interleave(group, 1)
        self.exact = self.x.double() @ self.weight.double().T

    def error(self, y: object) -> float:
        """The error's norm over the result's."""
        y = torch.as_tensor(y).double().reshape(self.exact.shape)
        return float((y - self.exact).norm() / self.exact.norm())

    def bytes_of_codes(self) -> Tensor:
        """(N, K/2), the first of two codes in the low half."""
        return self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)

    def prepared_bytes(self) -> int:
        """What planish reads of memory for one product."""
        from planish.kernels import cpu  # noqa: PLC0415

        size: int = cpu._native.prepared_bytes(self.n, self.k, self.group, 1, True)  # type: ignore[union-attr]
        return size

    def read_bytes(self) -> int:
        """What one call of the plain read touches."""
        return self.prepared_bytes()


def _planish(bits: int | None) -> Callable[[Problem, int], Callable[[], Tensor]]:
    def make(p: Problem, copy: int) -> Callable[[], Tensor]:
        from planish import kernels  # noqa: PLC0415

        packed = p.bytes_of_codes().contiguous().view(torch.int32).clone()
        scale, zero = p.scale.half(), p.zero.clone()
        return lambda: kernels.w4a16(p.x, packed, scale, zero, bits=4, group_size=p.group, activation_bits=bits)

    return make


def _read(p: Problem, copy: int) -> Callable[[], int]:
    from planish.kernels import cpu  # noqa: PLC0415

    data = torch.zeros(p.read_bytes(), dtype=torch.uint8)
    read = cpu._native.read  # type: ignore[union-attr]
    return lambda: int(read(data.data_ptr(), data.numel(), p.threads))


def _torch(dtype: torch.dtype) -> Callable[[Problem, int], Callable[[], Tensor]]:
    def make(p: Problem, copy: int) -> Callable[[], Tensor]:
        weight, x = p.weight.to(dtype).clone(), p.x.to(dtype)
        return lambda: F.linear(x, weight)

    return make


def _aten(p: Problem, copy: int) -> Callable[[], Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(p.codes.int(), 1)
    shifted = ((8 - p.zero.float()) * p.scale).T  # the op's zero point is a float, of code 8
    both = torch.stack([p.scale.T, shifted], -1).bfloat16().contiguous()
    x = p.x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, p.group, both)


def _onnxruntime(level: int) -> Callable[[Problem, int], Callable[[], Any]]:
    def make(p: Problem, copy: int) -> Callable[[], Any]:
        import numpy as np  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
        from onnx import TensorProto, helper  # noqa: PLC0415

        blocks = p.k // p.group
        zero = np.pad(p.zero.numpy(), ((0, 0), (0, blocks % 2)))
        parts = {
            "B": (TensorProto.UINT8, p.bytes_of_codes().numpy().reshape(p.n, blocks, p.group // 2)),
            "S": (TensorProto.FLOAT, p.scale.numpy().reshape(-1)),
            "Z": (TensorProto.UINT8, (zero[:, 0::2] | (zero[:, 1::2] << 4)).reshape(-1)),
        }
        node = helper.make_node(
            "MatMulNBits", ["A", *parts], ["Y"], domain="com.microsoft", K=p.k, N=p.n, bits=4, block_size=p.group,
            accuracy_level=level,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", p.k])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", p.n])],
            [helper.make_tensor(name, kind, a.shape, a.tobytes(), raw=True) for name, (kind, a) in parts.items()],
        )
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = p.threads
        # copies take turns on the same cores: a copy's threads must not spin while another's work
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if p.copies == 1 else "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"A": p.x.numpy()}
        return lambda: session.run(None, feed)[0]

    return make


def _openvino(p: Problem, copy: int) -> Callable[[], Any]:
    import numpy as np  # noqa: PLC0415
    import openvino  # noqa: PLC0415
    from openvino import opset13 as op  # noqa: PLC0415

    blocks = p.k // p.group
    alive = []  # a constant made of a tensor shares its memory and does not hold it

    def four_bits(values: Tensor, shape: list[int]) -> Any:  # noqa: ANN401
        flat = values.reshape(-1)
        data = (flat[0::2] | (flat[1::2] << 4)).numpy()
        alive.append(data)
        return op.constant(openvino.Tensor(data, openvino.Shape(shape), openvino.Type.u4))

    x = op.parameter([-1, p.k], np.float32)
    half = openvino.Type.f16
    codes = op.convert(four_bits(p.codes, [p.n, blocks, p.group]), half)
    zero = op.convert(four_bits(p.zero, [p.n, blocks, 1]), half)
    alive.append(p.scale.half().numpy().reshape(p.n, blocks, 1))
    scale = op.constant(alive[-1])
    weight = op.reshape(op.multiply(op.subtract(codes, zero), scale), np.array([p.n, p.k]), False)
    y = op.matmul(x, op.convert(weight, openvino.Type.f32), False, True)
    compiled = openvino.Core().compile_model(
        openvino.Model([y], [x]), "CPU", {"INFERENCE_NUM_THREADS": p.threads, "NUM_STREAMS": 1}
    )
    request = compiled.create_infer_request()
    feed = p.x.numpy()

    def call(_: object = alive) -> Any:  # noqa: ANN401
        return request.infer([feed], share_inputs=True, share_outputs=True)[0]

    return call


READS = ("plain read",)
BULK = {"torch float32": 8, "torch bfloat16": 4}
SUBJECTS: dict[str, Callable[[Problem, int], Callable[[], object]]] = {
    "plain read": _read,
    "planish, 16-bit activations": _planish(16),
    "planish, 8-bit activations": _planish(8),
    "torch float32": _torch(torch.float32),
    "torch bfloat16": _torch(torch.bfloat16),
    "aten int4pack bfloat16": _aten,
    "onnxruntime MatMulNBits level 4": _onnxruntime(4),
    "onnxruntime MatMulNBits level 0": _onnxruntime(0),
    "openvino u4": _openvino,
}
