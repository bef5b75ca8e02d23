"""Parses a verl command line as the shell, Python and Hydra would: environment, program, Hydra's options, overrides.

The program may follow wrappers: `A=1 nohup env B=2 python -u -m my.main ...`, `ray job submit ... -- C=3 python x.py ...`,
`torchrun ... x.py ...`, `bash -c "..."`. Variable assignments before the program form its environment; words after it go through Hydra's
own argument parser. The configuration that a program composes is read from its source (`@hydra.main`), which is never executed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

VERL_MAIN = "verl.trainer.main_ppo"

_PYTHON = re.compile(r"(python|pypy)[0-9.]*(\.exe)?")
_SHELL = re.compile(r"(ba|z|da|k)?sh")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_OVERRIDE = re.compile(r"[+~]|[^-\s=/][^\s=]*=")
_SHELL_ENDS = re.compile(r"\||\|\||&&|&|;|[0-9&]*>.*|<.*")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
"""Python options that take the next word as their value."""


@dataclass(frozen=True, slots=True)
class Main:
    """A program that Hydra configures; `config_path` and `config_name` come from `@hydra.main`, None if it does not set them."""

    file: Path
    config_path: str | None
    config_name: str | None


@dataclass(frozen=True, slots=True)
class Command:
    """A parsed command line.

    `program` is the program as the user wrote it, empty if the command is only overrides (which means verl's main). `main` is the source of
    its configuration; None if unknown. `unread` lists, as messages, the parts of the command that could not be read.
    """

    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    program: str = ""
    main: Main | None = None
    config_path: str | None = None
    config_name: str | None = None
    config_dir: str | None = None
    multirun: bool = False
    unread: tuple[str, ...] = ()


def read(words: Sequence[str]) -> Command:
    """Parse a command line, given as words or as a single word that holds the whole line, as written in a script.

    Raises:
        ValueError: Hydra's parser refuses the arguments, or the quotes do not match; one line.
    """
    words = [word for word in words if word.strip(" \t\r\n\\")]  # a backslash before trailing blanks leaves a word of blanks
    if len(words) == 1 and any(_PYTHON.fullmatch(os.path.basename(word)) for word in _split(words[0])):
        words = _split(words[0])
    environment: dict[str, str] = {}
    for i, word in enumerate(words):
        name = os.path.basename(word)
        if _PYTHON.fullmatch(name):
            return _python(words[i + 1 :], environment)
        if _SHELL.fullmatch(name):
            return _shell(words[i:], environment)
        if name.endswith(".py"):
            return _hydra(word, _script(word), words[i + 1 :], environment)
        if name in ("torchrun", "accelerate"):
            return _python(words[i + 1 :], environment)
        if word == VERL_MAIN:  # without `python -m`
            return _hydra(word, verl_main(), words[i + 1 :], environment)
        if _ASSIGNMENT.match(word):
            variable, _, value = word.partition("=")
            environment[variable] = value
    if words and not (_OVERRIDE.match(words[0]) or words[0].startswith("-")):
        return Command(program=words[0], unread=(f"{words[0]!r} is not a Python program, so the program that it runs was not checked",))
    return _hydra("", verl_main(), words, {})


def verl_main() -> Path | None:
    """The file of verl's own trainer; None if verl is not installed."""
    return _module(VERL_MAIN, {})


def _split(text: str) -> list[str]:
    """The words of the Python command in a piece of shell script; of the first command if none runs Python."""
    words = shlex.split(re.sub(r"\\[ \t]*\r?\n", " ", text), comments=True)
    ends = [i for i, word in enumerate(words) if _SHELL_ENDS.fullmatch(word) or word.endswith(";")]
    begins = next((i for i, word in enumerate(words) if _PYTHON.fullmatch(os.path.basename(word))), 0)
    end = next((i for i in ends if i > begins), len(words))
    return words[:end]


def _shell(words: Sequence[str], environment: dict[str, str]) -> Command:
    for i, word in enumerate(words[1:], start=1):
        if re.fullmatch(r"-[a-z]*c", word) and i + 1 < len(words):
            inner = read(_split(words[i + 1]))
            found = {**environment, **inner.environment}
            return Command(**{**{name: getattr(inner, name) for name in Command.__slots__}, "environment": found})
        if not word.startswith("-"):
            break
    script = next((word for word in words[1:] if not word.startswith("-")), "its input")
    why = f"the command inside {script} was not checked: put `verl-heddle doctor --` before it in the script"
    return Command(program=" ".join(words[:2]), environment=environment, unread=(why,))


def _python(words: Sequence[str], environment: dict[str, str]) -> Command:
    """Parse the words after `python` or a launcher: the program follows the first -m, or is the first .py file."""
    i = 0
    while i < len(words):
        word = words[i]
        module = re.fullmatch(r"-[bBdEhiIOqsSuvVx]*m(.*)", word)
        if module:
            name = module[1] or (words[i + 1] if i + 1 < len(words) else "")
            rest = words[i + (1 if module[1] else 2) :]
            if name in _RUNNERS:
                return _python(rest, environment)
            return _hydra(name, _module(name, environment), rest, environment)
        if word.endswith(".py"):
            return _hydra(word, _script(word), words[i + 1 :], environment)
        if re.fullmatch(r"-[a-zA-Z]*c", word):
            break
        i += 2 if word in _WITH_VALUE else 1
    return Command(
        program="python", environment=environment, unread=("the command names neither a module (-m) nor a file: nothing was checked",)
    )


_RUNNERS = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch", "debugpy", "cProfile", "pdb", "coverage")
"""Modules that run a different module."""


def _hydra(program: str, file: Path | None, arguments: Sequence[str], environment: dict[str, str]) -> Command:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def error(message: str) -> None:
        raise ValueError(f"Hydra cannot read the arguments of {program or 'the command'}: {message}")

    parser.error = error  # type: ignore[assignment, method-assign]
    given: argparse.Namespace = parser.parse_args(list(arguments))
    main = configured(file, environment) if file is not None else None
    unread = []
    if file is None:
        unread.append(f"{program} was not found, so its configuration was not checked" if program else "verl is not installed here")
    elif main is None:
        unread.append(f"{program} has no readable @hydra.main, so its configuration was not checked")
    elif not _runs_v1(main.file):
        unread.append(
            f"{program} does not mention verl's v1 trainer (main_ppo, TaskRunnerV1), which heddle needs: whether it uses it was not checked"
        )
    return Command(
        tuple(given.overrides),
        environment,
        program,
        main,
        given.config_path,
        given.config_name,
        given.config_dir,
        bool(given.multirun),
        tuple(unread),
    )


def _script(word: str) -> Path | None:
    return Path(word).resolve() if Path(word).is_file() else None


def _module(name: str, environment: dict[str, str]) -> Path | None:
    """The file of a module, found without importing its package; None if there is none."""
    for folder in _search_path(environment):
        base = Path(folder or ".").joinpath(*name.split("."))
        for file in (base.with_name(base.name + ".py"), base / "__main__.py"):
            if file.is_file():
                return file.resolve()
    package, _, rest = name.partition(".")
    try:  # an editable installation is on no path
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        base = Path(folder).joinpath(*rest.split("."))
        for file in (base.with_name(base.name + ".py"), base / "__main__.py"):
            if rest and file.is_file():
                return file.resolve()
    return None


def _search_path(environment: dict[str, str]) -> Iterator[str]:
    yield os.getcwd()
    for paths in (environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")):
        yield from (paths or "").split(os.pathsep)
    yield from sys.path


def configured(file: Path, environment: dict[str, str], deep: bool = True) -> Main | None:
    """The `@hydra.main` of a file, or of the file it imports its main from; None if there is none."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("hydra.main", "main", "hydra_main"):
                    return _decorated(file, decorator)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level] if deep else []
    for node in imports:
        if any("main" in alias.name for alias in node.names):
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                found = _module(str(module), environment)
                main = configured(found, environment, deep=False) if found is not None else None
                if main is not None:
                    return main
    return None


def _decorated(file: Path, decorator: ast.Call) -> Main | None:
    given = dict(zip(("config_path", "config_name", "version_base"), decorator.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in decorator.keywords if keyword.arg}
    found = {}
    for name in ("config_path", "config_name"):
        try:
            found[name] = ast.literal_eval(given[name]) if name in given else None
        except ValueError:
            return None
    return Main(file, found["config_path"], found["config_name"])


def _runs_v1(file: Path) -> bool:
    """Whether a program's source mentions verl's v1 trainer."""
    return re.search(r"TaskRunnerV1|get_trainer_cls", file.read_text(encoding="utf-8", errors="replace")) is not None
