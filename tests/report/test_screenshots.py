"""Pages in a browser: runs of all kinds of data, sweeps; wide, narrow, light, dark."""

import html
import json
import re

import clicks
import numpy as np
import pytest
import small
import sweep_folders
import text_configs
import texts
from browsers import browse, find_browser
from PIL import Image
from sweep_runs import SweepRun

from finetune_jax import config as configs
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.sweeps.populations.population import run_population
from finetune_jax.training.run import run

pytestmark = pytest.mark.slow

WIDTHS = (1280, 420)
HEIGHT = 2_600
# Forms in one window.
AT_ONCE = 4
EVERYWHERE = {"results", "curves", "training", "inputs", "again"}
OF_A_FORM = {
    "image": EVERYWHERE | {"confusion", "examples"},
    "text": EVERYWHERE | {"confusion", "examples"},
    "table": EVERYWHERE | {"confusion", "examples"},
    "segmentation": EVERYWHERE | {"segments"},
    "population": {"settings", "curves", "best", "failed", "inputs", "again"},
    "sweep": {"results", "differences", "curves", "costs", "again"},
    "cases": {"results", "differences", "tuning", "curves", "costs", "failed", "again"},
    "search": {"search", "results", "curves", "again"},
}
# Appended to a copy of each page, which is shown in a frame; tells the page around it.
PROBE = """<script>
const box = (e) => e.getBoundingClientRect();
const scrolls = (e) => e.closest(".wide");
const isSeen = (e) => box(e).width > 0 && !e.closest("details:not([open])");
const out = [...document.querySelectorAll("body *")].filter((e) => isSeen(e)
  && !scrolls(e) && !e.closest(".under, svg") && box(e).right > innerWidth + 1);
const clipped = [...document.querySelectorAll("dt, dd, th, td, p, li, h1, h2, h3, b")]
  .filter((e) => isSeen(e) && !e.closest(".under, .above") && !e.matches(".clamp")
  && getComputedStyle(e).overflowX != "visible" && e.scrollWidth > e.clientWidth + 1);
const meet = (a, b) => box(a).left < box(b).right - 1 && box(b).left < box(a).right - 1
  && box(a).top < box(b).bottom - 1 && box(b).top < box(a).bottom - 1;
const over = [];
for (const group of document.querySelectorAll(".left, .below, .above, .tiles, .facts")) {
  const parts = [...group.children].filter((e) => e.textContent.trim());
  parts.forEach((a, i) => parts.slice(i + 1).forEach((b) => {
    if (meet(a, b)) over.push(a.textContent + " / " + b.textContent); }));
}
parent.postMessage({name: NAME, width: document.documentElement.scrollWidth,
  inner: innerWidth, ids: [...document.querySelectorAll("section")].map((e) => e.id),
  empty: [...document.querySelectorAll("section")].filter((e) => box(e).height < 60)
    .map((e) => e.id),
  out: out.slice(0, 5).map((e) => e.outerHTML.slice(0, 200)),
  clipped: clipped.slice(0, 5).map((e) => e.outerHTML.slice(0, 200)),
  wide: [...document.querySelectorAll("#results .wide")]
    .filter((e) => e.scrollWidth > e.clientWidth + 1).length,
  over, images: [...document.images].filter((i) => !i.naturalWidth).length,
  height: document.documentElement.scrollHeight}, "*");
</script>"""
# Listens before it loads the frames: a page that is ready early would not be heard.
FRAMES = """<!DOCTYPE html><body style="margin:0"><script>
const found = [];
addEventListener("message", (e) => { found.push(e.data);
  document.getElementById("found").textContent = JSON.stringify(found); });
</script><pre id="found" hidden></pre><div style="display:flex">%s</div>"""


def image_run(folder):
    plan = (
        Phase(name="head", steps=20, rules=small.HEAD, peak_lr=3e-2),
        Phase(name="one", steps=1, peak_lr=1e-3),
    )
    overrides = [
        ("evaluate.best", "validation/accuracy"),
        ("evaluate.every_steps", "7"),
    ]
    small_model = {"model": "cnn", "convolutions": (4,), "dense": (8,)}
    run(small.config(plan=plan, overrides=overrides, **small_model), folder)


def text_run(folder):
    place = texts.write(folder / "data")
    phase = Phase(name="all", steps=6, peak_lr=1e-2)
    run(text_configs.config(place, plan=(phase,), model={"layers": 1}), folder)


def table_run(folder):
    place = folder / "data"
    place.mkdir(parents=True)
    clicks.write(place / "all.txt", clicks.rows(300))
    given = configs.load("configs/criteo.py:table_mlp")
    given.data.update(dir=str(place / "all.txt"), batch_size=64)
    given.data.update(train="all[:60%]", validation="all[60%:80%]", test="all[80%:]")
    given.model.update(width=2, hidden=(8,))
    given.plan = as_config((Phase(name="all", steps=1, peak_lr=1e-2),))
    given.parallel.devices = 1
    run(small.resolved(given), folder)


def segmentation_run(folder):
    given = configs.load("configs/segmentation.py:tiny")
    given.init.pretrained = None
    given.init.fresh = ()
    given.model.update(name="cnn", convolutions=(4, 4), dense=(), taps=())
    given.plan = as_config((Phase(name="all", steps=4, peak_lr=1e-2),))
    given.parallel.devices = 1
    run(small.resolved(given), folder)


