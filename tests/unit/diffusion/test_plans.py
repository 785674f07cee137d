"""Cache plans on disk: written whole, read back the same, refused where damaged."""

import json
import re

import pytest
import torch

from planish._support import CheckpointError
from planish.diffusion import CachePlan, StepDistances, dps_schedule, steps_mask, uniform_schedule

diffusers = pytest.importorskip("diffusers")
from planish.diffusion import apply_cache, fit_cache, remove_cache  # noqa: E402


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(2, 16, 1, 1, 3, sample_size=4, num_embeds_ada_norm=4).eval()


@torch.no_grad()
def draw(model):
    x, labels = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long)
    for i in range(10):
        x = 0.9 * x + 0.3 * model(x, timestep=torch.full((4,), 90.0 - 9 * i), class_labels=labels).sample
    return x


def test_a_plan_lives_in_one_file(tmp_path):
    model = dit()
    plan = fit_cache(model, lambda: draw(model), 5, validate=False)
    plan.save(tmp_path / "plan.safetensors")
    again = CachePlan.load(tmp_path / "plan.safetensors")
    assert again.schedule == plan.schedule and again.region == (1, 2) and again.extrapolate
    assert again.made_for == plan.made_for and str(again) == str(plan)
    images = []
    for chosen in (plan, again):
        apply_cache(model, chosen)
        images.append(draw(model))
        remove_cache(model)
    torch.testing.assert_close(*images)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_a_damaged_plan_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "plan"
    with pytest.raises(CheckpointError, match="there is no file"):
        CachePlan.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CachePlan.load(path)
    save_file({}, path, {"format": "something"})
    with pytest.raises(CheckpointError, match="is no planish cache plan of version 1"):
        CachePlan.load(path)
    CachePlan((0, 2), 4).save(path)
    meta = {"format": "planish cache plan", "version": "1"}
    record = {"schedule": [0, 9], "steps": 4, "region": None, "shape": None, "timesteps": None, "branches": 1,
              "extrapolate": False, "outputs": [], "made_for": {}}  # fmt: skip
    for plan, tensors in (
        (json.dumps(record), {}),
        ("{}", {}),
        (json.dumps({**record, "schedule": [0]}), {"corrections|1": torch.full((3, 2), torch.nan)}),
    ):
        save_file(tensors, path, {**meta, "plan": plan})
        with pytest.raises(CheckpointError, match="is damaged"):
            CachePlan.load(path)


TABLE = [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.refuses
@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: dps_schedule([1.0], 2), "dps_schedule: `distances` must be a square table, a row a step; got (1,)."),
        (lambda: dps_schedule(TABLE), "`interval` must be given, or `n_groups` in its place; got None."),
        (lambda: dps_schedule(TABLE, 1, n_groups=1), "`interval` must be given, or `n_groups` in its place; got 1."),
        (lambda: dps_schedule(TABLE, 0), "dps_schedule: `interval` must be at least 1; got 0."),
        (lambda: dps_schedule(TABLE, n_groups=3), "dps_schedule: `n_groups` must be in [1, 2]; got 3."),
        (lambda: dps_schedule(TABLE, 1, min_len=0), "dps_schedule: `min_len` must be at least 1; got 0."),
        (lambda: dps_schedule(TABLE, 3, max_len=1), "`max_len` must be at least `min_len` = 2; got 1."),
        (lambda: dps_schedule(TABLE, 5), "dps_schedule: 1 group of 3 to 10 steps cannot make up 2; change `interval`"),
        (
            lambda: dps_schedule([[0, -1], [0, 0]], 2),
            "`distances` must be known and not negative up to 2 steps apart; got -1.0.",
        ),
        (lambda: steps_mask([1], 4), "steps_mask: `schedule` must be steps below 4 in rising order, the first 0"),
        (lambda: uniform_schedule(0, 1), "uniform_schedule: `steps` must be at least 1; got 0."),
        (lambda: StepDistances(0), "StepDistances: `window` must be at least 1; got 0."),
        (lambda: StepDistances(2).add(torch.tensor(torch.nan)), "`feature` must be finite; got 'NaN or Inf at step 0'"),
        (lambda: CachePlan((0, 0), 4), "CachePlan: `schedule` must be steps below 4 in rising order, the first 0"),
        (lambda: CachePlan((0,), 4, branches=0), "CachePlan: `branches` must be at least 1; got 0."),
        (lambda: CachePlan((0,), 4, timesteps=(1.0,)), "CachePlan: `timesteps` must be a list of 4; got 1."),
    ],
)
def test_a_mistake_is_one_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mistake()
