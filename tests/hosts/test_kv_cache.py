"""Keys and values in few bits inside transformers: generate, beams, cropping, and what rounding may do."""

import copy

import pytest
import torch

from planish.quant import Affine
from planish.quant.rotations import hadamard

transformers = pytest.importorskip("transformers", minversion="5.16")
plugin = pytest.importorskip("planish.plugins.transformers")
IDS = torch.arange(2, 26).reshape(2, 12)


def tiny(head_dim=32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "form", [Affine(4, None), Affine(8, 16), Affine(3, None, symmetric=True), Affine(2, 8)], ids=str
)
@pytest.mark.parametrize("rotate", [True, False])
def test_what_is_read_is_what_the_format_says(form, rotate):
    cache = plugin.QuantizedCache(form, rotate=rotate)
    keys, values = noise(2, 3, 5, 32), noise(2, 3, 5, 32, seed=1)
    read = None
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):  # a prompt, then token after token
        read = cache.update(keys[:, :, part], values[:, :, part], layer_idx=0)
    h = hadamard(32)
    wanted = form.fake(keys @ h) @ h.T if rotate else form.fake(keys)
    torch.testing.assert_close(read[0], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(read[1], form.fake(values))
    assert cache.get_seq_length() == 5
    words = -(-32 * form.bits // 32) + form.n_groups(32)
    assert cache.layers[0].keys.shape == (2, 3, 5, words) and cache.layers[0].keys.dtype == torch.int32


def test_rotation_leaves_scores_alone_and_tames_a_large_channel():
    """q . k is that of the unrotated: the rotation is undone on reading. Keys with a large channel lose less by it."""
    keys, queries = noise(1, 2, 64, 32), noise(1, 2, 64, 32, seed=1)
    keys[..., 7] *= 40
    exact = queries @ keys.mT
    gap = {}
    for rotate in (True, False):
        read, _ = plugin.QuantizedCache(Affine(8, None), rotate=rotate).update(keys, keys, 0)
        assert (queries @ read.mT - exact).abs().max() < 0.05 * exact.abs().max()
        read, _ = plugin.QuantizedCache(Affine(4, None), rotate=rotate).update(keys, keys, 0)
        small = torch.arange(32) != 7
        gap[rotate] = float((read - keys)[..., small].square().mean())
    assert gap[True] < gap[False] / 2


def test_generate_and_the_size_of_what_is_kept():
    model = tiny()
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(IDS, **options)
    cache = plugin.QuantizedCache(Affine(8, 16))
    assert torch.equal(model.generate(IDS, past_key_values=cache, **options), wanted)
    plain = transformers.DynamicCache()
    model.generate(IDS, past_key_values=plain, **options)
    four = plugin.QuantizedCache()
    assert model.generate(IDS, past_key_values=four, **options).shape == wanted.shape
    assert four.get_seq_length() == plain.get_seq_length() == IDS.shape[1] + 7
    size = {id(c): sum(t.nbytes for layer in c.layers for t in (layer.keys, layer.values)) for c in (four, plain)}
    assert size[id(four)] * 6 < size[id(plain)]  # 4 words and one of scale for 32 floats: 5 / 32


def test_beams_and_a_longer_prompt():
    model = tiny()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, past_key_values=plugin.QuantizedCache(Affine(8, 8)), **options), wanted)
    cache = plugin.QuantizedCache(Affine(8, 8))
    first = model(IDS[:1, :5], past_key_values=cache).logits
    rest = model(IDS[:1, 5:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(IDS[:1]).logits, rtol=0.1, atol=0.1)


def test_the_host_s_verbs_on_what_is_stored():
    cache, keys = plugin.QuantizedCache(), noise(2, 2, 6, 32)
    before, _ = cache.update(keys, keys, 0)
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.update(keys[:, :, :0], keys[:, :, :0], 0)[0], before.flip(0))
    other.crop(-2)
    assert torch.equal(other.update(keys[:, :, :0], keys[:, :, :0], 0)[0], before[:, :, :4])
    other.batch_repeat_interleave(2)
    assert other.layers[0].keys.shape[0] == 4
    other.batch_select_indices(torch.tensor([0]))
    assert other.layers[0].keys.shape[0] == 1
    other.reset()
    assert other.get_seq_length() == 0
    assert torch.equal(other.update(keys, keys, 0)[0], before)


@pytest.mark.parametrize("width", [33, 24])
def test_heads_whose_size_is_no_power_of_two(width):
    cache, keys = plugin.QuantizedCache(Affine(8, None)), noise(1, 1, 4, width)
    read, _ = cache.update(keys, keys, 0)
    assert (read - keys).abs().max() < 0.02
    assert (cache.layers[0].turn is None) == (width == 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_came(dtype):
    keys = noise(1, 2, 3, 32).to(dtype)
    read, values = plugin.QuantizedCache(Affine(8, None)).update(keys, keys, 0)
    assert read.dtype == values.dtype == dtype
    assert (read - keys).abs().max() < 0.05


@pytest.mark.refuses
def test_bad_arguments():
    for form in (Affine(4, None, scale_dtype="float32"), "int4"):
        with pytest.raises(
            ValueError, match="QuantizedCache: `format` must be an Affine format with scales of float16"
        ):
            plugin.QuantizedCache(form)
    with pytest.raises(ValueError, match="QuantizedCache: `values` must be"):
        plugin.QuantizedCache(values=Affine(4, None, scale_dtype="float64"))
