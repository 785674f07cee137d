"""`planish quantize` on pipelines of diffusers: what it writes, what it shows, what it refuses."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from planish.__main__ import app

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from planish.diffusion import digits_dit, digits_pipeline  # noqa: E402
from planish.plugins import pipeline_job  # noqa: E402
from planish.quant.page import render  # noqa: E402

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = digits_dit(layers=2, heads=2)
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    path = tmp_path_factory.mktemp("pipeline") / "digits"
    digits_pipeline(model).save_pretrained(path)
    return path


def run(*arguments, code=0):
    made = RUNNER.invoke(app, ["quantize", *map(str, arguments)])
    assert made.exit_code == code, made.output
    return " ".join(made.output.split())


OPTIONS = ("--method", "rtn", "--group-size", 32, "--act-bits", 4, "--images", 2, "--steps", 2)


def test_a_pipeline_is_quantized_and_shown(source, tmp_path):
    out = tmp_path / "small"
    told = run(source, out, *OPTIONS)
    assert "transformer: rtn: 2 blocks" in told and "dB from float's, same seeds" in told
    assert not (tmp_path / "small.journal").exists() and sorted(tmp_path.iterdir()) == [out]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["part"] == "transformer" and report["calls"] == [2, 2] and 5 < report["psnr"] < 60
    sheets = [Image.open(io.BytesIO(base64.b64decode(p["png"]))) for p in report["pictures"]]
    assert [p["name"] for p in report["pictures"]] == ["float", "rtn", "difference, times 8"]
    assert {sheet.size for sheet in sheets} == {(2 * 64 + 4, 64)}
    pixels = [np.asarray(sheet, dtype=float) for sheet in sheets]
    assert 0 < np.abs(pixels[0] - pixels[1]).mean() < 60
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "Error by timestep" in page and "same seeds" in page
    again = pipeline_job.open_pipeline(out)
    assert again.labels == pipeline_job.open_pipeline(source).labels and len(again.labels) == 10
    drawn = pipeline_job.drawing(again, steps=2)(2, 1000)
    assert pipeline_job.grid(drawn) == report["pictures"][1]["png"]  # what is shown is what was written
    assert "one which is" not in run(out, tmp_path / "twice", *OPTIONS, code=2)


def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole", *OPTIONS)
    write, calls = pipeline_job.write_report, []
    monkeypatch.setattr(
        pipeline_job, "write_report", lambda *a: calls.append(1) or (_ for _ in ()).throw(OSError("full"))
    )
    assert "cannot be written: full" in run(source, tmp_path / "small", *OPTIONS, code=2)
    assert calls and not (tmp_path / "small").exists() and (tmp_path / "small.journal").is_dir()
    monkeypatch.setattr(pipeline_job, "write_report", write)
    run(source, tmp_path / "small", *OPTIONS)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "small" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_what_is_not_a_pipeline_of_ours_is_refused(source, tmp_path):
    assert "`method` must be one of rtn" in run(source, tmp_path / "a", "--method", "best4", code=2)
    quantized = tmp_path / "small"
    run(source, quantized, *OPTIONS)
    assert "must be a float pipeline; got" in run(quantized, tmp_path / "b", *OPTIONS, code=2)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "transformer" / "config.json").write_text("{", encoding="utf-8")
    assert "diffusers cannot read the pipeline" in run(broken, tmp_path / "c", *OPTIONS, code=2)
    assert not list(tmp_path.glob("*.partial*")) and not (tmp_path / "c").exists()


def test_pipelines_that_ask_for_more_are_named():
    class Asks:
        def __call__(self, image, prompt=None, output_type="pil"):
            """Draw."""

    with pytest.raises(
        ValueError, match=r"must be a pipeline that draws from classes, prompts or nothing; got 'Asks: im"
    ):
        pipeline_job.drawing(Asks())

    class Free:
        def __call__(self, output_type="pil"):
            """Draw."""

    with pytest.raises(ValueError, match=r"got 'Free: neither classes, prompts nor a number of pictures'"):
        pipeline_job.drawing(Free())


@pytest.mark.parametrize("name", ["prompt", "batch_size"])
def test_prompts_and_numbers_are_given(name):
    given = {}

    class Pipeline:
        def draw(self, **kwargs):
            given.update(kwargs)
            return type("Out", (), {"images": np.zeros((3, 2, 2, 1))})

        if name == "prompt":

            def __call__(self, prompt, num_inference_steps=5, output_type="pil", generator=None):
                return self.draw(prompt=prompt, steps=num_inference_steps, kind=output_type)
        else:

            def __call__(self, batch_size=1, num_inference_steps=5, output_type="pil", generator=None):
                return self.draw(batch_size=batch_size, steps=num_inference_steps, kind=output_type)

    assert pipeline_job.drawing(Pipeline(), steps=4)(3, 0).shape == (3, 2, 2, 1)
    wanted = list(pipeline_job.PROMPTS[:3]) if name == "prompt" else 3
    assert given == {name: wanted, "steps": 4, "kind": "np"}


def test_large_pictures_are_shown_smaller_and_hostile_ones_as_text():
    sheet = Image.open(io.BytesIO(base64.b64decode(pipeline_job.grid(np.ones((2, 512, 1024, 3), np.float32)))))
    assert sheet.size == (2 * 256 + 4, 128)
    page = render({"method": "rtn", "blocks": [], "pictures": [{"name": "<b>", "png": '"><script>'}]})
    assert "<script>" not in page and "<b>" not in page.split("pictures")[-1]
