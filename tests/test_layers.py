"""Imports point down, and files stay of a size that can be read."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "finetune_jax"
# From the top down; a module imports from its own row or below.
LAYERS = (
    ("main", "pipeline"),
    (
        "modes.train",
        "modes.evaluate",
        "modes.predict",
        "modes.export",
        "modes.plan",
        "modes.reproduce",
    ),
    ("exports",),
    ("population", "predictor"),
    ("run",),
    ("loop", "summary", "overview"),
    ("updates",),
    (
        "setup",
        "evaluation",
        "report",
        "features",
        "domains",
        "forgetting",
        "nonfinite",
        "feeds",
        "together",
    ),
    (
        "step",
        "frozen",
        "identity",
        "checkpoint",
        "optimizer",
        "parallel",
        "preemption",
        "tasks",
        "answering",
        "answers",
        "parts",
        "encoders",
        "inputs",
        "teachers",
        "embeddings",
        "initialise",
        "lsuv",
        "start",
        "random_states",
    ),
    ("data", "models", "pretrained", "workdir", "tables", "modes.options"),
    (
        "mix",
        "schedules",
        "plan",
        "strategies",
        "members",
        "state",
        "algorithms",
        "regularisers",
    ),
    ("masks",),
    (
        "augment",
        "rand_augment",
        "colours",
        "losses",
        "hints",
        "alignment",
        "metrics",
        "entities",
        "matches",
        "config",
        "trees",
        "flops",
    ),
    ("defaults",),
    ("lookup", "clock", "machine", "grid", "lockstep", "aligned", "lines"),
    ("paths",),
    ("errors",),
)
# Within a row: who may import whom.
FORBIDDEN = (
    ("models", ("tasks", "data", "config", "plan")),
    ("data", ("models", "tasks", "pretrained")),
    ("report", ("setup", "evaluation")),
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finet"):
            base = node.module.removeprefix("finetune_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                place = PACKAGE.joinpath(*inner.split("."))
                exists = place.is_dir() or place.with_suffix(".py").exists()
                yield inner if exists else base


def row(module):
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    raise AssertionError(f"{module} is in no layer; add it to LAYERS")


def test_imports_point_down():
    upward = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path)
        if other and row(other) < row(name)
    ]
    assert not upward


def test_models_know_no_task_no_data_and_tasks_not_one_another():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path)
        for part, forbidden in FORBIDDEN
        if name.split(".")[0] == part and other.split(".")[0] in forbidden
    ]
    tasks = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path)
        if name.startswith("tasks.") and other.startswith("tasks.") and name != other
        and other != "tasks.task"
    ]  # fmt: skip
    assert not wrong + tasks


def test_no_file_is_over_500_lines_and_no_function_over_60():
    long = []
    for name, path in modules():
        text = path.read_text()
        if len(text.splitlines()) > 500:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                lines -= len((ast.get_docstring(node) or "").splitlines())
                if lines > (120 if name == "run" else 60):
                    long.append(f"{name}.{node.name}: {lines}")
    assert not long


def test_no_branch_on_a_strategy():
    assert not [n for n, p in modules() if "strategy ==" in p.read_text()]
