"""Agreement with the paper authors' package, where its kernel is not cut off (small bandwidths)."""

import numpy as np
import pytest

from planish.metrics import smooth_ece

relplot = pytest.importorskip("relplot", exc_type=ImportError)


@pytest.mark.parametrize("power", [1.0, 1.3])
def test_agrees_at_small_errors(power):
    random = np.random.default_rng(1)
    f = random.random(2000)
    y = (random.random(2000) < f**power).astype(float)
    # its root is found on a grid of 1/1024
    assert smooth_ece(y, f) == pytest.approx(relplot.smECE(f, y), abs=1.5 / 1024)
