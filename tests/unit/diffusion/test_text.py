"""Text diffusion: spaces, tokenizer, network, training that goes on, pipeline; and every refusal by its sentence."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from planish._support import CheckpointError, PlanishWarning
from planish.diffusion import (
    EmbeddingGaussianScheduler,
    EmbeddingSpace,
    SimplexScheduler,
    SmoothieScheduler,
    SymbolTokenizer,
    TextDiffusionConfig,
    TextDiffusionModel,
    TextDiffusionPipeline,
    train_text_diffusion,
)

SCHEDULERS = [SmoothieScheduler, EmbeddingGaussianScheduler, SimplexScheduler]
LETTERS = SymbolTokenizer("abcdefgh")
V, D, M = len(LETTERS), 8, 5
SIZES = {"hidden_size": 16, "num_layers": 2, "num_encoder_layers": 2, "num_heads": 2, "max_source_length": 4}


def make_space():
    return EmbeddingSpace(torch.randn(V, D, generator=torch.Generator().manual_seed(0)))


def make_model(**changes):
    torch.manual_seed(0)
    return TextDiffusionModel(TextDiffusionConfig(D, M, **{"source_vocab_size": V, **SIZES, **changes}))


def pairs(n=64):
    """Sources of up to four letters, and as targets the same letters and an end."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randint(2, V, (n, 4), generator=generator)
    length = torch.randint(0, 5, (n, 1), generator=generator)
    sources = torch.where(torch.arange(4) < length, sources, 0)
    targets = torch.nn.functional.pad(sources, (0, 1)).scatter(1, length, 1)
    return sources, targets


def make_pipeline(scheduler=None, **changes):
    return TextDiffusionPipeline(LETTERS, make_space(), make_model(**changes).eval(), scheduler or SmoothieScheduler())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# spaces


