"""The suite of equal bytes: what is compared has the same bytes, and every way of quantizing in it runs."""

import pytest
import torch
from torch import nn

from benchmarks import branches
from planish.quant import QLinear, quantize

LADDER = branches.Ladder(3, 16, 32)


@pytest.mark.parametrize("pair", branches.PAIRS)
def test_a_branch_takes_the_bytes_that_smaller_groups_would(pair):
    def run(make, group_size, budget):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        quantize(model, [torch.randn(64, 64)], make(LADDER.bits, group_size, budget))
        layers = [m for m in model if isinstance(m, QLinear)]
        return sum(t.nbytes for m in layers for t in m.state_dict().values()), any(m.down is not None for m in layers)

    plain, branched = branches.PAIRS[pair]
    (fine, _), (coarse, _) = run(plain, LADDER.fine, 0), run(plain, LADDER.coarse, 0)
    size, there = run(branched, LADDER.coarse, fine - coarse)
    one_rank = 2 * (64 + 64)
    assert there and fine - one_rank < size <= fine


def test_the_rows_of_a_ladder():
    class Bench:
        calibration = evaluation = type("Windows", (), {"source": "a text"})()
        runs = iter([(0.5, 3_000_000), (0.75, 2_000_000), (0.25, 2_900_000)])

        def run(self, method):
            kl, size = next(self.runs)
            scores = {name: torch.full((4,), kl) for name in ("nll", "kl", "top1", "hidden")}
            return scores, size, 1.0

    rows = list(branches._ladder(Bench(), LADDER, ("rtn",)))
    [gap] = [r for r in rows if r.metric == "kl difference"]
    assert gap.value == -0.25 and gap.subject == "rtn, groups of 32 and a branch"
    assert {r.subject: r.value for r in rows if r.metric == "size"} == {
        "rtn, groups of 16": 3.0, "rtn, groups of 32": 2.0, "rtn, groups of 32 and a branch": 2.9,
    }  # fmt: skip
