"""Which server is started, with which arguments, and what is refused; no server runs here."""

import json
from pathlib import Path

import pytest

from planish._support import MissingExtra
from planish.plugins import serve

WHERE = Path("models") / "small"


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(serve, "_has_vllm", lambda: True)
    monkeypatch.setattr(serve, "require", lambda *_: None)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setattr(serve, "_has_vllm", lambda: False)
    monkeypatch.setattr(serve, "_check_transformers", lambda: None)


def test_vllm_is_taken_where_it_is_installed(vllm):
    launch = serve.plan(WHERE, "small", port=9000, dtype="float32", max_model_len=512, extra=["--enforce-eager"])
    assert launch.engine == "vllm"
    assert launch.command[2:] == (  # no package of the name `vllm` here: as beside the one for CPUs
        *("vllm.entrypoints.openai.api_server", "--model", str(WHERE), "--host", "127.0.0.1", "--port", "9000"),
        *("--dtype", "float32", "--served-model-name", "small", "--max-model-len", "512", "--enforce-eager"),
    )


def test_the_command_line_of_vllm_is_taken_where_it_works(vllm, monkeypatch):
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "0.33.0")
    command = serve.plan(WHERE, "small").command
    assert command[2:5] == ("vllm.entrypoints.cli.main", "serve", str(WHERE))


def test_rounding_at_load_is_asked_of_vllm(vllm):
    command = serve.plan(WHERE, "small", at_load=True, group_size=64).command
    assert command[command.index("--quantization") + 1] == "planish"
    settings = json.loads(command[command.index("--hf-overrides") + 1])
    assert settings == {"quantization_config": {"quant_method": "planish", "group_size": 64}}


def test_transformers_is_taken_otherwise(no_vllm):
    launch = serve.plan(WHERE, "small", host="0.0.0.0")
    assert launch.engine == "transformers"
    assert launch.command[2:] == ("planish.plugins.serve", str(WHERE), "--host", "0.0.0.0", "--port", "8000")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"engine": "gpu"}, "`engine` must be one of auto, vllm, transformers; got 'gpu'"),
        ({"port": 0}, "`port` must be from 1 to 65535; got 0"),
        ({"group_size": 64}, "`group_size` must be left out without at_load"),
        ({"at_load": True}, "`at_load` must be left out: it is vLLM's alone"),
        ({"max_model_len": 8}, "`max_model_len` must be left out: it is vLLM's alone"),
    ],
)
def test_settings_are_refused(no_vllm, settings, sentence):
    with pytest.raises(ValueError, match=f"^serve: {sentence}"):
        serve.plan(WHERE, "small", **settings)


def test_no_engine_is_one_sentence(monkeypatch):
    monkeypatch.setattr(serve, "_has_vllm", lambda: False)
    hub = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(hub, "is_serve_available", lambda: False)
    with pytest.raises(MissingExtra, match=r"serving needs vLLM .* or: pip install 'transformers\[serving\]'"):
        serve.plan(WHERE, "small")


def test_the_transformers_server_starts_with_our_layers_registered(monkeypatch):
    cli = pytest.importorskip("transformers.cli.transformers")
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    seen = {}

    def app():
        seen["argv"], seen["known"] = list(serve.sys.argv), "planish" in AUTO_QUANTIZER_MAPPING

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(serve.sys, "argv", ["serve.py", "small", "--port", "8000"])
    serve.main()
    assert seen == {"argv": ["transformers", "serve", "small", "--port", "8000"], "known": True}
