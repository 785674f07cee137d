"""SmoothECE adds up the ranks of torch.distributed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from planish.metrics import smooth_ece

RANK = """
import sys
import numpy as np, torch
from planish.metrics import SmoothECE
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
random = np.random.default_rng(0)
f = random.random(1000)
y = random.random(1000) < f**2
metric = SmoothECE()
metric.update(f[rank::2], y[rank::2])
print(repr(float(metric.compute())))
torch.distributed.destroy_process_group()
"""


def test_ranks_are_summed(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    found = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    random = np.random.default_rng(0)
    f = random.random(1000)
    whole = smooth_ece(random.random(1000) < f**2, f)
    assert found == [pytest.approx(whole, abs=1e-12)] * 2
