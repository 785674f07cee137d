"""The report page: what it says, and what a browser makes of it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from planish.quant import compare, quantize, rtn
from planish.quant.charts import Axis, Frame, Series, axis_of, chart, short
from planish.quant.page import render, write_report

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def report():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(base.state_dict())
    ids = torch.randint(40, (10, 32))
    made = quantize(model, [ids], rtn(group_size=32)).to_json()
    made["search"] = {"alpha": {"none": 0.5, 0.0: 0.7, 0.5: 0.2, 1.0: math.inf, 0.75: 0.3}, "kinds": {"a": 1}}
    for block in made["blocks"]:
        block["folded"] = {"norm": True, "down_proj": block["name"].endswith("1")}
    found = compare(base, {"rtn": model}, [ids])
    return {
        **made,
        "model": "<script>alert(1)</script> & co",
        "subject": "rtn",
        "evaluations": {name: entry.to_json() for name, entry in found.items()},
        "data": {"calibrated_on": {"text": "a.txt", "tokens": 320}, "evaluated_on": {"text": "b.txt", "tokens": 320}},
        "samples": [{"prompt": "say <b>", "texts": {"float": "one </p>", "rtn": "two"}}],
        "machine": {"threads": 1},
    }


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_report(folder, report)


def test_the_page_is_well_formed_self_contained_and_escaped(page, report):
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.wrong and not checker.open
    assert not [t for t, a in checker.tags if t in {"script", "link", "img", "iframe"} or "src" in a or "href" in a]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text and "one &lt;/p&gt;" in text


def test_the_figures_are_those_of_the_report(page, report):
    text = page.read_text(encoding="utf-8")
    ours = report["evaluations"]["rtn"]
    assert f"<td>{ours['kl'][0]:.4f}<small>{ours['kl'][1]:.4f} … {ours['kl'][2]:.4f}</small></td>" in text
    assert f"{report['bytes_before'] / report['bytes_after']:.1f}&times; smaller" in text
    assert text.count('class="dot ours"') == 3 + 3 + 1  # blocks, finite points of the search, the loss
    assert "Least at alpha = 0.5." in text
    assert text.count('<i class="folded"') == 4 and text.count('<i class="dropped"') == 2
    assert "4 of 6 transforms cost nothing" in text
    assert "lossless: " in text if ours["lossless"] else "the loss is real" in text


def test_the_json_is_strict_and_round_trips(page, report):
    found = json.loads((page.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["search"]["alpha"]["1.0"] is None
    assert found["method"] == report["method"] and render(found) == page.read_text(encoding="utf-8")
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]


def test_the_report_of_the_engine_alone_is_a_page(report):
    bare = {k: v for k, v in report.items() if k in ("method", "blocks", "bytes_before", "bytes_after", "seconds")}
    text = render(bare)
    assert "Where the error arises" in text and "Is it still the same model?" not in text


CHROMIUM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)


def browse(page, tmp_path, *options):
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_renders_it(page, tmp_path):
    text = browse(page, tmp_path, "--dump-dom", "--window-size=1200,2000")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Is it still the same model?", "Where the error arises", "Does it know what it knows?",
        "What the search saw", "What was folded", "In its own words", "Details",
    ]  # fmt: skip
    assert text.count("<svg") == 4
    assert "NaN" not in text and "undefined" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_at_any_width(page, tmp_path, width):
    """A frame of that width holds the page; a script of the test's own measures it there and writes what it found."""
    probe = (
        "<script>addEventListener('load', () => { const e = [...document.querySelectorAll('body *')].filter(n => "
        "!n.closest('.scroll') && !n.closest('svg') && n.getBoundingClientRect().right > innerWidth + 1);"
        "document.title = 'over ' + e.length + ' of ' + innerWidth; parent.postMessage(document.title, '*') })</script>"
    )
    inner = page.read_text(encoding="utf-8").replace("</body>", probe + "</body>")
    outer = tmp_path / "outer.html"
    listen = "<script>addEventListener('message', e => document.body.dataset.found = e.data)</script>"
    quoted = inner.replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{quoted}"></iframe>'
    outer.write_text(f"<!doctype html><body>{listen}{frame}</body>", encoding="utf-8")
    found = browse(outer, tmp_path, "--dump-dom", "--virtual-time-budget=3000", "--window-size=1400,1000")
    assert f'data-found="over 0 of {width}"' in found


def test_axes_have_round_ticks_and_hold_their_values():
    assert Axis("", 0, 1).ticks() == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert Axis("", 0.0008, 20, log=True).ticks() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert Axis("", 0.2, 0.9, log=True).ticks() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
    for values in ([3.0], [0.0], [-1e-9, 1e-9], [math.nan], [1e6, 2e6]):
        axis = axis_of("", values)
        assert axis.low < axis.high and all(axis.low <= t <= axis.high for t in axis.ticks())
    assert [short(v) for v in (0.1 + 0.2, 1e-7, 12345678.0, 0.0)] == ["0.3", "1e-7", "1.235e7", "0"]


def test_lines_break_where_nothing_is_known():
    frame = Frame("t", Axis("x", 0, 4), Axis("y", 0, 1))
    frame.line(Series("s", [(0, 0.1), (1, 0.2), (2, math.nan), (3, 0.3), (4, 0.4)]))
    assert len(frame.parts) == 2
    one = chart("t", Axis("x", 0, 1), Axis("y", 0, 1), [Series("only", [(0, 0), (1, 1)])])
    assert "legend" not in one
