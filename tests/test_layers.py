"""Packages import downward, and files stay of a size that can be read."""

import ast
import functools
import pathlib
import re
import tokenize

PACKAGE = pathlib.Path(__file__).parents[1] / "finetune_jax"
# The packages, from the bottom up, and the packages that each may import. `...` is all
# packages below.
ORDER = {
    "core": (),
    "config": ("core",),
    "plans": ("core", "config"),
    "models": ("core",),
    "weights": ("core", "config", "models"),
    "optim": ("core", "config", "plans"),
    "data": ("core", "config"),
    "parallel": ("core",),
    "tasks": ("core", "config", "plans", "models", "weights", "data"),
    "features": ...,
    "evaluation": ...,
    "report": ("core", "config", "data", "parallel"),
    "training": ...,
    "sweeps": ...,
    "inference": ...,
    "modes": ...,
    "pipeline": ...,
    "main": ...,
    "sweep": ...,
}
# Folders to which anybody adds modules.
OPEN_SETS = {PACKAGE / "models", PACKAGE / "tasks", PACKAGE / "data" / "sources"}
APART = (("sweeps", "inference"), ("inference", "sweeps"))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finet"):
            base = node.module.removeprefix("finetune_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                place = PACKAGE.joinpath(*inner.split("."))
                exists = place.is_dir() or place.with_suffix(".py").exists()
                yield inner if exists else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("finetune_jax."):
                    yield alias.name.removeprefix("finetune_jax.")


def allowed(package):
    names = tuple(ORDER)
    below = ORDER[package]
    return names[: names.index(package)] if below is ... else below


def test_every_package_is_in_the_table():
    found = {name.split(".")[0] for name, _ in modules()} - {"__init__"}
    assert found == set(ORDER)
    top = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert sum(path.suffix == ".py" for path in top) <= 5
    assert sum(path.is_dir() for path in top) <= 16


def test_packages_import_downward_only():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        if name != "__init__"
        for other in imports(path)
        for ours, theirs in [(name.split(".")[0], other.split(".")[0])]
        if theirs
        and ours != theirs
        and (theirs not in allowed(ours) or (ours, theirs) in APART)
    ]
    assert not wrong


def test_tasks_do_not_import_one_another():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path)
        if name.startswith("tasks.") and name.count(".") == 1 and name != "tasks.task"
        and other.startswith("tasks.") and other.count(".") == 1
        and other not in ("tasks.task", "tasks.components", "tasks.objectives", name)
    ]  # fmt: skip
    assert not wrong


def functions():
    """Yields module, name and node of every function and method."""
    for name, path in modules():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def test_files_folders_and_functions_are_of_a_size_that_can_be_read():
    long = [n for n, p in modules() if len(p.read_text().splitlines()) > 500]
    for folder in {path.parent for _, path in modules()} - OPEN_SETS:
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        if count > 15:
            long.append(f"{folder}: {count} modules")
    for name, node in functions():
        lines = node.end_lineno - node.lineno + 1
        lines -= len((ast.get_docstring(node) or "").splitlines())
        if lines > 60:
            long.append(f"{name}.{node.name}: {lines} lines")
    assert not long


def test_public_functions_take_at_most_eight_arguments():
    many = []
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        # `make` of a task and constructors of models unpack a section of the config.
        unpacks = name.startswith(("tasks.", "models.")) and name.count(".") == 1
        is_private = node.name.startswith("_")
        if count > 8 and not (is_private or unpacks):
            many.append(f"{name}.{node.name}: {count} arguments")
    assert not many


# Sentences that a reader has to translate.
OBSCURE = re.compile(
    r"^(What |Of (the|a|its|all|one|each|every|this)\b.{0,60}$)"
    r"|^ *\w+: (Of (the|a|its|all|one|each|every|this|which)\b.{0,60}\.?|Likewise\.?)$",
    re.MULTILINE,
)


def test_docstrings_and_comments_name_their_nouns():
    found = []
    for name, path in modules():
        for node in nodes(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                found += [f"{name}: {m.group()}" for m in OBSCURE.finditer(docstring)]
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT:
                    comment = token.string.lstrip("# ")
                    if comment.startswith(("What ", "Of the ")):
                        found.append(f"{name}: {token.string}")
    assert not found


def test_no_branch_on_a_strategy():
    assert not [n for n, p in modules() if "strategy ==" in p.read_text()]
