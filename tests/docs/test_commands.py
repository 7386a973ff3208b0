"""Every command and every Python block of README, docs and experiments works as written.

A page is followed from its top in an empty folder, with small files under the names that
the page uses. Only `reductions` are appended to a command, so that it trains little.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import clicks
import jax
import ml_collections
import numpy as np
import pages
import pictures
import pytest
import questions
import texts
import weight_files
from PIL import Image

from finetune_jax import config as configs
from finetune_jax import main, plans
from finetune_jax.models import resnet

# Commands that are not run here, each with a reason.
NOT_RUN = {
    r"make ": "makes an environment or runs tests, as CI does",
    r"\S+ -m pip install": "installs; the environment of the tests has it",
    r"\S+ scripts/(bench|fuzz|fault)\w+\.py": "measures for minutes or hours",
    r"\S+ -m finetune_jax.config.document": "tests/config/test_config.py compares them",
    r"\S+ scripts/models_page": "counts every model; tests/docs/test_models_page.py",
    r".* --mode=drill": "restarts a run for minutes; tests/modes/test_drill.py",
    r"\S+ scripts/launch_local": "several processes; tests/cluster/test_slurm.py",
    r".* --launcher=slurm": "needs a cluster; tests/cluster/test_sweeps.py",
    r"\S+ -m pytest|\S+ tests/": "tests, which CI runs",
    r".* --sweep=ablation.py|.*compare RUN_A": "many runs; tests/docs/test_ablations.py",
    r"\S+ experiments/|.* --sweep=experiments/": "a study of minutes to hours",
    r".*:stanford_dogs": "neither the data nor the weights come with a package",
    r".*configs/pneumonia.py": "a convolution at 28 pixels; test_configs.py runs it",
    r".*--config.parallel.topology=": "needs the compiler for TPUs, 700 MB",
    r".* --mode=reproduce --workdir=RUN": "RUN is any run; tests/modes/test_reproduce.py",
    r"sbatch|srun|for |do |done|source |export |kill ": "needs a cluster or a shell",
}
# Commands that CI plans only, which checks command line, data and weights; they compile
# for long, and other tests train these configs.
PLANNED = "photos,finetune|sentences.csv,finetune|segmentation|criteo|photos_resnet18"
# Pages about studies and measurements: their commands need real data, and hours.
ONLY_READ = ("experiments/", "docs/performance")
# Pages whose blocks another test runs.
ELSEWHERE = ("architecture.md",)
# Blocks that import these are run by tests/inference/test_export_published.py.
ORACLES = "torch|torchvision|timm|transformers"
# Pages see one of these, as on a user's machine, unless a command asks for more.
ALL_DEVICES = jax.devices


def why_not(text):
    """Returns why a command is not run; None if it is."""
    return next((why for what, why in NOT_RUN.items() if re.match(what, text)), None)


def is_read_only(page):
    return str(page.relative_to(pages.ROOT)).startswith(ONLY_READ)


EVERY = [block for page in pages.PAGES for block in pages.blocks(page)]
COMMANDS = [block for block in EVERY if block.language == "sh"]


def test_every_python_command_names_the_environment():
    bare = re.compile(r"(?<![\w/])(?<!-m )(python3?|pip|pytest) [-\w]")
    wrong = [b.place for b in COMMANDS if bare.search(b.text)]
    for folder in ("configs", "scripts", "experiments"):
        for file in (pages.ROOT / folder).rglob("*.py"):
            if bare.search(file.read_text().split('"""')[1]):
                wrong.append(str(file.relative_to(pages.ROOT)))
    assert not wrong


def test_every_reason_not_to_run_a_command_is_needed():
    unused = [
        pattern
        for pattern in NOT_RUN
        if not any(re.match(pattern, block.text) for block in COMMANDS)
    ]
    assert not unused


def test_python_is_fenced_so_that_it_is_run():
    begins = re.compile(r"    (from [\w.]+ import |import |config\.[\w.]+ = )")
    wrong = [
        f"{page.relative_to(pages.ROOT)}: {line.strip()}"
        for page in pages.PAGES
        for line in re.sub(r"```.*?```", "", page.read_text(), flags=re.S).splitlines()
        if begins.match(line)
        and "# default: " not in line  # As --mode=config prints it.
    ]
    assert not wrong


def test_links_lead_somewhere():
    wrong = []
    for page in pages.PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(pages.ROOT)}: {target}")
    assert not wrong


WORDS = (*texts.WORDS, *(word for word in questions.WORDS if word not in texts.WORDS))
TOKENIZER = texts.tokenizer(WORDS)
ENCODER = {
    "layers": 1, "width": 16, "heads": 2, "hidden": 16, "positions": 64,
    "vocabulary": len(json.loads(TOKENIZER)["model"]["vocab"]),
}  # fmt: skip


