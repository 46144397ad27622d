"""The page of a compile: one file, its pictures, and what they were measured on."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import DataError
from fxquant.report.html import Section
from fxquant.report.html.graph import GRADES, HEIGHT, WIDTH, grade, layout
from fxquant.report.html.page import table, write_page
from fxquant.report.html.plot import Plot
from fxquant.report.layers import LayerPicture, picture
from fxquant.spec import QParams
from tests.fxquant.small_networks import Residual, compiled, images, module

_EMPTY = {"meta", "link", "img", "br", "path", "rect", "circle"}


class Page(HTMLParser):
    """The tags of a page: nested as they must be, with every id and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.boxes: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in _EMPTY:
            self.open.append(tag)
        self.ids += [str(values["id"])] if "id" in values else []
        self.links += [str(values[name]) for name in ("href", "src") if name in values]
        self.boxes += [str(values["href"])] if "box" in str(values.get("class")).split() else []

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("html") / "report.html"
    compiled().report.to_html(path)
    return path.read_text()


def pictures(q: fxquant.CompiledModel) -> dict[str, LayerPicture]:
    assert q.report.layers is not None
    return {each.node: each for each in q.report.layers.measure(q.report.coverage)}


def test_a_page_reads_nothing_but_itself(text: str) -> None:
    page = Page(text)
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.findall(r"url\(|@import|fetch\(|https?:", text)


def test_every_link_leads_to_one_place(text: str) -> None:
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_every_operation_is_a_box_that_leads_to_its_layer(text: str) -> None:
    q = compiled()
    nodes = {row.node for row in q.report.coverage} | {"x", "output"}
    assert set(Page(text).boxes) == {f"#layer-{node}" for node in nodes}


def test_errors_are_those_of_compare() -> None:
    q = compiled()
    found = pictures(q)
    for row in fxquant.compare(q, images()).rows:
        if row.what == "activation":
            assert found[row.name].accumulated_db == pytest.approx(row.sqnr_db)
        if row.what == "weight":
            weight = found[row.name].weight
            assert weight is not None
            assert weight.sqnr_db == pytest.approx(row.sqnr_db)
        if row.what == "bias":
            assert found[row.name].bias_db == pytest.approx(row.sqnr_db)


def test_a_layer_names_what_it_reads() -> None:
    found = pictures(compiled())
    assert set(found["conv2"].inputs) == {"conv1", "stem"}
    assert found["output"].inputs == ("head",)


def test_a_picture_counts_every_value_and_what_the_grid_cuts_off() -> None:
    grid = QParams(torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), 0, 15, torch.uint8)
    shown = picture(torch.tensor([0.0, 1.2, 15.4, 20.0, -3.0, 7.0, 7.0, 7.0]), grid)
    assert sum(shown.histogram.counts) == 8
    assert (shown.histogram.low, shown.histogram.high) == (-3.0, 20.0)
    assert (shown.histogram.grid_low, shown.histogram.grid_high) == (0.0, 15.0)
    assert shown.clipped == 2 / 8
    assert (shown.codes, shown.max_error) == (16, 5.0)


def test_a_weight_with_a_scale_a_channel_is_shown_in_its_steps() -> None:
    weight = pictures(compiled())["stem"].weight
    assert weight is not None
    assert weight.histogram.unit == "steps of the channel's scale"
    assert (weight.histogram.grid_low, weight.histogram.grid_high) == (-127.0, 127.0)


def test_what_stays_float_has_its_reason() -> None:
    model = module(lambda self, x: torch.sin(self.conv(x)), conv=nn.Conv2d(3, 4, 1))
    assert pictures(compiled(model))["sin"].reason == "sin has no integer form"


def test_a_loaded_file_has_a_page_without_pictures(tmp_path: Path) -> None:
    compiled().save(tmp_path / "m.fxq")
    fxquant.load(tmp_path / "m.fxq").report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "holds no float network" in page
    assert not Page(page).boxes


def test_pictures_follow_the_target(tmp_path: Path) -> None:
    q = compiled(target="reference")
    assert q.report.layers is not None
    lowered = q.to_target("x86").report.layers
    assert lowered is not None
    assert (q.report.layers.target, lowered.target) == ("reference", "x86")
    assert lowered.stages["x86"] is not q.stages.get("x86")


def test_names_are_text_and_not_html(tmp_path: Path) -> None:
    write_page(tmp_path / "x.html", "<b>", "&", [Section("a", table(("<i>",), [("<u>",)]))])
    page = (tmp_path / "x.html").read_text()
    assert "<b>" not in page
    assert "<u>" not in page
    assert "&lt;u&gt;" in page


def test_nothing_half_written_stays_where_a_page_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match=r"report\.html: cannot be written"):
        compiled(Residual()).report.to_html(tmp_path / "report.html")


def test_boxes_do_not_overlap() -> None:
    inputs = {"x": (), "a": ("x",), "b": ("x",), "c": ("x", "a"), "d": ("a", "b", "c"), "e": ("x",)}
    places, width, height = layout(inputs)
    for one, other in itertools.combinations(places.values(), 2):
        assert abs(one.x - other.x) >= WIDTH or abs(one.y - other.y) >= HEIGHT
    assert all(WIDTH / 2 <= at.x <= width - WIDTH / 2 for at in places.values())
    assert all(at.y + HEIGHT / 2 <= height for at in places.values())
    assert all(places[s].y < places[name].y for name, sources in inputs.items() for s in sources)


def test_colours_tell_errors_apart() -> None:
    assert grade(None) == "none"
    assert grade(GRADES[0] - 1) == "g0"
    assert grade(float("inf")) == f"g{len(GRADES)}"


def test_an_axis_has_round_ticks_inside_its_range() -> None:
    plot = Plot("p", (0.13, 9.7), (-3.0, 5.0), x_name="x", y_name="y")
    ticks = re.findall(r'class="tick"[^>]*>([^<]*)<', plot.render())
    assert ticks == ["2", "4", "6", "8"]
    assert plot.x(0.13) == plot.left
    assert plot.y(5.0) == plot.top
