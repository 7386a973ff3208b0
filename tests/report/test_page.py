import dataclasses
import html
import html.parser
import json
import re

import numpy as np
import pytest
from browsers import browse, find_browser
from PIL import Image

from finetune_jax.data.kind import Example
from finetune_jax.report import plots
from finetune_jax.report.html import classes as report_classes
from finetune_jax.report.html.page import (
    Page,
    ParameterRow,
    PhaseRow,
    Prediction,
    write_page,
)

EVIL = "<script>alert('$x_&')</script>"
SECTIONS = ("results", "curves", "confusion", "examples", "training", "again")
# Appended to a copy of the page; the page itself has no script.
PROBE = """<script>
const rect = (e) => { const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom].map((v) => Math.round(v + 0)); };
const found = {width: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
  sections: Object.fromEntries([...document.querySelectorAll("section, header")].map(
    (e) => [e.id || "header", rect(e)])),
  images: [...document.images].map((i) => i.naturalWidth * i.naturalHeight)};
const out = document.createElement("pre");
out.id = "probe"; out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def example(rng, names, index, size=(16, 16, 1), right=True):
    top = list(names[:4])
    return Prediction(
        example=Example(image=rng.integers(0, 256, size, np.uint8)),
        truth=top[0] if right else top[1],
        top=tuple(zip(top, (0.7, 0.2, 0.06, 0.04))),
        is_right=right,
        name=f"test {index}",
    )


def renamed(page, name):
    """Returns the first example of a page under another name."""
    return dataclasses.replace(page.examples["Right"][0], name=name)


def a_page(*, classes=4, phases=2, names=None, **fields):
    """A page of a made-up run; deterministic."""
    rng = np.random.default_rng(0)
    names = names or [f"class {index}" for index in range(classes)]
    counts = rng.integers(0, 3, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    rows = [
        PhaseRow(
            name=f"phase {index}", first_step=40 * index, end_step=40 * index + 40,
            optimizer="adamw", schedule="cosine", peak_lr=0.1 * 0.3**index,
            batch_stats="update_all", clip_norm=1.0, weight_decay=0.01,
            rates=np.linspace(0.1, 0.01, 40),
        )
        for index in range(phases)
    ]  # fmt: skip
    lines = [
        {
            "step": step,
            "phase": rows[max(step - 1, 0) // 40].name,
            "train/loss": 3 / (1 + step),
            "train/learning_rate": 0.1 / (1 + step),
            "train/accuracy": 1 - 1 / (2 + step),
            "validation/loss": 3.5 / (1 + step),
            "validation/accuracy": 1 - 1.1 / (2 + step),
            "test/loss": None,
        }
        for step in range(0, 40 * phases + 1, 5)
    ]
    final = {
        "validation/accuracy": 0.9139,
        "test/accuracy": 0.9220,
        "test/loss": 0.2549,
    }
    best = final | {"validation/accuracy": 0.9512, "test/loss": 0.2411}
    given = {
        "title": "resnet20 on digits",
        "result": {
            "final": final, "best": best, "best_step": 20, "steps": 40 * phases,
            "params_sha256": "a182", "frozen_sha256": {"phase 0": "9e5a"},
            "examples_per_s": 2091.4, "train_s": 1.53, "wall_s": 27.3,
            "compile_s": 4.1, "cached_phases": ["phase 0"],
        },
        "workdir": "/runs/1",
        "sizes": {"train": 1280, "validation": 360, "test": 360},
        "class_counts": {"validation": (90,) * 4, "test": (90,) * 4},
        "manifest": {
            "began": "2026-11-30T12:04:31", "seed": 7,
            "command": ["/x/bin/python", "/x/finetune_jax/main.py", "--config=c.py:a",
                        "--workdir", "/runs/1", "--config.data.name=a b"],
            "packages": {"jax": "0.10.2"}, "git": {"commit": "38302ee", "dirty": True},
            "device_kind": "cpu", "device_count": 2, "data_fingerprint": "3a09",
        },
        "config": {
            "evaluate": {"best": "validation/accuracy"}, "seed": 7,
            "data": {"batch_size": 32},
        },
        "lines": lines,
        "phases": rows,
        "parameters": [
            ParameterRow(
                name=f"{stage}/{part}", stage=stage, shape=shape,
                scales=tuple(
                    float(stage == "head" or (index and part == "bias"))
                    for index in range(phases)
                ),
            )
            for stage in ("stem", "stage1", "head")
            for part, shape in (("kernel", (3, 3, 16, 16)), ("bias", (16,)))
        ],
        "confusion": (counts, names, "test, 360 examples"),
        "examples": {
            "Right": [example(rng, names, index) for index in range(4)],
            "Wrong": [
                example(rng, names, 5, (300, 200, 3), right=False),
                example(rng, names, 6, (8, 8, 3), right=False),
            ],
        },
    }  # fmt: skip
    return Page(**given | fields)


def written(page, tmp_path, name="page.html"):
    write_page(page, tmp_path / name)
    return (tmp_path / name).read_text()


class Tags(html.parser.HTMLParser):
    """Collects tags; fails where one is closed that is not open."""

    VOID = {"meta", "img", "br", "wbr"}

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def ids(self):
        return [attrs["id"] for _, attrs in self.found if "id" in attrs]

    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_a_page_loads_and_runs_nothing(tmp_path):
    text = written(a_page(), tmp_path)
    tags = Tags(text)
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attrs in tags.found:
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert attrs.get("href", "#").startswith("#"), (tag, attrs)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert {attrs["href"][1:] for tag, attrs in tags.found if tag == "a"} <= set(
        tags.ids()
    )


def test_names_cannot_become_markup(tmp_path):
    names = [EVIL, 'a"b', "it's", "$\\notmath$"]
    page = a_page(classes=4, names=names, title=EVIL)
    page = dataclasses.replace(
        page,
        examples={EVIL: [renamed(page, f'{EVIL}" onload="x')]},
        phases=[
            dataclasses.replace(row, name=f"{row.name}{EVIL}") for row in page.phases
        ],
        manifest={**page.manifest, "command": ["python", EVIL]},
        config={"evaluate": {"best": None}, "text": "</code></pre>" + EVIL},
    )
    tags = Tags(written(page, tmp_path))
    assert "script" not in {tag for tag, _ in tags.found}
    assert not [attrs for _, attrs in tags.found if "onload" in attrs]
    assert tags.text().count("alert") > 10


def test_a_name_in_any_script_or_encoding_is_written(tmp_path):
    names = ["雏菊", "rosé", "\udcff.jpg", "🌷"]
    page = a_page(classes=4, names=names)
    page = dataclasses.replace(
        page, examples={"Right": [renamed(page, "fold/\udce9.jpg")]}
    )
    text = written(page, tmp_path)
    assert text.isascii() and "雏菊" in html.unescape(text)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    first, second = (written(a_page(), tmp_path, n) for n in ("1.html", "2.html"))
    assert first == second
    assert written(a_page(title="another"), tmp_path) != first


def test_every_section_is_there_with_what_it_promises(tmp_path):
    tags = Tags(written(a_page(), tmp_path))
    assert [x["id"] for tag, x in tags.found if tag == "section"] == list(SECTIONS)
    assert len(tags.ids()) == len(set(tags.ids()))
    text = tags.text().replace("\N{NO-BREAK SPACE}", " ")
    for promised in (
        "2026-11-30 12:04", "c.py:a", "data.name=a b", "1,280 train", "/runs/1",
        "92.2 %", "best, step 20; final 91.4 %", "95.1 %", "0.2411", "27 s", "2,352",
        "95 % interval 92.2 to 96.8 %, n = 360", "2 epochs", "step (an epoch is 40",
        "1.5 s of it in updates, 2,091 examples a second, on cached features in 'phase",
        "highest validation accuracy", "test, 360 examples", "frozen: 2,304",
        "3 x 3 x 16 x 16", "head/kernel", "packages.jax", "0.10.2", "frozen_sha256",
        "and with changes that were not committed", '"seed": 7',
        "python -m finetune_jax.main --mode=reproduce --workdir=/runs/1",
        "python -m finetune_jax.main --config=c.py:a --workdir /runs/1 "
        "'--config.data.name=a b'",
    ):  # fmt: skip
        assert promised in text, promised
    assert all(x.get("alt") for tag, x in tags.found if tag == "img")
    assert all(x.get("scope") for tag, x in tags.found if tag == "th")


def test_without_a_best_step_only_the_final_metrics_are_shown(tmp_path):
    page = a_page()
    result = {**page.result, "best_step": None, "best": page.result["final"]}
    text = Tags(written(dataclasses.replace(page, result=result), tmp_path)).text()
    assert "after the last update" in text and "Final" in text
    assert not re.search(r"\b[Bb]est\b", text.partition("What was trained Phases")[0])


def test_the_best_being_the_last_step_is_said_once(tmp_path):
    page = a_page()
    result = {**page.result, "best_step": page.result["steps"]}
    text = Tags(written(dataclasses.replace(page, result=result), tmp_path)).text()
    assert "Best and final" in text and "best, step" not in text


@pytest.mark.parametrize("phases", [1, 10])
def test_what_a_run_does_not_have_leaves_no_empty_section(tmp_path, phases):
    page = a_page(phases=phases, examples={}, confusion=None)
    tags = Tags(written(page, tmp_path))
    assert {"confusion", "examples"}.isdisjoint(tags.ids())
    links = {x.get("href") for _, x in tags.found}
    assert {"#confusion", "#examples"}.isdisjoint(links) and "#curves" in links


def test_a_run_of_which_little_is_known_has_a_page(tmp_path):
    nothing = {"result": {}, "manifest": {"git": None}, "config": {}, "lines": []}
    page = a_page(examples={}, confusion=None, parameters=[], **nothing)
    page = dataclasses.replace(page, phases=[])
    tags = Tags(written(page, tmp_path))
    assert [i for i in tags.ids() if not i.endswith("-title")] == ["again"]
    assert not [tag for tag, _ in tags.found if tag == "img"]


def test_a_regression_has_its_own_metrics_and_curves(tmp_path):
    lines = [
        {
            "step": s,
            "phase": "all",
            "train/loss": 1.0,
            "validation/mae": 2.5e4 / (1 + s),
        }
        for s in range(9)
    ]
    final = {"validation/mae": 2777.7, "validation/loss": float("nan")}
    page = a_page(confusion=None, examples={}, lines=lines)
    result = {"final": final, "best": final, "best_step": None, "steps": 8}
    page = dataclasses.replace(page, result=result)
    tags = Tags(written(page, tmp_path))
    titles = [x["aria-label"] for tag, x in tags.found if tag == "svg"]
    assert [title.partition(" after")[0] for title in titles] == [
        "loss", "MAE", "learning rate of each update",
    ]  # fmt: skip
    shown = tags.text().rpartition("Run it again")[0]
    assert "Validation MAE" in shown and "2,778" in shown
    assert "nan" not in shown and "accuracy" not in shown


@pytest.mark.parametrize("classes", [2, 20, 21, 40, 41, 120])
@pytest.mark.fast_runs("2", "41")
def test_a_confusion_matrix_of_many_classes_names_the_confused(tmp_path, classes):
    page = a_page(classes=classes, lines=[], examples={})
    counts, names, caption = page.confusion
    counts[1, 0] = 77
    tags = Tags(written(page, tmp_path))
    text = tags.text().replace("\N{NO-BREAK SPACE}", " ")
    assert (f"77 of {counts[1].sum()}" in text) == (classes > 2)
    cells = [x["title"] for tag, x in tags.found if tag == "td" and "title" in x]
    told = f"true {names[1]}, predicted {names[0]}: 77"
    assert (told in cells) == (classes <= 40)
    shown = [row["name"] for row in report_classes.confusion(*page.confusion)["rows"]]
    assert shown == list(names) if classes <= 50 else len(shown) == 20
    assert names[1] in shown
    figure = plots.confusion_figure(counts, names, "")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (names[-1] in labels) == (classes <= 40)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert ("77" in numbers) == (classes <= 20)


def test_a_long_curve_is_thinned_and_keeps_its_mean():
    values = np.random.default_rng(0).normal(size=6_000)
    lines = [{"step": i, "phase": "a", "train/loss": v} for i, v in enumerate(values)]
    steps, thinned = plots.points(lines, "train/loss")
    assert len(steps) == plots.MOST_POINTS
    assert np.mean(thinned) == pytest.approx(values.mean())


def test_a_small_image_keeps_its_pixels_and_a_large_one_is_scaled_down():
    small = np.zeros((8, 16, 1), np.uint8)
    assert plots.thumbnail(small)[1:] == (160, 80, True)
    large = np.zeros((1000, 500, 3), np.uint8)
    assert plots.thumbnail(large)[1:] == (80, 160, False)


# In a browser.


@pytest.fixture(scope="module")
def browser():
    return find_browser()


@pytest.mark.parametrize(
    "width", [pytest.param(1280, marks=pytest.mark.exhaustive), 800]
)
@pytest.mark.slow
def test_a_browser_shows_every_section_and_nothing_sticks_out(tmp_path, browser, width):
    names = [f"n{i:08d}-a_class_name_without_any_space_{i}" for i in range(120)]
    path, copy = tmp_path / "page.html", tmp_path / "copy.html"
    page = a_page(classes=120, phases=10, names=names)
    text = written(page, tmp_path)
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"))
    dumped = browse(browser, copy, width, 1000, "--dump-dom")
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dumped)
    assert probe, dumped[-500:]
    found = json.loads(html.unescape(probe[1]))
    assert found["width"] <= width
    assert found["images"] and all(found["images"])
    assert set(found["sections"]) == {"header", *SECTIONS}
    assert all(0 <= x[0] < x[2] <= width for x in found["sections"].values())

    picture = tmp_path / "page.png"
    browse(browser, path, width, found["height"] + 50, f"--screenshot={picture}")
    image = Image.open(picture).convert("RGB")
    assert len(image.getcolors(2**24)) > 500
    pixels = np.asarray(image).astype(int)
    for name, (left, top, right, bottom) in found["sections"].items():
        dark = pixels[top:bottom, left:right].max(axis=-1) < 100
        assert 0.001 < dark.mean() < 0.5, name
