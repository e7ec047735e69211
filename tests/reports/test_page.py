"""Pages and figures from hand-made folders: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.reports import write_demo_report, write_run_report
from drkd.reports.curves import draw_kd_report, draw_learning_curves, draw_losses, summed_terms
from drkd.reports.figures import render_png
from drkd.reports.files import Curve, read_run
from drkd.reports.page import Section, _describe_facts, say_quick, write_page
from drkd.reports.pictures import Box, match_boxes, read_compared_images
from drkd.reports.relations import draw_relation_matrices, read_explanation


class Sources(HTMLParser):
    """Collects whatever the page would load from elsewhere, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def check_pictures(folder, names):
    assert {path.stem for path in (folder / "figures").iterdir()} == set(names)
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 200
            # Something is drawn.
            assert np.asarray(image.convert("L")).std() > 5


def test_demo_report(demo):
    page = write_demo_report(demo)
    assert page == demo / "report.html"
    text = page.read_text()
    found = Sources(text)
    assert len(found.sources) == 7
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in found.sources)
    assert not found.tags & {"script", "link", "iframe", "one", "b"}
    assert "zero &amp; &lt;one&gt;" in text
    assert "# &lt;script&gt;" in text
    for words in ("0123abc", "2.15.0", "50&nbsp;%", "16² px", "drkd distill recipe.yaml"):
        assert words in text
    check_pictures(
        demo,
        [
            *("headline", "learning_curves", "detections", "pixel_relations", "relation_matrices"),
            *("distillation", "losses"),
        ],
    )
    assert "| **student + DRKD** | **50.0** |" in (demo / "table.md").read_text()
    assert "A quick run" not in text


def test_a_quick_demo_says_that_it_shows_no_learning():
    """That it stands on the page is in tests/recipes/test_demo.py, whose run is one."""
    assert say_quick(16).startswith("A quick run of 16 steps, which shows that everything works and not that it learns")
    assert (say_quick(300), say_quick(None)) == ("", "")


def test_the_same_files_give_the_same_page(run):
    first = write_run_report(run).read_bytes()
    assert write_run_report(run).read_bytes() == first


@pytest.mark.parametrize(
    "name",
    [
        *("teacher/evaluation.json", "student/run.json", "drkd/evaluation.json"),
        *("detections.json", "explain.npz", "images/1.png"),
    ],
)
def test_missing_files_are_named(demo, name):
    (demo / name).unlink()
    with pytest.raises(DrkdError, match=re.escape(name)):
        write_demo_report(demo)
    assert not (demo / "report.html").exists()


def test_a_run_report_escapes_the_name_of_its_folder(run):
    text = write_run_report(run).read_text()
    assert "Run run &lt;b&gt;" in text
    assert "Status: finished." in text
    check_pictures(run, ["learning_curves", "losses", "distillation"])


def test_a_run_is_called_by_its_folder_wherever_one_stands(run, monkeypatch):
    monkeypatch.chdir(run)
    # The path stays as it was given.
    assert write_run_report(Path()) == Path("report.html")
    assert "Run run &lt;b&gt;" in Path("report.html").read_text()


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend():
    curves = {"val/ap": Curve((0, 1), (0.1, 0.2))}
    (panel,) = draw_learning_curves({"_try": curves, "other": curves}).axes
    assert [text.get_text().strip() for text in panel.get_legend().get_texts()] == ["_try", "other"]


def test_without_a_validation_there_are_no_learning_curves(run):
    curves = (run / "metrics.csv").read_text()
    assert "val/ap" in curves and "Learning curves" in write_run_report(run).read_text()
    (run / "metrics.csv").write_text(curves.replace("val/", "other/"))
    (run / "figures" / "learning_curves.png").unlink()
    text = write_run_report(run).read_text()
    assert "Learning curves" not in text and "Losses" in text
    assert not (run / "figures" / "learning_curves.png").exists()


def test_a_run_that_just_started_has_a_report(run):
    for name in ("metrics.csv", "evaluation.json", "cost.json"):
        (run / name).unlink()
    (run / "run.json").write_text(json.dumps({"status": "running", "seed": None}))
    assert "Status: running." in write_run_report(run).read_text()
    assert not (run / "figures/distillation.png").exists()


@pytest.mark.parametrize("draw", [draw_losses, draw_kd_report, lambda curves: draw_learning_curves({"run": curves})])
@pytest.mark.parametrize("values", [None, (0.0, 0.0), (float("nan"), 1.0), (1.0,)])
def test_odd_curves_are_drawn(draw, values):
    names = ("task/a", "kd/b/p3", "kd/b", "ratio/b", "val/ap")
    curves = {} if values is None else {name: Curve(tuple(range(len(values))), values) for name in names}
    assert render_png(draw(curves), dpi=40).startswith(b"\x89PNG")