def reductions(arguments):
    """Returns what is appended to a command that has --config, so that it is short."""
    given = [word for word in arguments if word.startswith("--config=")]
    if not given or "--mode=config" in arguments:
        return []
    address = given[0].partition("=")[2]
    pairs = [
        tuple(word.removeprefix("--config.").split("=", 1))
        for word in arguments
        if word.startswith("--config.")
    ]
    config, problems = configs.resolve(configs.load(address), pairs)
    assert not problems
    found = ["evaluate.batch_size=32"]
    for index, phase in enumerate(config.plan):
        place = f"plan[{index}]"
        if phase.epochs is not None:
            found.append(f"{place}.epochs=1")
        if (phase.steps or 0) > 2:
            found.append(f"{place}.steps=2")
        if phase.warmup_steps:
            found.append(f"{place}.warmup_steps=1")
    if (config.data.image_size or 0) > 32:  # Photos are small in these tests.
        found.append("data.image_size=32")
        found += ["data.resize=32"] if config.data.resize else []
    if config.data.text:  # One layer at random in place of a published encoder.
        found += ["init.pretrained=None", "data.batch_size=8"]
        found += [f"model.{key}={value}" for key, value in ENCODER.items()]
        found += ["data.max_tokens=48", "data.buckets=(48,)"]
        found += ["data.tokenizer=file:tokenizer.json"]
        found += ["data.overlap=16"] if config.data.overlap else []
    if config.model.name == "efficientnet_lite0":  # Slow to compile.
        found += ["model.name=resnet18", "init.pretrained=file:resnet18.pth"]
    if config.population:
        found.append("population=()")
    return [f"--config.{text}" for text in found]


def run_command(text, *, whole):
    """Runs a command, in this process unless it sets PYTHONPATH.

    Args:
        text: The command.
        whole: Whether commands that take long are run too, or planned only.
    """
    environment, words, output = pages.words_of(text)
    if not whole and "--config=" in text and re.search(PLANNED, text):
        words.append("--mode=plan")
    assert words[0] == pages.PYTHON
    out, path = io.StringIO(), environment.pop("PYTHONPATH", None)
    with pytest.MonkeyPatch.context() as patch:
        if "--config.parallel.devices=" in text:
            patch.setattr(jax, "devices", ALL_DEVICES)
        for name, value in environment.items():
            patch.setenv(name, value)
        if path:
            patch.setenv("PYTHONPATH", os.pathsep.join([path, str(pages.ROOT)]))
            assert subprocess.run([sys.executable, *words[1:]]).returncode == 0
        elif words[1:3] == ["-m", "finetune_jax.main"]:
            assert main.run([*words[3:], *reductions(words[3:])]) == 0
        else:
            is_module = words[1] == "-m"
            patch.setattr(sys, "argv", words[2:] if is_module else words[1:])
            call = runpy.run_module if is_module else runpy.run_path
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                call(words[2] if is_module else words[1], run_name="__main__")
    if output:
        pathlib.Path(output).write_text(out.getvalue())


def names_of_a_config_file():
    """Returns what a block that shows a part of a config file may use."""
    names = {"config": configs.default(), "configs": configs, "grid": configs.grid}
    return names | {"ml_collections": ml_collections} | vars(plans)