def population_run(folder):
    members = [
        [["plan[0].peak_lr", rate], ["seed", seed]]
        for rate in (1e-2, 1e-3, 1e30)
        for seed in (0, 1, 2)
    ]
    members = tuple(tuple(map(tuple, member)) for member in members)
    config = small.config(
        model="mlp", hidden=(8,), plan=(Phase(name="all", steps=9),),
        overrides=[("evaluate.best", "validation/accuracy"),
                   ("evaluate.every_steps", "3"), ("population", str(members))],
    )  # fmt: skip
    run_population(config, folder)


def sweep_run(folder):
    SweepRun(folder, steps=12, rates=3, seeds=2).run("run")


def cases_run(folder):
    sweep_folders.page_of(sweep_folders.cases_of_arms(folder))


def search_run(folder):
    sweep_folders.page_of(sweep_folders.a_search(folder))


RUNS = {
    "image": image_run,
    "text": text_run,
    "table": table_run,
    "segmentation": segmentation_run,
    "population": population_run,
    "sweep": sweep_run,
    "cases": cases_run,
    "search": search_run,
}


@pytest.fixture
def pages(tmp_path_factory):
    """The page of a run of each form."""
    folder = tmp_path_factory.mktemp("runs")
    for form, make in RUNS.items():
        (folder / form).mkdir()
        make(folder / form)
    return {form: folder / form / "report" / "index.html" for form in RUNS}


@pytest.fixture
def looked_at(pages, tmp_path_factory):
    """What a browser tells of each form and width, and pictures of the forms by scheme."""
    found, pictures = {}, {"light": {}, "dark": {}}
    forms = list(pages)
    # A window of all pages would be wider than a browser draws.
    for first in range(0, len(forms), AT_ONCE):
        group = {form: pages[form] for form in forms[first : first + AT_ONCE]}
        folder = tmp_path_factory.mktemp("frames")
        told, drawn = looked_at_once(group, folder)
        found |= told
        for scheme, picture in drawn.items():
            pixels = np.asarray(Image.open(picture).convert("L")).astype(int)
            for at, form in enumerate(group):
                left = at * sum(WIDTHS)
                pictures[scheme][form] = pixels[:, left : left + sum(WIDTHS)]
    return found, pictures


def looked_at_once(pages, folder):
    """Returns what a browser tells of some pages, and the paths of pictures by scheme."""
    browser, frames = find_browser(), []
    for form, path in pages.items():
        for width in WIDTHS:
            name = f"{form}-{width}"
            probe = PROBE.replace("NAME", json.dumps(name))
            copy = folder / f"{name}.html"
            copy.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
            frames.append(
                f'<iframe src="{copy.name}" width={width} height={HEIGHT} '
                'style="border:0;flex:none"></iframe>'
            )
    (folder / "all.html").write_text(FRAMES % "".join(frames))
    window, options = (
        (sum(WIDTHS) * len(pages), HEIGHT),
        ["--virtual-time-budget=60000"],
    )
    dumped = browse(browser, folder / "all.html", *window, *options, "--dump-dom")
    told = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', dumped)
    assert told, dumped[-500:]
    pictures = {}
    for scheme, number in (("light", 1), ("dark", 0)):
        pictures[scheme] = picture = folder / f"{scheme}.png"
        options[1:] = [f"--blink-settings=preferredColorScheme={number}"]
        browse(
            browser, folder / "all.html", *window, *options, f"--screenshot={picture}"
        )
    return {one["name"]: one for one in json.loads(html.unescape(told[1]))}, pictures


def test_every_page_has_its_sections_and_ink_on_its_paper(looked_at):
    """One test: the pages take a minute to make."""
    found, pictures = looked_at
    nothing_is_missing_or_sticks_out(found)
    for scheme, paper in (("light", 255), ("dark", 24)):
        ink_is_on_the_paper(found, pictures[scheme], paper)


def nothing_is_missing_or_sticks_out(found):
    assert set(found) == {f"{form}-{width}" for form in RUNS for width in WIDTHS}
    for name, one in found.items():
        form, _, width = name.partition("-")
        assert set(one["ids"]) == OF_A_FORM[form], name
        assert one["inner"] == int(width) and one["width"] <= int(width), name
        assert not one["images"], name
        if form in ("sweep", "cases") and width == "1280":
            assert not one["wide"], name
        for fault in ("out", "clipped", "over", "empty"):
            assert not one[fault], (name, fault, one[fault])


def ink_is_on_the_paper(found, pictures, paper):
    for form in RUNS:
        left = 0
        for width in WIDTHS:
            height = min(found[f"{form}-{width}"]["height"], HEIGHT)
            part = pictures[form][:height, left : left + width]
            assert np.bincount(part.ravel(), minlength=256).argmax() == paper
            is_ink = np.abs(part - paper) > 100
            assert 0.003 < is_ink.mean() < 0.4, (form, width)
            # Rows of text on the whole page, not in one place.
            assert is_ink.any(axis=1).mean() > 0.25, (form, width)
            left += width
