"""The report as one page: made from report.json, readable without a network, printable, in light and in dark.

`report.json` is what `Report.to_json()` says, and where they are known: `model` (its name), `planish` (the version),
`evaluations` (by name, `Evaluation.to_json()`; "base" is the float original), `subject` (the name of the model that was
saved), `data` (what it was calibrated and evaluated on), `samples` (texts before and after), `machine`. Of a pipeline
that draws: `pictures` (name and PNG in base64, same seeds before and after), `psnr`, `error_by_step`, `ranges`.
"""

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from planish.quant.charts import Axis, Series, axis_of, chart, short, whiskers

Json = Mapping[str, Any]


def write_report(directory: Path, report: Json) -> Path:
    """Write `report.json` and `report.html` into a directory, each whole or not at all.

    Args:
        directory: Where; it exists.
        report: The report; see the module.

    Returns:
        The path of the page.

    Raises:
        OSError: The directory cannot be written.
    """
    text = json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in (("report.json", text), ("report.html", render(json.loads(text)))):
        partial = directory / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(directory / name)
    return directory / "report.html"


def _finite(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """Return JSON in which what is not a finite number is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: Json) -> str:
    """Return the page of a report.

    Args:
        report: The report; see the module.

    Returns:
        HTML, self-contained.

    Example:
        >>> page = render({"model": "tiny", "method": "rtn(...)", "blocks": []})
        >>> "<h1>tiny</h1>" in page
        True
    """
    sections = [
        _head(report),
        _figures(report),
        _evaluation(report),
        _pictures(report),
        _two(_by_step(report), _ranges(report)),
        _two(_blocks(report), _reliability(report)),
        _two(_search(report), _folds(report)),
        _samples(report),
        _details(report),
    ]
    style = importlib.resources.files("planish.quant").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(_name(report))}: planish report</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in sections if part)}\n</main></body></html>\n"
    )


def _name(report: Json) -> str:
    return str(report.get("model") or "A quantized model")


def _head(report: Json) -> str:
    method = str(report["method"])
    line = f"quantized by <b>{escape(method.partition('(')[0])}</b>"
    version = report.get("planish")
    made = f" with planish {escape(str(version))}" if version else ""
    return f"<header><h1>{escape(_name(report))}</h1><p>{line}{made}</p></header>"


def _subject(report: Json) -> tuple[str, Json]:
    evaluations: Json = report.get("evaluations") or {}
    name = str(report.get("subject", ""))
    return name, evaluations.get(name) or {}


def _figures(report: Json) -> str:
    """The few figures that decide."""
    before, after = report.get("bytes_before"), report.get("bytes_after")
    base, (_, ours) = (report.get("evaluations") or {}).get("base") or {}, _subject(report)
    cards: list[tuple[str, str, str]] = []
    if before and after:
        cards.append(
            (
                f"{after / 1e6:,.1f} MB",
                f"in memory, from {before / 1e6:,.1f} MB",
                f"{before / after:.1f}&times; smaller",
            )
        )
    if stored := report.get("bytes_stored"):
        told = escape(report.get("stored_as") or "the checkpoint's tensors")
        cards.append((f"{stored / 1e6:,.1f} MB", "on disk", told))
    if base.get("perplexity") and ours.get("perplexity"):
        old, new = base["perplexity"][0], ours["perplexity"][0]
        if old is not None and new is not None:
            cards.append((f"{new:.2f}", "perplexity", f"{old:.2f} in float"))
    if ours.get("agreement"):
        cards.append((f"{100 * ours['agreement'][0]:.1f} %", "same next token", "most probable one, as in float"))
    if ours.get("kl"):
        cards.append((f"{ours['kl'][0]:.3f}", "KL divergence", "nats a token, from float"))
    if report.get("psnr"):
        cards.append((f"{report['psnr']:.1f} dB", "PSNR", "of pictures, to float's of the same seeds"))
    if ours.get("cosine"):
        cards.append((f"{ours['cosine'][0]:.4f}", "cosine", "of outputs, to float"))
    made = "".join(f"<li><b>{a}</b><span>{b}</span><small>{c}</small></li>" for a, b, c in cards)
    return f'<ul class="cards">{made}</ul>' if cards else ""


def _evaluation(report: Json) -> str:
    evaluations: Json = report.get("evaluations") or {}
    if not evaluations:
        return ""
    subject, ours = _subject(report)
    columns = [
        ("perplexity", "perplexity", ".2f"), ("difference", "loss, nats a token", "+.4f"),
        ("kl", "KL from float", ".4f"), ("agreement", "same top token", ".3f"),
        ("relative_error", "relative error", ".3g"), ("cosine", "cosine to float", ".4f"),
    ]  # fmt: skip
    columns = [c for c in columns if any(e.get(c[0]) for e in evaluations.values())]
    head = "".join(f"<th>{label}</th>" for _, label, _ in columns)
    calibrated = any(e.get("smooth_ece") is not None for e in evaluations.values())
    head += "<th>smooth ECE</th>" * calibrated + "<th>size</th><th>tokens/s</th>"
    rows = []
    for name, entry in evaluations.items():
        base = name == "base"
        cells = "".join(
            "<td>&ndash;</td>" if base and key != "perplexity" else _cell(entry.get(key), form)
            for key, _, form in columns
        )
        if calibrated:
            cells += _calibration_cell(entry)
        cells += f"<td>{entry['bytes'] / 1e6:,.1f} MB</td><td>{entry['tokens_per_second']:,.0f}</td>"
        marked = ' class="subject"' if name == subject else ""
        rows.append(f"<tr{marked}><th>{escape('float' if base else name)}</th>{cells}</tr>")
    some: Json = next(iter(evaluations.values()))
    told = f"{some['tokens']:,} tokens in {some['windows']:,} windows"
    text = ((report.get("data") or {}).get("evaluated_on") or {}).get("text")
    told += f" of {escape(str(text))}" if text else ""
    told += f"; {100 * some['confidence']:.4g} % intervals below the figures, paired by window where against float."
    losses: list[tuple[str, str, float, float, float]] = []
    for name, entry in evaluations.items():
        if name != "base" and entry.get("difference"):
            value, low, high = (math.nan if v is None else float(v) for v in entry["difference"])
            losses.append((name, "ours" if name == subject else "rival", value, low, high))
    verdict = ""
    if ours.get("difference"):
        says = "lossless: the interval contains zero" if ours.get("lossless") else "the loss is real, and this large"
        verdict = (
            f" <b>{escape(subject)}</b>: {says if ours['difference'][1] is not None else 'too few windows to say'}."
        )
    plot = whiskers("Loss against float", "loss against float, nats a token", losses) if losses else ""
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = f'<div class="scroll"><table>{body}</table></div>'
    beside = f'<div class="two below"><div>{plot}</div><p>{told}{verdict}</p></div>' if plot else f"<p>{told}</p>"
    return _section("Is it still the same model?", table + beside)


def _cell(estimate: Sequence[float | None] | None, form: str) -> str:
    if not estimate or estimate[0] is None:
        return "<td>&ndash;</td>"
    value, low, high = estimate
    interval = "" if low is None or high is None else f"<small>{low:{form}} … {high:{form}}</small>"
    return f"<td>{value:{form}}{interval}</td>"


def _calibration_cell(entry: Json) -> str:
    if entry.get("smooth_ece") is None:
        return "<td>&ndash;</td>"
    found: Json = entry.get("calibration") or {}
    known = found.get("floor") is not None
    floor = f"<small>{found['floor']:.4f} if calibrated, p = {found['p_value']:.2g}</small>" if known else ""
    return f"<td>{entry['smooth_ece']:.4f}{floor}</td>"


def _blocks(report: Json) -> str:
    blocks = report.get("blocks") or []
    points = [(float(i), b["error"]) for i, b in enumerate(blocks) if b.get("error") is not None]
    if len(points) < 2:
        return ""
    x = Axis("block", -0.5, len(blocks) - 0.5)
    y = axis_of("relative squared error", [p[1] for p in points], log=True)
    told = "Squared error of each block's output relative to float, that of all blocks before it included."
    made = chart("Error by block", x, y, [Series("error", points, dots=True)])
    return _section("Where the error arises", f"{made}<p>{told}</p>")


def _reliability(report: Json) -> str:
    subject, _ = _subject(report)
    evaluations: Json = report.get("evaluations") or {}
    series: list[Series] = []
    grey: list[tuple[float, float, float]] = []
    for name, kind in (("base", "base"), (subject, "ours")):
        found = (evaluations.get(name) or {}).get("calibration")
        if found:
            rows = [row for row in found["curve"] if None not in row and row[2] > 0.02]
            error = evaluations[name]["smooth_ece"]
            label = f"{'float' if name == 'base' else name} (smooth ECE {error:.4f})"
            grey = [(x, low, high) for x, *_, low, high in rows]
            band = [(x, low, high) for x, _, _, low, high, *_ in rows]
            series.append(Series(label, [(row[0], row[1]) for row in rows], kind, band=band))
    if not series:
        return ""
    axes = (Axis("confidence in the most probable token", 0, 1), Axis("how often it was right", 0, 1))
    diagonal = Series("", [(0.0, 0.0), (1.0, 1.0)], "faint", band=grey)
    told = (
        "On the diagonal, the model is right as often as it believes to be. Bands in colour: the curve's interval; "
        f"in grey: where the curve of {'the quantized' if subject in evaluations else 'the'} model would lie, "
        "were it calibrated."
    )
    drawn = chart("Reliability diagram", *axes, [diagonal, *series])
    return _section("Does it know what it knows?", f"{drawn}<p>{told}</p>")


def _search(report: Json) -> str:
    made = []
    for name, found in (report.get("search") or {}).items():
        points = curve_of(found)
        if len(points) >= 3:
            best = min(points, key=lambda p: p[1])
            x = axis_of(name, [p[0] for p in points])
            y = axis_of("loss of the search", [p[1] for p in points], log=min(p[1] for p in points) > 0)
            plain = found.get("none")
            lines = [Series("searched", points, dots=True)]
            if isinstance(plain, int | float):
                lines.append(Series("without", [(x.low, plain), (x.high, plain)], "rival"))
                y = axis_of(y.label, [*(p[1] for p in points), plain], log=y.log)
            told = f"Least at {escape(name)} = {short(best[0])}."
            made.append(chart(f"Loss by {name}", x, y, lines) + f"<p>{told}</p>")
    return _section("What the search saw", "".join(made)) if made else ""


def curve_of(found: object) -> list[tuple[float, float]]:
    """Return the points of a finding that maps numbers to numbers, in order; none if it is something else.

    Example:
        >>> curve_of({"none": 2.0, "0.5": 1.0, "0.25": 3.0})
        [(0.25, 3.0), (0.5, 1.0)]
    """
    if not isinstance(found, Mapping):
        return []
    points = []
    for key, value in found.items():
        try:
            x = float(key)
        except (TypeError, ValueError):
            continue  # not a number: "none", a layer's name
        if isinstance(value, int | float) and math.isfinite(value) and math.isfinite(x):
            points.append((x, float(value)))
    return sorted(points)


def _folds(report: Json) -> str:
    blocks = [b for b in report.get("blocks") or [] if b.get("folded")]
    kinds = list(dict.fromkeys(kind for b in blocks for kind in b["folded"]))
    if not kinds:
        return ""
    rest = "online" if report.get("online") else "dropped"  # what nothing could absorb
    rows = []
    for kind in kinds:
        cells = []
        for block in blocks:
            state = block["folded"].get(kind)
            word = "left alone" if state is None else "folded" if state else rest
            title = escape(f"{block['name']}, {kind}: {word}")
            cells.append(f'<i class="{word.partition(" ")[0]}" title="{title}"></i>')
        rows.append(f"<dt>{escape(kind)}</dt><dd>{''.join(cells)}</dd>")
    states = [state for b in blocks for state in b["folded"].values()]
    told = f"{sum(states)} of {len(states)} transforms cost nothing at run time: they are in the weights."
    keys = f'<span class="key fold">folded</span><span class="key on">{rest}</span>'
    return _section(
        "What was folded", f'<dl class="folds">{"".join(rows)}</dl><p class="legend">{keys}</p><p>{told}</p>'
    )


def _samples(report: Json) -> str:
    made = []
    for sample in report.get("samples") or []:
        texts = "".join(
            f"<div><h4>{escape(str(name))}</h4><p>{escape(str(text).strip())}</p></div>"
            for name, text in sample["texts"].items()
        )
        made.append(f'<article><h3>{escape(str(sample["prompt"]))}</h3><div class="pair">{texts}</div></article>')
    return _section("In its own words", "".join(made)) if made else ""


def _pictures(report: Json) -> str:
    made = []
    for picture in report.get("pictures") or []:
        name = escape(str(picture["name"]))
        source = escape(f"data:image/png;base64,{picture['png']}")
        made.append(f'<figure><figcaption>{name}</figcaption><img src="{source}" alt="{name}"></figure>')
    return _section("The same seeds, before and after", f'<div class="pictures">{"".join(made)}</div>') if made else ""


def _by_step(report: Json) -> str:
    points = [(float(step), error) for step, error in report.get("error_by_step") or [] if error]
    if len(points) < 2:
        return ""
    x = axis_of("timestep: pictures at the left, noise at the right", [p[0] for p in points])
    y = axis_of("relative squared error", [p[1] for p in points], log=True)
    told = "Squared error of the denoiser's answers relative to float, on the calls that it was fitted to."
    made = chart("Error by timestep", x, y, [Series("error", sorted(points), dots=True)])
    return _section("When the error arises", f"{made}<p>{told}</p>")


def _ranges(report: Json) -> str:
    found = [(name, high / low) for name, (low, high) in (report.get("ranges") or {}).items() if low]
    if not found:
        return ""
    most = sorted(found, key=lambda pair: -pair[1])[:8]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{times:.1f}-fold</dd>" for name, times in most)
    told = "How far the largest input of a layer moves over the timesteps; the layers where it moves most."
    return _section("What changes with the timestep", f'<dl class="ranges">{rows}</dl><p>{told}</p>')


def _details(report: Json) -> str:
    data: Json = report.get("data") or {}
    rows: list[tuple[str, str]] = [("method", str(report["method"]))]
    for key, label in (("calibrated_on", "calibrated on"), ("evaluated_on", "evaluated on")):
        if data.get(key):
            rows.append((label, f"{data[key]['text']}, {data[key]['tokens']:,} tokens"))
    if report.get("seconds"):
        rows.append(("time", f"{report['seconds']:.1f} s"))
    for name, found in (report.get("search") or {}).items():
        if len(curve_of(found)) < 3:
            rows.append((f"search: {name}", json.dumps(found)))
    if report.get("left_in_float"):
        rows.append(("left in float", ", ".join(report["left_in_float"])))
    rows += [(str(k), str(v)) for k, v in (report.get("machine") or {}).items()]
    made = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    return _section("Details", f'<dl class="details">{made}</dl>')


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _two(left: str, right: str) -> str:
    return f'<div class="two">{left}{right}</div>' if left or right else ""