def test_standardizing():
    weight = 3 + 2 * torch.randn(40, 6)
    total, features = EmbeddingSpace(weight), EmbeddingSpace(weight, standardize="features")
    assert float(total.weight.mean()) == pytest.approx(0, abs=1e-6)
    assert float(total.weight.std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(features.weight.std(0, unbiased=False), torch.ones(6))
    assert torch.equal(EmbeddingSpace(weight, standardize=None).weight, weight)


def test_ignored_tokens_change_nothing():
    weight = torch.randn(10, 4)
    strange = torch.cat([weight, torch.full((1, 4), 1e3)])
    space = EmbeddingSpace(strange, ignore_ids=[10])
    torch.testing.assert_close(space.weight[:10], EmbeddingSpace(weight).weight)
    torch.testing.assert_close(space.neighbour_distances(), EmbeddingSpace(weight).neighbour_distances())
    state = SmoothieScheduler(chunk_size=10).set_space(space).corrupt(torch.tensor([[3]]), 0.9, seeded())
    assert float(state.probability(torch.tensor([[10]]))) == 0
    assert torch.isfinite(state.mix()).all()


def test_half_precision_is_widened():
    space = EmbeddingSpace(torch.randn(10, 4).bfloat16())
    assert space.weight.dtype == torch.float32
    assert space.distances(torch.randn(2, 4).half()).dtype == torch.float32


def test_cooccurrence_finds_tokens_that_stand_alike():
    generator = seeded()
    first = torch.randint(0, 2, (4000, 1), generator=generator)  # 0 and 1 before 4; 2 and 3 before 5
    second = 2 + torch.randint(0, 2, (4000, 1), generator=generator)
    rows = torch.cat([torch.cat([first, torch.full_like(first, 4)], 1), torch.cat([second, second * 0 + 5], 1)])
    rows = torch.cat([rows, torch.randint(0, 6, (len(rows), 1), generator=generator)], 1)
    space = EmbeddingSpace.from_cooccurrence(rows, 6, 3)
    distances = space.distances(space.weight)
    assert distances[0, 1] < 0.1 * distances[0, 2]
    assert distances[2, 3] < 0.1 * distances[1, 3]


def test_embeddings_of_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    space = EmbeddingSpace.from_pretrained(model, standardize=None)
    assert torch.equal(space.weight, model.embeddings.word_embeddings.weight)


def test_equal_embeddings_warn():
    with pytest.warns(PlanishWarning, match="1 tokens share the embedding of another"):
        EmbeddingSpace(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: EmbeddingSpace(torch.ones(3, 2)), "`weight` must be of rows that vary"),
        (lambda: EmbeddingSpace(torch.eye(3)[:, :1] * 0), "`weight` must be of rows that vary"),
        (lambda: EmbeddingSpace(torch.eye(3), ignore_ids=[3]), r"`ignore_ids` must be in \[0, 3\); got 3"),
        (lambda: EmbeddingSpace(torch.eye(3), ignore_ids=[0, 1]), "such that two tokens remain"),
        (lambda: EmbeddingSpace(torch.tensor([[1.0], [torch.nan]])), "must be finite; got 'token 1'"),
        (lambda: EmbeddingSpace(torch.eye(3), standardize="all"), "'total', 'features' or None"),
        (lambda: make_space().encode(torch.tensor([V])), rf"`ids` must be in \[0, {V}\); got {V}"),
        (lambda: make_space().encode(torch.tensor([-1])), rf"`ids` must be in \[0, {V}\); got -1"),
        (lambda: EmbeddingSpace.from_pretrained(torch.nn.Linear(2, 2)), "one with `get_input_embeddings`"),
        (lambda: EmbeddingSpace.from_cooccurrence(pairs()[1], V, V + 1), rf"`dim` must be in \[1, {V}\]"),
        (lambda: EmbeddingSpace.from_cooccurrence(pairs()[1], V, 2, window=0), "`window` must be at least 1"),
        (lambda: SmoothieScheduler(sigma_min=0), "`sigma_min` must be a finite number > 0 or 'auto'; got 0"),
        (lambda: SmoothieScheduler(sigma_min="x"), "`sigma_min` must be a finite number > 0 or 'auto'"),
        (lambda: SmoothieScheduler(sigma_max_ratio=1), "`sigma_max_ratio` must be a finite number > 1"),
        (lambda: SmoothieScheduler(d=0), "`d` must be a finite number > 0"),
        (lambda: SmoothieScheduler(delta=-1), "`delta` must be a finite number >= 0"),
        (lambda: SmoothieScheduler(transition=1), r"`transition` must be in \(0, 1\)"),
        (lambda: SmoothieScheduler(solver="sde"), "`solver` must be one of 'fresh', 'ddpm', 'ddim'; got 'sde'"),
        (lambda: SmoothieScheduler(chunk_size=0), "`chunk_size` must be at least 1"),
        (lambda: EmbeddingGaussianScheduler(d=-1), "EmbeddingGaussianScheduler: `d` must be"),
        (lambda: SimplexScheduler(k=0), "SimplexScheduler: `k` must be"),
        (lambda: SmoothieScheduler().space, "`space` must be set first, by `set_space`"),
        (lambda: SmoothieScheduler().level(1.5), r"`t` must be in \[0, 1\]; got 1.5"),
        (lambda: SmoothieScheduler().set_timesteps(0), "`num_inference_steps` must be at least 1; got 0"),
        (lambda: SmoothieScheduler().step(torch.ones(1), 1.0, torch.ones(1)), "`timesteps` must be set first"),
        (lambda: TextDiffusionConfig(0, 4), "`embedding_dim` must be at least 1"),
        (lambda: TextDiffusionConfig(4, 4, hidden_size=18, num_heads=4), "`hidden_size` must be a multiple of twice 4"),
        (lambda: TextDiffusionConfig(4, 4, dropout=1), r"`dropout` must be in \[0, 1\)"),
        (lambda: make_model()(torch.ones(1, M + 1, D), torch.ones(1)), f"of 1 to {M} positions; got {M + 1}"),
        (lambda: make_model()(torch.ones(1, M, D), torch.ones(1) * 2), r"`timestep` must be in \[0, 1\]"),
        (lambda: make_model()(torch.ones(1, 1, D), torch.ones(1), torch.ones(1, 5).long()), "at most 4 positions"),
        (lambda: make_model()(torch.ones(1, 1, D), torch.ones(1), None, torch.ones(1, 2, D)), "`encoder_input_ids`"),
        (lambda: make_model()(torch.ones(1, 1, D), torch.ones(1), self_cond=torch.ones(1, 1, D)), "no self-cond"),
        (lambda: SymbolTokenizer("aa"), "SymbolTokenizer: `symbols` must be different"),
        (lambda: SymbolTokenizer(["a b"], " "), "without the separator"),
        (lambda: LETTERS.encode("xyz"), "made of the vocabulary's symbols; got 'x'"),
        (lambda: make_pipeline()([]), r"`texts` must be at least one; got \[\]"),
        (lambda: make_pipeline()("ab", max_length=M + 1), r"`max_length` must be in \[1, 5\]"),
        (lambda: make_pipeline()("ab", num_inference_steps=0), "`num_inference_steps` must be at least 1"),
        (lambda: make_pipeline()("ab", patience=0), "`patience` must be at least 1 or None"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"lr": 0}, "`lr` must be a finite number > 0"),
        ({"ema": 1}, r"`ema` must be in \[0, 1\)"),
        ({"pad_weight": -1}, "`pad_weight` must be a finite number >= 0"),
        ({"pad_weight": 0.5}, "`pad_id` must be given"),
        ({"decay": "linear"}, "`decay` must be 'none' or 'cosine'"),
        ({"targets": pairs()[1][:0]}, "`targets` must be at least one row"),
        ({"sources": pairs()[0][:3]}, "`sources` must be as many as targets, 64; got 3"),
        ({"sources": pairs()[0] + V}, r"`sources` must be ids in \[0, 10\)"),
        ({"targets": pairs()[1] + V}, r"`ids` must be in \[0, 10\)"),
        ({"lr": 1e30, "steps": 9}, "`loss` must be finite; take a smaller `lr`"),
    ],
)
def test_bad_training(changes, sentence):
    sources, targets = pairs()
    given = {"targets": targets, "sources": sources, "steps": 2, **changes}
    with pytest.raises(ValueError, match=sentence):
        train_text_diffusion(make_model(), SmoothieScheduler().set_space(make_space()), **given)