def run_python(block, names):
    """Runs a block, or writes the file that it is; libraries to compare with may lack."""
    if block.file:
        path = pathlib.Path(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    elif not re.search(rf"^(import|from) ({ORACLES})\b", block.text, re.M):
        text = block.text.replace("224, 224", "32, 32")  # The photos of these tests.
        exec(compile(text, block.place, "exec"), names)
        # Another export has another `load`, in a folder of the same relative name.
        sys.modules.pop("load", None)
        sys.path_importer_cache.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a folder with small files under the names that the pages use."""
    folder = tmp_path_factory.mktemp("files")
    pictures.make_folder(folder / "photos", suffix=".jpg")
    pictures.make_folder(folder / "new_photos", examples=2, suffix=".jpg")
    first_blocks = {
        k: v for k, v in resnet18().items() if not re.match(r"layer\d\.1", k)
    }
    weight_files.write(folder / "resnet18.pth", first_blocks)
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (60, 16, 16), np.uint8)
    np.savez(folder / "images.npz", x=grey, y=np.arange(60) % 3)
    np.savez(folder / "vectors.npz", x=rng.normal(size=(60, 8)), y=np.arange(60) % 3)
    _write_street(folder / "street", rng)
    texts.write(folder / "texts")
    for file in (folder / "texts").glob("*.tsv"):
        file.write_text("sentence\tlabel\n" + file.read_text())
    (folder / "tokenizer.json").write_text(TOKENIZER)
    rows = [f"{text},{('bad', 'good')[int(label)]}\n" for text, label in texts.rows(60)]
    (folder / "sentences.csv").write_text("sentence,label\n" + "".join(rows))
    lines = [row[0] for row in texts.rows(5, seed=9)]
    (folder / "new.txt").write_text("\n".join(lines) + "\n")
    questions.write(folder / "questions")
    asked = [json.dumps(row) + "\n" for row in questions.rows(4, seed=9)]
    (folder / "new.jsonl").write_text("".join(asked))
    _write_visits(folder, rng)
    clicks.write(folder / "train.txt", clicks.rows(200))
    _write_payments(folder, rng)
    _write_official_pneumonia(folder / "pneumoniamnist.npz", rng)
    return folder


def resnet18():
    """Returns tensors of torchvision's ResNet-18 whose outputs are of order 1."""
    tensors = weight_files.published("torchvision or timm", "resnet18", classes=1000)
    for name, array in tensors.items():
        if array.ndim > 1:
            tensors[name] = array * np.sqrt(2 / array[0].size, dtype=np.float32)
        else:
            is_one = name.endswith(("running_var", "weight"))
            tensors[name] = np.full_like(array, float(is_one))
    return tensors


def _write_street(folder, rng):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(20):
        mask = np.zeros((40, 40), np.uint8)
        mask[:, : rng.integers(10, 30)] = 1
        image = np.stack([mask * 150, 200 - mask * 90, mask + 90], axis=-1)
        Image.fromarray(image).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.csv").write_text("sky\nroad\n")


def _write_visits(folder, rng):
    """Writes a table of customers, and one without the label."""
    cities = ("Rome", "Bern", "Oslo")
    rows = []
    for _ in range(120):
        age, city, visits = rng.integers(18, 80), rng.integers(3), rng.integers(0, 30)
        rows.append((age, cities[city], visits, "yes" if visits > 12 else "no"))
    for name, last in (("visits.csv", 4), ("new.csv", 3)):
        head = ("age", "city", "visits", "bought")[:last]
        kept = rows if last == 4 else rows[:5]
        text = [",".join(map(str, row[:last])) + "\n" for row in (head, *kept)]
        (folder / name).write_text("".join(text))


def _write_payments(folder, rng):
    """Writes card payments, and some without the label."""
    head = ["Time", "V1", "Amount", "Class"]
    rows = [
        [str(n), f"{rng.normal():.3f}", f"{n % 9}.5", str(n % 2)] for n in range(90)
    ]
    clicks.write(folder / "fraud.csv", rows, head, delimiter=",")
    new = [row[:3] for row in rows[:5]]
    clicks.write(folder / "new_payments.csv", new, head[:3], delimiter=",")


def _write_official_pneumonia(path, rng):
    """Writes a file with the array names of MedMNIST."""
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (4, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [1], [0]], np.uint8)
    np.savez(path, **arrays)


def followed():
    for page in pages.PAGES:
        if not is_read_only(page) and page.name not in ELSEWHERE:
            if any(
                b.language == "python" or not why_not(b.text)
                for b in pages.blocks(page)
            ):
                yield page


@pytest.fixture
def smaller(monkeypatch):
    """Has ResNet-18 one block a stage, which is quick to compile."""
    shape = resnet.Shape((1, 1, 1, 1), bottleneck=False)
    made = functools.partial(resnet._resnet, shape)
    monkeypatch.setitem(resnet.MODELS, "resnet18", made)


@pytest.mark.parametrize(
    "whole",
    [pytest.param(False, marks=pytest.mark.slow),
     pytest.param(True, marks=pytest.mark.exhaustive)],
    ids=("ci", "whole"),
)  # fmt: skip
@pytest.mark.parametrize("page", [*followed()], ids=lambda page: page.name)
def test_a_page_works_from_top_to_bottom(
    page, whole, smaller, files, tmp_path, monkeypatch, no_pictures
):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    for name in ("configs", "scripts", "experiments"):
        (tmp_path / name).symlink_to(pages.ROOT / name)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    names = names_of_a_config_file()
    for block in pages.blocks(page):
        with told_with(block):
            if block.language == "python":
                run_python(block, names)
            elif not why_not(block.text):
                run_command(block.text, whole=whole)


@contextlib.contextmanager
def told_with(block):
    """Adds the place and the text of a block to an error in it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{block.place}: {block.text}")
        raise
