"""Tiny random denoisers of diffusers, their inputs, and a sampler, for tests of caches."""

import diffusers
import torch

T = 10


def dit(layers=3):
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(2, 16, 1, 1, layers, sample_size=4, num_embeds_ada_norm=4).eval()


def unet(kind="UNet2DModel"):
    torch.manual_seed(0)
    common = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4, "layers_per_block": 2}
    if kind == "UNet2DModel":
        return diffusers.UNet2DModel(
            **common, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        ).eval()  # fmt: skip
    return diffusers.UNet2DConditionModel(
        **common, block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


KINDS = {"dit": dit, "unet": unet, "cross": lambda: unet("UNet2DConditionModel"), "flux": flux}


def inputs(kind, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(shape, generator=g)

    if kind == "dit":
        return {"hidden_states": r(n, 1, 4, 4), "class_labels": torch.zeros(n, dtype=torch.long)}
    if kind == "flux":
        return {
            "hidden_states": r(n, 6, 4), "encoder_hidden_states": r(n, 3, 8), "pooled_projections": r(n, 8),
            "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
        }  # fmt: skip
    return {"sample": r(n, 1, 8, 8)} | ({"encoder_hidden_states": r(n, 3, 8)} if kind == "cross" else {})


@torch.no_grad()
def call(model, kind, t, x):
    return model(**x, timestep=torch.full((len(next(iter(x.values()))),), t)).sample


def steps(total=T):
    return [float(90 - 9 * i) for i in range(total)]


@torch.no_grad()
def draw(model, kind="dit", n=4, seed=0, times=None):
    """A deterministic sampler: every state depends on all outputs before."""
    x, name = inputs(kind, n, seed), "sample" if kind in ("unet", "cross") else "hidden_states"
    for t in times or steps():
        x = {**x, name: 0.9 * x[name] + 0.3 * call(model, kind, t, x)}
    return x[name]
