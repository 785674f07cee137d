"""A small model, methods of every kind and interrupted runs: the tests of the journal load this file by its path."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from planish.quant import Affine, Dual, Journal, QLinear, quantize, rtn
from planish.quant.methods.smoothquant_plus import smoothquant_plus
from planish.quant.transforms import Chain, Scale, Shift


class Mix(nn.Module):
    """A block whose norm absorbs scales; its second layer keeps its bias and its input cannot be folded."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Mix() for _ in range(blocks))
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Online:
    """Shift and scale every input, which nothing can absorb."""

    def __call__(self, site, method):
        channels = site.moments.amax
        return Chain(Shift(0.1 * site.moments.mean_abs + 0.01), Scale(channels.clamp(min=0.1)))


@dataclass(frozen=True)
class Branch:
    """Round beside a float branch of rank 2."""

    def __call__(self, site, method):
        made = {}
        for name, weight in site.weights.items():
            down, up = weight[:2].float(), torch.full((weight.shape[0], 2), 0.01)
            bias = site.consumers[name].bias
            encoded = method.weight.encode(weight - up @ down)
            made[name] = QLinear.of(encoded, bias, transform=site.online, act=method.act, low_rank=(down, up))
        return made


METHODS = {
    "rtn": rtn(group_size=32),
    "symmetric": rtn(bits=3, group_size=None, symmetric=True),
    "smooth": smoothquant_plus(0.5, group_size=32),
    "search": smoothquant_plus(group_size=32),
    "online": replace(rtn(group_size=32), transform=Online(), online=True),
    "act": replace(rtn(group_size=32), act=Dual(8)),
    "act online": replace(rtn(group_size=32), act=Affine(8, None), transform=Online(), online=True),
    "branch": replace(rtn(group_size=32), round=Branch()),
    "float feed": replace(smoothquant_plus(0.5, group_size=32), feed="float"),
}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype).eval().requires_grad_(False)


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (2, 16), generator=generator) for _ in range(2)]


class StopError(Exception):
    pass


def stop_after(blocks, stage="quantize"):
    def progress(at, done, total):
        if at.startswith(stage) and done == blocks:
            raise StopError

    return progress


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def interrupted(path, method, blocks, dtype=torch.float32, stage="quantize"):
    with pytest.raises(StopError):
        quantize(net(dtype), batches(), method, progress=stop_after(blocks, stage), journal=Journal(path))