def test_a_term_is_drawn_within_its_span(run):
    # As tests/recipes/comparison/test_cell.py has it of the tables: 15 in the span's first tenth, 6 in its last.
    values = (math.inf, *(20.0 - step if 5 <= step < 15 else 0.0 for step in range(1, 20)))
    curves = {"bare/response": Curve(tuple(range(20)), values), "bare/never": Curve((0,), (math.nan,))}
    (panel,) = draw_losses(curves, spans=True).axes
    assert list(panel.lines[0].get_xdata()) == list(range(5, 15)) and len(panel.lines) == 2
    (panel,) = draw_losses(curves).axes
    assert list(panel.lines[0].get_xdata()) == list(range(1, 20))
    assert [text.get_text() for text in draw_kd_report(curves, spans=True).axes[1].texts] == ["-60 %  (15 to 6)"]
    assert not read_run(run).has_spans
    for span, told in (("null", False), ("[0.0, 1.0]", False), ("[0.5, 1]", True)):
        (run / "recipe.yaml").write_text(f"method: {{init_args: {{methods: {{one: {{response_span: {span}}}}}}}}}\n")
        assert read_run(run).has_spans == told


def test_a_level_is_left_out_where_its_sum_is_there():
    curve = Curve((0,), (1.0,))
    curves = dict.fromkeys(("kd/pixel/p3", "kd/pixel", "kd/feature/p3", "task/box"), curve)
    assert list(summed_terms(curves, "kd/")) == ["pixel", "feature/p3"]


@pytest.mark.parametrize("count", [0, 1, 30])
def test_any_number_of_instances_is_drawn(count):
    square = np.zeros((count, count))
    arrays = {
        "images": np.zeros((1, 20, 20, 3), np.uint8),
        "boxes": np.tile(np.array([[-3.0, 5.0, 40.0, 5.2]]), (count, 1)),
        "image_index": np.zeros(count, np.int64),
        **dict.fromkeys(("relation_matrix_student", "relation_matrix_teacher", "relation_filter"), square),
    }
    assert render_png(draw_relation_matrices(arrays), dpi=40).startswith(b"\x89PNG")


def test_explanation_names_the_wrong_array(demo):
    path = demo / "explain.npz"
    arrays = dict(np.load(path))
    assert read_explanation(path)["image_index"].shape == (len(arrays["boxes"]),)
    np.savez(path, **{**arrays, "boxes": arrays["boxes"][:-1]})
    with pytest.raises(DrkdError, match=r"explain\.npz: array boxes"):
        read_explanation(path)
    np.savez(path, **{**arrays, "image_index": np.array(99)})
    with pytest.raises(DrkdError, match="image_index"):
        read_explanation(path)


@pytest.mark.parametrize(
    "box", [{"box": [0, 1, 2], "label": 1, "score": 0.5}, {"box": [0, 1, 2, 3], "label": 10, "score": 0.5}, 7]
)
def test_a_wrong_detection_is_named(demo, box):
    path = demo / "detections.json"
    content = json.loads(path.read_text())
    content["images"][1]["student"] = [box]
    path.write_text(json.dumps(content))
    with pytest.raises(DrkdError, match=r"images\[1\]\.student\[0\]"):
        read_compared_images(path)


def test_every_object_is_found_at_most_once():
    truth = [Box((0, 0, 10, 10), 1, 1.0), Box((20, 0, 30, 10), 1, 1.0)]
    found = [
        Box((1, 0, 11, 10), 1, 0.5),  # the second to find the first object
        Box((0, 0, 10, 10), 1, 0.9),
        Box((20, 0, 30, 10), 2, 0.9),  # wrong class
        Box((20, 0, 30, 30), 1, 0.9),  # overlap of a third
    ]
    assert match_boxes(found, truth) == [None, 0, None, None]


def test_every_line_of_a_text_is_a_paragraph(tmp_path):
    page = write_page(tmp_path / "page.html", title="T", lead="L", sections=[Section("A", "one <b>\ntwo")], runs={})
    assert '<p class="text">one &lt;b&gt;</p><p class="text">two</p>' in page.read_text()


def test_the_extremes_of_a_term_are_seen() -> None:
    steps = tuple(range(20))
    curves = {
        "ratio/silent": Curve(steps, (0.0,) * 19 + (0.4,)),
        "ratio/heard": Curve(steps, (0.5,) * 20),
        "bare/rising": Curve(steps, tuple(1.0 + value for value in steps)),
        "bare/woken": Curve(steps, (0.0,) * 10 + (0.2,) * 10),
    }
    left, right = draw_kd_report(curves).axes
    middles = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"]
    assert middles == [1e-6, 0.5]
    ticks = [tick for tick in left.xaxis.get_ticklocs() if left.get_xlim()[0] <= tick <= left.get_xlim()[1]]
    assert 3 <= len(ticks) <= 9
    words = {text.get_text(): text.xy[0] for text in right.texts}
    # Means of the first two and of the last two: 1.5 and 19.5, 13 times as much.
    assert words.keys() == {"+1200 %  (1.5 to 19.5)", "-  (0 to 0.2)"}
    assert all(place < right.get_xlim()[1] for place in words.values())


def test_a_page_shows_a_command_that_can_be_pasted() -> None:
    command = ["drkd", "distill", "--config=my data/a.yaml", '--method={"class_path": "drkd.methods.PKD"}']
    (_, shown), *_ = _describe_facts({"command": command})
    assert shlex.split(shown) == command
