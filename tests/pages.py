"""The pages for readers, and the commands and Python blocks in them."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
PYTHON = ".venv/bin/python"
# First words of a line that is a command, after assignments of environment variables.
PROGRAMS = (
    PYTHON, "make", "python", "python3", "pip", "pytest", "uv", "git", "source", "export",
    "sbatch", "srun", "tensorboard", "kill", "for", "do", "done", "bash", "sh",
)  # fmt: skip
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclasses.dataclass(frozen=True)
class Block:
    """A command of a shell, or a block of Python.

    Attributes:
        page: File that has it.
        line: Its first line there, counted from 1.
        language: 'sh' or 'python'.
        text: Its text; a command that goes on over lines is one line.
        file: Name of the file that the page says to save it as; None is run as it is.
    """

    page: pathlib.Path
    line: int
    language: str
    text: str
    file: str | None = None

    @property
    def place(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def is_command(text):
    words = text.split()
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return bool(words) and words[0] in PROGRAMS and "=" not in words[:2]


def blocks(page):
    """Returns the commands and the Python blocks of a page, in order."""
    found, lines, at = [], page.read_text().splitlines(), 0
    while at < len(lines):
        line = lines[at]
        if fence := re.fullmatch(r" *```(\w*)", line):
            end = next(i for i in range(at + 1, len(lines)) if "```" in lines[i])
            inner = lines[at + 1 : end]
            if fence[1] == "python":
                text = "\n".join(inner) + "\n"
                file = _saved_as(lines[:at])
                found.append(Block(page, at + 2, "python", text, file))
            elif fence[1] in ("", "sh", "bash"):
                found += _commands(page, at + 2, inner)
            at = end + 1
        elif line.startswith("    "):
            end = at
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            found += _commands(page, at + 1, lines[at:end])
            at = end
        else:
            texts = re.findall(r"`([^`]+)`", line)
            found += [Block(page, at + 1, "sh", t) for t in texts if _is_whole(t)]
            at += 1
    return found


def _saved_as(before):
    """Returns the name in "Save it as `NAME`:" at the end of the lines before a block."""
    paragraph = "\n".join(before).rstrip().rpartition("\n\n")[2]
    found = re.search(r"[Ss]ave it\s+as\s+`([^`]+)`:$", paragraph)
    return found[1] if found else None


def _is_whole(text):
    """Returns whether a text in a sentence is a command that can be run."""
    words = [word for word in text.split() if not ASSIGNMENT.fullmatch(word)]
    return len(words) > 1 and words[0] in (PYTHON, "python", "make", "pip", "pytest")


def _commands(page, first, lines):
    found, number = [], 0
    while number < len(lines):
        start, text = number, lines[number].strip()
        while text.endswith("\\") and number + 1 < len(lines):
            number += 1
            text = f"{text[:-1].rstrip()} {lines[number].strip()}"
        if is_command(text):
            found.append(Block(page, first + start, "sh", text))
        number += 1
    return found


def words_of(text):
    """Returns the environment, the words and the output file of a command."""
    words = shlex.split(text, comments=True)
    environment = {}
    while ASSIGNMENT.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    output = None
    if ">" in words:
        place = words.index(">")
        words, output = words[:place], words[place + 1]
    return environment, words, output
