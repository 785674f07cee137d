"""Schedulers for text as diffusers wants them, and tokenizers of transformers in the pipeline."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from planish.diffusion import (
    EmbeddingGaussianScheduler,
    EmbeddingSpace,
    SimplexScheduler,
    SmoothieScheduler,
    TextDiffusionConfig,
    TextDiffusionModel,
    TextDiffusionPipeline,
)

SCHEDULERS = [SmoothieScheduler, EmbeddingGaussianScheduler, SimplexScheduler]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_is_one_of_diffusers(kind, tmp_path):
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    scheduler = kind(solver="ddpm")
    assert isinstance(scheduler, SchedulerMixin) and isinstance(scheduler, ConfigMixin)
    scheduler.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    assert scheduler.order == 1
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_settings_go_from_one_scheduler_to_another():
    one = SimplexScheduler(solver="ddim", chunk_size=7)
    other = SmoothieScheduler.from_config(one.config)
    assert (other.config.solver, other.config.chunk_size) == ("ddim", 7)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_usual_loop(kind):
    """What pipelines of diffusers do with a scheduler, on tensors."""
    space = EmbeddingSpace(torch.randn(12, 4))
    scheduler = kind().set_space(space)
    scheduler.set_timesteps(3)
    x0 = scheduler.original(space.encode(torch.tensor([[3, 8]])))
    sample = torch.randn(x0.shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, t)
        out = scheduler.step(seen, t, sample, generator=torch.Generator().manual_seed(0))
        assert out["prev_sample"] is out.prev_sample
        again = scheduler.step(seen, t, sample, generator=torch.Generator().manual_seed(0), return_dict=False)
        torch.testing.assert_close(again[0], out.prev_sample)
        sample = out.prev_sample
    assert sample.shape == x0.shape
    noisy = scheduler.add_noise(x0, torch.zeros_like(x0), torch.tensor([0.3]))
    torch.testing.assert_close(noisy, float(scheduler.level(0.3)[0]) * x0)


def test_without_diffusers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from planish.diffusion import EmbeddingSpace, TextDiffusionModel, TokenState\n"
        "from planish._support import MissingExtra\n"
        "try:\n    from planish.diffusion import SmoothieScheduler\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs `diffusers`: pip install 'planish[diffusers]'" in run.stdout


def test_a_tokenizer_of_transformers(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    names = ["[PAD]", "[SEP]", "[UNK]", "the", "anvil", "is", "hot"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]"
    )
    space = EmbeddingSpace(torch.randn(7, 4))
    model = TextDiffusionModel(
        TextDiffusionConfig(4, 6, hidden_size=8, num_layers=1, num_encoder_layers=0, num_heads=2)
    )
    pipeline = TextDiffusionPipeline(tokenizer, space, model, SmoothieScheduler())
    assert pipeline.eos_token_id == 1
    assert pipeline.decode([3, 4, 5, 6, 1, 3]) == "the anvil is hot"
    pipeline.save_pretrained(tmp_path / "kept")
    again = TextDiffusionPipeline.from_pretrained(tmp_path / "kept")
    a, b = (
        p(["the anvil", ""], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        for p in (pipeline, again)
    )
    assert a.texts == b.texts