def test_vocabularies_that_do_not_fit():
    space, model = make_space(), make_model()
    with pytest.raises(ValueError, match="`space` must be of the tokenizer's 11 tokens"):
        TextDiffusionPipeline(SymbolTokenizer("abcdefghi"), space, model, SmoothieScheduler())
    with pytest.raises(ValueError, match="the rest in `ignore_ids`; got '10 tokens'"):
        TextDiffusionPipeline(SymbolTokenizer("abcdefg"), space, model, SmoothieScheduler(), LETTERS)
    few = EmbeddingSpace(space.weight, ignore_ids=[9])
    TextDiffusionPipeline(SymbolTokenizer("abcdefg"), few, model, SmoothieScheduler(), LETTERS)
    with pytest.raises(ValueError, match="`space` must be of the model's 8 features; got 3"):
        TextDiffusionPipeline(LETTERS, EmbeddingSpace(torch.randn(V, 3)), model, SmoothieScheduler())
    with pytest.raises(ValueError, match="`tokenizer` must be one with encode, decode"):
        TextDiffusionPipeline("abc", space, model, SmoothieScheduler())


# network


def test_padding_of_sources_is_not_seen():
    model, x = make_model().eval(), torch.randn(1, M, D)
    t, source = torch.tensor(0.5), torch.tensor([[4, 2]])
    padded = torch.tensor([[4, 2, 7, 7]])
    alone = model(x, t, encoder_input_ids=source)
    masked = model(x, t, encoder_input_ids=padded, encoder_attention_mask=torch.tensor([[1, 1, 0, 0]]))
    torch.testing.assert_close(alone, masked)
    assert not torch.allclose(alone, model(x, t, encoder_input_ids=padded))
    nothing = model(x, t, encoder_input_ids=padded, encoder_attention_mask=torch.zeros(1, 4))
    torch.testing.assert_close(nothing, model(x, t))


def test_sources_encoded_once():
    model, x, source = make_model().eval(), torch.randn(2, 3, D), torch.randint(V, (2, 4))
    h, mask = model.encode(2, source)
    torch.testing.assert_close(
        model(x, torch.tensor(0.3), encoder_hidden_states=h, encoder_attention_mask=mask),
        model(x, torch.tensor([0.3, 0.3]), encoder_input_ids=source),
    )


