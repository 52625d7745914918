"""Loads an object from a user's Python file, given as ``FILE.py:NAME`` on the command line."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
import zlib
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

from unirl_kernels.commands.cli import CommandFailed


def load(text: str, option: str) -> object:
    """Run a Python file and return the object with a name.

    A file runs once per process. Its folder is added to the end of ``sys.path``, so that it can import its neighbours.

    Args:
        text: ``FILE.py:NAME``.
        option: what errors call ``text``.

    Returns:
        The object.

    Raises:
        CommandFailed: when ``text`` has another form, the file cannot be run, or it has no such name.
    """
    file, colon, name = text.rpartition(":")
    if not (colon and file.endswith(".py") and name.isidentifier()):
        raise CommandFailed(f"{option} must be FILE.py:NAME, got {text!r}")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise CommandFailed(f"{option} {text}: there is no file {path}")
    try:
        module = _module(path)
    except (Exception, SystemExit) as error:
        raise CommandFailed(f"{option} {text}: running the file failed: {_reason(error, path)}") from error
    if not hasattr(module, name):
        raise CommandFailed(f"{option} {text}: the file has no {name!r}; it has {', '.join(_names(module)) or 'none'}")
    return getattr(module, name)


@cache
def _module(path: Path) -> ModuleType:
    # A unique name, so that a user's file does not replace an installed module of the same name.
    identifier = re.sub(r"\W", "_", path.stem)
    name = f"{identifier}_{zlib.crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _reason(error: BaseException, path: Path) -> str:
    """The error in one line, with the line number in the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{type(error).__name__} in line {error.lineno}: {error.msg}"
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {said}"


def _names(module: ModuleType) -> list[str]:
    """Names that the file defines, without those that it imports."""

    def imported(x: object) -> bool:
        elsewhere = isinstance(x, type | FunctionType | BuiltinFunctionType) and x.__module__ != module.__name__
        return elsewhere or isinstance(x, ModuleType) or type(x).__module__ == "__future__"

    return [name for name, x in vars(module).items() if not (name.startswith("_") or imported(x))]
