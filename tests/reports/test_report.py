"""The page: whole, self-contained, and nothing in it but our own markup."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import mhacut
from mhacut.checkpoint.load import open_checkpoint
from mhacut.commands.inspect import inspect
from mhacut.errors import OutputError, UsageError
from mhacut.inspection.compare import Comparison, LayerComparison
from mhacut.inspection.layers import inspect_model, summary
from mhacut.measuring.accuracy import Figure
from mhacut.plan import Plan, TokenPlan, UnitPlan
from mhacut.report.charts import Line, line_chart
from mhacut.report.history import StoredCurve, StoredCurves, curves_to_json, stored_curves
from mhacut.report.page import page
from mhacut.report.sections import Contents, sections
from mhacut.text import safe

HOSTILE = "</title><script>alert(1)</script>\"'&\x1b[2J\u202e"
VOID = {"br", "input", "link", "meta"}


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, name):
        return [attributes for element, attributes in self.elements if element == name]

    def text(self, name):
        return " ".join(data for element, data in self.texts if element == name)


@pytest.fixture(scope="module")
def contents(slim_of):
    path = slim_of("vit")
    found = inspect_model(open_checkpoint(path))
    layers = tuple(dataclasses.replace(layer, name=layer.name + HOSTILE) for layer in found.layers)
    entry = {"command": HOSTILE, "flops_before": 5, "data": HOSTILE}
    found = dataclasses.replace(
        found, layers=layers, source=HOSTILE, history=(entry,), not_prunable=(HOSTILE,), judged_by=HOSTILE
    )
    curve = StoredCurve(HOSTILE, "v", ((2, 0.5), (4, 0.1), (8, 0.0)), 4)
    sensitivity = StoredCurves((curve,), 2_000_000)
    return Contents(found, layers, None, sensitivity, (Figure(HOSTILE, 1.0, 2.0, HOSTILE, HOSTILE),))


def test_text_never_becomes_markup(contents):
    text = page(contents)
    read = Reader(text)
    assert (len(read.all("script")), len(read.all("style"))) == (0, 1)
    assert "alert(1)" in read.text("h1")
    assert all(char == "\n" or char.isprintable() for char in text)
    assert not any(
        key.startswith("on") or key == "style" for _, attributes in read.elements for key in attributes
    )


def test_nothing_is_fetched(contents):
    read = Reader(page(contents))
    for name, attributes in read.elements:
        for key in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(key)
            assert target is None or target.startswith(("#", "data:")), (name, target)
    policy = next(meta["content"] for meta in read.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "url(" not in read.text("style")
    assert "@import" not in read.text("style")


def test_what_is_seen_is_read_too(contents):
    read = Reader(page(contents))
    assert read.all("html") == [{"lang": "en"}]
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in read.all("svg"))
    names = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in read.elements:
        for key in ("aria-labelledby", "aria-controls", "for"):
            assert attributes.get(key) is None or attributes[key] in names
    assert all(th.get("scope") for th in read.all("th"))
    assert "prefers-color-scheme: dark" in read.text("style")


def test_every_layer_is_in_the_table(contents):
    (section,) = (section for section in sections(contents) if section.title == "Layers")
    assert [row[0] for row in section.table[1:]] == [layer.name for layer in contents.layers]
    unit = contents.layers[0].units["qk"]
    assert section.table[1][2] == f"{unit.now}/{unit.dense}"


def test_points_lie_where_their_numbers_are():
    """Both ends of a line at the corners of the axes, the middle in between; on a logarithmic axis too."""
    for logarithmic, ys in ((False, (1.0, 2.0, 3.0)), (True, (0.01, 0.1, 1.0))):
        line = Line("l", list(zip((0, 1, 2), ys, strict=True)))
        drawn = ElementTree.fromstring(line_chart("t", [line], "x", "y", logarithmic=logarithmic))
        (polyline,) = drawn.iter("polyline")
        points = polyline.get("points").split()
        (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
        assert (x1, y1) == ((x0 + x2) / 2, (y0 + y2) / 2)
        assert x0 < x2
        assert y0 > y2  # SVG counts downwards


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "ys",
    [(97.67, 97.67), (97.66, 97.67), (97.67, 97.6700001), (0.01, 0.01), (16.3, 16.4), (1e9, 1e9)],
)
def test_numbers_on_an_axis_differ(ys, logarithmic):
    """Where all models are equal, or nearly, an axis said the same number five times."""
    line = Line("l", list(zip((80.0, 81.0), ys, strict=True)))
    drawn = ElementTree.fromstring(line_chart("t", [line], "x", "y", logarithmic=logarithmic))
    for anchor, count in (("end", 5), ("middle", 5)):
        written = [one.text for one in drawn.iter("text") if one.get("text-anchor") == anchor]
        numbers = [text for text in written if text not in ("x", "y")]
        assert len(numbers) == count
        assert len(set(numbers)) == count
        assert max(map(len, numbers)) <= 9
        if anchor == "end" and not logarithmic:
            assert max(map(float, numbers)) == pytest.approx(max(ys), rel=1e-3)


# --- curves in a file ---

PLAN = Plan((UnitPlan("blocks.0.attn", "v", 8, ((0, 1, 2), (1, 2, 3))),))


def test_curves_come_back_from_a_history():
    curve = {width: 0.123456 / width for width in range(1, 8)} | {8: 0.0}
    entry = json.loads(
        json.dumps({"budget": 7, "curves": curves_to_json({("blocks.0.attn", "v"): curve}, PLAN)})
    )
    sensitivity = stored_curves([{"command": "older"}, entry, {"command": "finetune"}])
    (found,) = sensitivity.curves
    assert (sensitivity.budget, sensitivity.metric) == (7, "answers")
    assert (found.layer, found.kind, found.chosen) == ("blocks.0.attn", "v", 3)
    assert dict(found.points) == {width: pytest.approx(curve[width], rel=1e-3) for width, _ in found.points}
    assert {3, 8} <= dict(found.points).keys()


GOOD = {"layer": "a", "kind": "v", "points": [[2, 0.5], [4, 0.0]], "chosen": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "other"},
        {"chosen": None},
        {"points": []},
        {"points": [[2, -1.0], [4, 0.0]]},
        {"points": [[2, "x"], [4, 0.0]]},
        {"points": [[2, 1e300], [4, 0.0]]},
        {"points": {"2": 1}},
    ],
)
def test_curves_that_make_no_sense_are_left_out(wrong):
    assert stored_curves([{"curves": [GOOD]}]).curves != ()
    assert stored_curves([{"curves": [{**GOOD, **wrong}]}]) == StoredCurves()
    assert stored_curves([{"curves": 5, "budget": 3}, {"curves": [7]}]) == StoredCurves()


@pytest.mark.parametrize(
    ("entry", "measure", "axis"),
    [
        ({}, "answers", "KL divergence, nats"),
        ({"preserved": {"what": "pooled"}, "divergence_of": "features"}, "features", "over variance"),
        ({"preserved": {"what": "tokens"}, "divergence_of": "dense"}, "dense", "nats per token"),
        ({"preserved": {"what": "tokens"}}, None, "divergence"),
        ({"divergence_of": "features"}, "features", "over variance"),  # of a single output
        ({"divergence_of": HOSTILE}, None, "divergence"),
        ({"divergence_of": ["dense"]}, None, "divergence"),
    ],
)
def test_curves_are_named_by_what_they_measure(contents, entry, measure, axis):
    sensitivity = stored_curves([{"curves": [GOOD], **entry}])
    assert sensitivity.metric == measure
    shown = page(dataclasses.replace(contents, sensitivity=sensitivity))
    text = Reader(shown).text("text")
    assert axis in text
    assert ("KL divergence" in text) == (measure == "answers")


# --- the file ---


def test_inspect_writes_the_page(slim_of, tmp_path):
    target = tmp_path / "report.html"
    found = inspect(slim_of("vit"), html=target)
    assert found.written == (target,)
    text = target.read_text(encoding="utf-8")
    assert summary(found.inspection).replace("'", "&#39;") in text
    with pytest.raises(OutputError, match=r"report\.html.*exists"):
        inspect(slim_of("vit"), html=target)
    inspect(slim_of("vit"), html=target, overwrite=True)
    assert target.read_text(encoding="utf-8") == text


def test_prune_writes_the_page_of_its_run(tiny_vit, tmp_path):
    options = {"flops": "60%", **tiny_vit.options}
    options |= {"calibration_images": 8, "latency": False, "round_to": 4}
    page_file = tmp_path / "run.html"
    result = mhacut.prune(tiny_vit.path, output=tmp_path / "slim.safetensors", report=page_file, **options)
    assert result.report == page_file
    read = Reader(page_file.read_text(encoding="utf-8"))
    titles = [data for element, data in read.texts if element == "h2"]
    assert titles == ["In numbers", "Blocks", "Layers", "Sensitivity", "History"]
    assert f"{100 * result.slim.flops / result.dense.flops:.1f}%" in read.text("td")
    assert str(tmp_path / "slim.safetensors") in read.text("h1")
    record = open_checkpoint(tmp_path / "slim.safetensors").record
    assert "report" not in record.history[-1]["options"]
    sensitivity = stored_curves(record.history)
    assert (sensitivity.budget, sensitivity.metric) == (result.budget, "answers")
    assert {(curve.layer, curve.kind): curve.chosen for curve in sensitivity.curves} == result.plan.widths()
    for curve in sensitivity.curves:
        known = result.curves[curve.layer, curve.kind]
        assert dict(curve.points) == {w: pytest.approx(known[w], rel=1e-3) for w, _ in curve.points}
    # What the file carries is in the page that inspect makes of it.
    inspect(tmp_path / "slim.safetensors", html=tmp_path / "later.html")
    assert "Sensitivity" in Reader((tmp_path / "later.html").read_text(encoding="utf-8")).text("h2")


def test_a_report_is_checked_before_the_work(tiny_vit, tmp_path):
    (tmp_path / "there.html").write_text("mine")
    options = {"flops": "60%", **tiny_vit.options}
    with pytest.raises(OutputError, match=r"there\.html.*exists"):
        mhacut.prune(tiny_vit.path, report=tmp_path / "there.html", data_dir="missing", **options)
    with pytest.raises(UsageError, match=r"report='run.txt': expected a name that ends in .html"):
        mhacut.prune(tiny_vit.path, report="run.txt", **options)
    with pytest.raises(UsageError, match=r"html='report.txt': expected a name that ends in .html"):
        inspect(tiny_vit.path, html="report.txt")
    assert (tmp_path / "there.html").read_text() == "mine"


def test_bars_of_a_block_are_its_tokens_and_widths(contents):
    """A block's attention and MLP stand in one row; tokens only where some are merged."""
    layers = contents.inspection.layers
    compared = tuple(
        LayerComparison(layer.name, layer.family, {}, (5, 3), 0.1, 0.2, 10 - index)
        for index, layer in enumerate(layers)
    )
    comparison = Comparison("dense", (10, 8), (4, 3), compared, 1.0, 0.1, 8, "images")
    merging = dataclasses.replace(contents.inspection, tokens=TokenPlan(merged=(1, 0)))
    for inspection, columns in ((contents.inspection, 3), (merging, 4)):
        shown = dataclasses.replace(contents, inspection=inspection, layers=layers, comparison=comparison)
        (section,) = (section for section in sections(shown) if section.title == "Blocks")
        bars = [bar.find("title").text for bar in ElementTree.fromstring(section.charts[0]).iter("rect")]
        assert len(bars) == 2 * columns * len(layers) // 2  # a bar lies on the whole
        unit = layers[0].units["qk"]
        assert f"{safe(layers[0].name)}: {unit.now} of {unit.dense} channels" in bars
        assert any("10 of 10 tokens" in bar for bar in bars) == (columns == 4)