def test_sources_as_embeddings_of_the_same_space():
    space = make_space()
    pipeline = TextDiffusionPipeline(LETTERS, space, make_model(source_vocab_size=None), SmoothieScheduler())
    assert len(pipeline(["abc", "de"], num_inference_steps=2, generator=seeded()).texts) == 2


# training


@pytest.mark.parametrize("changes", [{}, {"self_conditioning": True}], ids=["plain", "self-conditioned"])
def test_a_stopped_training_ends_the_same(tmp_path, changes):
    sources, targets = pairs()
    settings = {"steps": 7, "batch_size": 8, "lr": 1e-3, "source_dropout": 0.3, "save_every": 2}

    def run(path, progress=None):
        model = make_model(**changes)
        scheduler = SmoothieScheduler().set_space(make_space())
        report = train_text_diffusion(
            model, scheduler, targets, sources, **settings, checkpoint=path, progress=progress, generator=seeded(5)
        )
        return model.state_dict(), report

    def stop(stage, done, total):
        assert (stage, total) == ("train", 7)
        if done == 5:
            raise KeyboardInterrupt

    whole, report = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run.safetensors", stop)
    again, resumed = run(tmp_path / "run.safetensors")
    assert (report.resumed_at, resumed.resumed_at) == (0, 4)
    assert torch.equal(report.losses, resumed.losses)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_of_other_settings_is_refused(tmp_path):
    sources, targets = pairs()
    path, scheduler = tmp_path / "run.safetensors", SmoothieScheduler().set_space(make_space())
    train_text_diffusion(make_model(), scheduler, targets, sources, steps=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="is of other settings"):
        train_text_diffusion(make_model(), scheduler, targets, sources, steps=3, checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_text_diffusion(make_model(), scheduler, targets, sources, steps=2, checkpoint=path)


@pytest.fixture(scope="module")
def copier():
    """A pipeline that learnt to copy up to four letters, with some sources left out."""
    torch.manual_seed(0)
    sources, targets = pairs(4096)
    sizes = TextDiffusionConfig(D, M, **{**SIZES, "source_vocab_size": V, "hidden_size": 32})
    model, scheduler = TextDiffusionModel(sizes), SmoothieScheduler().set_space(make_space())
    report = train_text_diffusion(
        model, scheduler, targets, sources, steps=350, batch_size=64, lr=5e-3, warmup=0.05, decay="cosine", ema=0.98,
        source_dropout=0.1, pad_id=0, pad_weight=0.5, generator=seeded(),
    )  # fmt: skip
    assert report.loss < 0.5 * report.losses[:10].mean()
    return TextDiffusionPipeline(LETTERS, scheduler.space, model, scheduler)


WORDS = ["abcd", "hag", "ed", "c", "", "feed", "bad", "gag"]


def test_it_learns_to_copy(copier):
    out = copier(WORDS, num_inference_steps=20, generator=seeded())
    letters = [a == b for word, text in zip(WORDS, out.texts, strict=True) for a, b in zip(word, text, strict=False)]
    assert sum(letters) >= 0.8 * sum(map(len, WORDS))
    assert [len(t) for t in out.texts].count(0) <= 2
    assert out.ids.shape == (8, M)
    assert out.steps == 20


def test_the_same_generator_writes_the_same(copier):
    runs = [copier(WORDS, num_inference_steps=5, generator=seeded(s)).ids for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    guided = copier(WORDS, num_inference_steps=5, guidance_scale=2.0, generator=seeded(3)).ids
    assert guided.shape == runs[0].shape


@pytest.mark.parametrize("solver", ["fresh", "ddpm", "ddim"])
def test_every_solver_writes(copier, solver):
    pipeline = TextDiffusionPipeline(LETTERS, copier.space, copier.model, SmoothieScheduler(solver=solver))
    texts = pipeline(["hag", "bad"], num_inference_steps=8, generator=seeded()).texts
    right = [a == b for word, text in zip(["hag", "bad"], texts, strict=True) for a, b in zip(word, text, strict=False)]
    assert sum(right) >= 4


def test_stopping_when_nothing_changes(copier):
    whole = copier(WORDS, num_inference_steps=200, patience=None, generator=seeded())
    early = copier(WORDS, num_inference_steps=200, patience=10, generator=seeded())
    assert whole.steps == 200
    assert 11 <= early.steps < 200


def test_one_position_one_text_one_step(copier):
    out = copier("abcd", num_inference_steps=1, max_length=1, generator=seeded())
    assert (len(out.texts), out.ids.shape, out.steps) == (1, (1, 1), 1)


def test_long_sources_are_cut_with_a_warning(copier):
    with pytest.warns(PlanishWarning, match="longer than the model's 4 positions"):
        copier("abcdefgh", num_inference_steps=1)


def test_texts_end_at_the_end(copier):
    assert copier.decode([2, 3, 1, 4, 0]) == "ab"
    assert copier.decode([2, 0, 3, 0, 4]) == "abc"  # no end: all of it, without padding
    assert copier.decode([0, 0, 0]) == ""


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_folder_gives_the_pipeline_back(copier, kind, tmp_path):
    pipeline = TextDiffusionPipeline(LETTERS, copier.space, copier.model, kind(solver="ddim"))
    pipeline.save_pretrained(tmp_path / "kept")
    again = TextDiffusionPipeline.from_pretrained(tmp_path / "kept")
    assert type(again.scheduler) is kind
    assert again.scheduler.config.solver == "ddim"
    assert again.source_tokenizer is again.tokenizer
    a, b = (p(WORDS, num_inference_steps=3, generator=seeded()) for p in (pipeline, again))
    assert a.texts == b.texts
    with pytest.raises(CheckpointError, match="is there already"):
        pipeline.save_pretrained(tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_folders_that_are_none(copier, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextDiffusionPipeline.from_pretrained(tmp_path)
    copier.save_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / "model" / "config.json").write_text(json.dumps({"embedding_dim": D, "max_length": 9}))
    with pytest.raises(CheckpointError, match="weights do not fit"):
        TextDiffusionPipeline.from_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / "model" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextDiffusionModel.from_pretrained(tmp_path / "kept" / "model")
    with pytest.raises(CheckpointError, match="no config.json"):
        TextDiffusionModel.from_pretrained(tmp_path)
    (tmp_path / "symbols.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SymbolTokenizer.from_pretrained(tmp_path)


def test_a_network_can_be_quantized(copier, tmp_path):
    import copy

    import planish
    from planish.quant import rtn
    from planish.quant.layers import QLinear

    small = copy.deepcopy(copier.model)
    scheduler, generator = copier.scheduler, seeded()
    sources, targets = pairs(256)
    batches = []
    for rows in torch.arange(256).split(64):
        t = torch.rand(len(rows), generator=generator)
        seen = scheduler.scale_model_input(scheduler.corrupt(targets[rows], t, generator), t)
        mask = sources[rows] != 0
        batches.append(
            {"inputs_embeds": seen, "timestep": t, "encoder_input_ids": sources[rows], "encoder_attention_mask": mask}
        )
    report = planish.quantize(small, batches, rtn(group_size=32), skip=("input_proj", "output_proj"))
    kinds = {name for name, module in small.named_modules() if isinstance(module, QLinear)}
    assert {"blocks.0.attention.q_proj", "blocks.1.down_proj", "encoder.0.up_proj"} <= kinds
    pipeline = TextDiffusionPipeline(LETTERS, copier.space, small, scheduler)
    texts = pipeline(WORDS, num_inference_steps=20, generator=seeded()).texts
    letters = [a == b for word, text in zip(WORDS, texts, strict=True) for a, b in zip(word, text, strict=False)]
    assert sum(letters) >= 0.6 * sum(map(len, WORDS))
    with pytest.raises(CheckpointError, match="write it by planish.save"):
        small.save_pretrained(tmp_path / "small")
    planish.save(small, tmp_path / "small", report=report)
    twin = planish.load(tmp_path / "small", into=copy.deepcopy(copier.model))
    with torch.no_grad():
        assert torch.equal(twin(**batches[0]), small(**batches[0]))
