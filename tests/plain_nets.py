"""Small models of plain torch modules, with no library at all, for tests of the engine.

Tests load this file by its path, since test folders are no packages:

    nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[n] / "plain_nets.py")))
"""

import torch
from torch import nn

from planish.quant.sites import find_sites
from planish.quant.stream import Stream

C = 32


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(act=nn.ReLU, depth=3, width=48, bias=True):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(C if i == 0 else width, width if i < depth - 1 else C, bias=bias), act()]
    return nn.Sequential(*layers[:-1]).eval()


class Attention(nn.Module):
    """A block of plain linears with a mask, a context by name, and a tuple as its answer."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(C), *(nn.Linear(C, C) for _ in range(4))
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.3 * noise(C, seed=1))
            self.norm.bias.copy_(noise(C, seed=2))

    def forward(self, hidden, attention_mask=None, bias=0.0):
        x = self.norm(hidden)
        score = self.q(x) @ self.k(x).mT / C**0.5 + bias
        if attention_mask is not None:
            score = score.masked_fill(~attention_mask[:, None].bool(), -1e9)
        return hidden + self.o(score.softmax(-1) @ self.v(x)), score


class Net(nn.Module):
    """Token ids, embedding, blocks in a list, head: with no library at all."""

    def __init__(self, tied=False, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, C)
        self.blocks = nn.ModuleList([Attention() for _ in range(depth)])
        self.lm_head = nn.Linear(C, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        bias = torch.ones(1, dtype=x.dtype) * 0.1
        for block in self.blocks:
            x, _ = block(x, attention_mask, bias=bias)
        return {"loss": None, "logits": self.lm_head(x)}


def ids(rows=2, length=7, seed=3):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def lines(model, batches):
    stream = Stream(model, batches)
    block = stream.block(0, stream.start())
    sites = find_sites(block, lambda name: False)
    return block, sites, [(s.kind, s.producer_name) for s in sites]
