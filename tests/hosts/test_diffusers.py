"""diffusers' own verbs on quantized pipelines: save_pretrained, from_pretrained, and what is damaged is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from planish._support import CheckpointError
from planish.quant import QConv, QLinear, rtn, svdquant

diffusers = pytest.importorskip("diffusers")

from planish.diffusion import SKIP, digits_dit, digits_pipeline  # noqa: E402
from planish.plugins import diffusers as plugin  # noqa: E402

diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()
WEIGHTS = "diffusion_pytorch_model.safetensors"


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer():
    model = digits_dit(layers=2, heads=2)
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    return quiet(digits_pipeline(model))


def u_net():
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    return quiet(diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler()))


def draw(pipeline):
    first = [3, 7] if isinstance(pipeline, diffusers.DiTPipeline) else 2
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(pipeline(first, num_inference_steps=2, output_type="np", generator=generator).images)


METHOD = plugin.whole(svdquant(group_size=16, rank=3, grid=2, iterations=2))


def small(make=transformer):
    pipeline = make()
    report = plugin.quantize_pipeline(pipeline, lambda: draw(pipeline), METHOD)
    return pipeline, report


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    pipeline, _ = small()
    path = tmp_path_factory.mktemp("small") / "pipeline"
    pipeline.save_pretrained(path)
    return pipeline, path


def opened(path, **options):
    with warnings.catch_warnings():  # diffusers' own deprecations
        warnings.simplefilter("ignore")
        return quiet(diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True, **options))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("make", "part"), [(transformer, "transformer"), (u_net, "unet")])
def test_a_pipeline_comes_back_bit_for_bit_twice(tmp_path, make, part):
    float_pictures = draw(make())
    pipeline, report = small(make)
    assert report.part == part and report.calls == (2, 2) and len(report.error_by_step) == 2
    assert all(0 < error < 0.05 for error in report.error_by_step.values())
    kinds = {type(m) for m in getattr(pipeline, part).modules()}
    assert QLinear in kinds and (QConv in kinds) == (part == "unet")
    pictures = draw(pipeline)
    assert 0 < (pictures - float_pictures).abs().max() < 0.5
    pipeline.save_pretrained(tmp_path / "a")
    again = opened(tmp_path / "a")
    assert type(again) is type(pipeline)
    assert same(getattr(again, part), getattr(pipeline, part))
    assert torch.equal(draw(again), pictures)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / part / WEIGHTS).read_bytes() == (tmp_path / "b" / part / WEIGHTS).read_bytes()
    assert same(getattr(opened(tmp_path / "b"), part), getattr(pipeline, part))


def test_a_u_net_comes_back_whose_convolutions_have_four_bits_and_a_branch(tmp_path):
    pipeline = u_net()
    method = svdquant(group_size=16, rank=3, grid=2, iterations=2, convolutions=True)
    plugin.quantize_pipeline(pipeline, lambda: draw(pipeline), method)
    convolutions = [m for m in pipeline.unet.modules() if isinstance(m, QConv)]
    assert convolutions and all(m.format.bits == m.act.bits == 4 and m.down is not None for m in convolutions)
    assert any(m.transform is not None for m in convolutions)
    pictures = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "a")
    again = opened(tmp_path / "a")
    assert same(again.unet, pipeline.unet) and torch.equal(draw(again), pictures)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "unet" / WEIGHTS).read_bytes() == (tmp_path / "b" / "unet" / WEIGHTS).read_bytes()


def test_what_is_saved_is_small_and_says_what_it_is(kept):
    pipeline, path = kept
    config = json.loads((path / "transformer" / "config.json").read_text(encoding="utf-8"))
    described = config["quantization_config"]
    assert described["quant_method"] == "planish"
    layers = {n for n, m in pipeline.transformer.named_modules() if isinstance(m, QLinear)}
    assert set(described["layers"]) == layers and not layers & set(described["ignore"])
    assert "planish" in repr(pipeline.transformer.config.quantization_config)
    names = load_file(path / "transformer" / WEIGHTS).keys()
    assert not any(name.removesuffix(".weight") in layers for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_keep_the_numbers_that_codes_were_chosen_for(kept, dtype):
    pipeline, path = kept
    theirs = opened(path, dtype=dtype).transformer
    for name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, QLinear):
            assert same(theirs.get_submodule(name), layer)
    assert theirs.proj_out_2.weight.dtype == dtype
    answer = theirs(torch.zeros(1, 1, 8, 8, dtype=dtype), timestep=torch.tensor([9]), class_labels=torch.tensor([1]))
    assert answer.sample.dtype == dtype and answer.sample.isfinite().all()


def test_large_models_are_written_in_shards(kept, tmp_path):
    pipeline, _ = kept
    pipeline.transformer.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path), pipeline.transformer)


def test_weights_alone_can_be_made_dense_again(tmp_path):
    pipeline = transformer()
    method = svdquant(group_size=16, rank=3, act_bits=None, smooth=None)
    plugin.quantize_pipeline(pipeline, lambda: draw(pipeline), method)
    pictures = draw(pipeline)
    pipeline.transformer.dequantize()
    assert not any(isinstance(m, QLinear) for m in pipeline.transformer.modules())
    torch.testing.assert_close(draw(pipeline), pictures, rtol=1e-3, atol=1e-3)
    rounded, _ = small()
    with pytest.raises(ValueError, match=r"dequantize: `transformer_blocks.0.attn1.to_q` rounds its inputs to Affine"):
        rounded.transformer.dequantize()


def damaged(path, tmp_path, change):
    """Copy a saved transformer, changing tensors or config on the way."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    tensors = load_file(path / "transformer" / WEIGHTS)
    config = json.loads((path / "transformer" / "config.json").read_text(encoding="utf-8"))
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


LAYER = "transformer_blocks.1.ff.net.2"


def missing(tensors, config):
    del tensors[f"{LAYER}.weight_scale"]


def wide(tensors, config):
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].float()


def longer(tensors, config):
    tensors[f"{LAYER}.up"] = torch.zeros(5, 5, dtype=torch.float16)


def broken(tensors, config):
    tensors[f"{LAYER}.weight_scale"][0, 0] = float("nan")


def elsewhere(tensors, config):
    config["layers"]["transformer_blocks.7.attn1.to_q"] = config["layers"].pop(LAYER)


def larger(tensors, config):
    config["layers"][LAYER].pop("transform", None)
    config["layers"][LAYER]["in"] *= 2


def newer(tensors, config):
    config["format_version"] = 99


@pytest.mark.parametrize(("change", "sentence"), [
    (missing, rf"`{LAYER}.weight_scale` is missing\."),
    (wide, rf"`{LAYER}.weight_scale` must be torch.float16; got torch.float32\."),
    (longer, rf"`{LAYER}.up` must have shape \[64, 3\]; got \[5, 5\]\."),
    (broken, rf"`{LAYER}.weight_scale` holds NaN or Inf\."),
    (elsewhere, r"`transformer_blocks.7.attn1.to_q`: the model has no such layer\."),
    (larger, rf"`{LAYER}`: the model has 256 -> 64 there, the checkpoint 512 -> 64\."),
    (newer, r"quantization_config: format_version must be 1; got 99\."),
])  # fmt: skip
def test_what_is_damaged_is_refused(kept, tmp_path, change, sentence):
    folder = damaged(kept[1], tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=sentence):
            diffusers.DiTTransformer2DModel.from_pretrained(folder)


def test_rounding_while_loading_is_refused(tmp_path):
    transformer().save_pretrained(tmp_path / "float")
    config = plugin.PlanishConfig(layers={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
            diffusers.DiTTransformer2DModel.from_pretrained(
                tmp_path / "float", subfolder="transformer", quantization_config=config
            )


def test_bad_input():
    pipeline = transformer()
    with pytest.raises(ValueError, match=r"capture: `run` must be a program that calls the DiTTransformer2DModel; got"):
        plugin.quantize_pipeline(pipeline, lambda: None)
    with pytest.raises(ValueError, match=r"denoiser_of: `part` must be one of .*; got 'unet'\."):
        plugin.quantize_pipeline(pipeline, lambda: draw(pipeline), part="unet")
    with pytest.raises(TypeError, match=r"denoiser_of: `pipeline` must be a pipeline of diffusers; got Linear\."):
        plugin.quantize_pipeline(torch.nn.Linear(2, 2), lambda: None)
    with pytest.raises(TypeError, match=r"attach: `model` must be a model of diffusers; got Linear\."):
        plugin.attach(torch.nn.Linear(2, 2))
    rounded, _ = small()
    with pytest.raises(
        ValueError, match=r"must be one with a float transformer; got 'one that is quantized already'\."
    ):
        plugin.quantize_pipeline(rounded, lambda: draw(rounded))


def test_a_limit_is_told_in_the_report():
    pipeline = transformer()
    report = plugin.quantize_pipeline(pipeline, lambda: draw(pipeline), rtn(group_size=16), limit=1)
    assert report.calls == (1, 2) and len(report.error_by_step) == 1
    made = report.to_json()
    json.dumps(made, allow_nan=False)
    assert made["part"] == "transformer" and made["calls"] == [1, 2] and made["ranges"]
    assert "answers on 1 of 2 calls" in str(report)
    assert all(not any(n.startswith(s.rstrip("*")) for s in SKIP if s.endswith("*") and s[0] != "*") for n in
               (n for n, m in pipeline.transformer.named_modules() if isinstance(m, QLinear)))  # fmt: skip
