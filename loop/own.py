"""A user's own Python: the function that `file.py:function` names, with the source it is hashed by."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def function(spec: str, *, what: str) -> tuple[Callable[..., Any], str]:
    """Imports a file and returns (the function of it that `spec` names, the file's source).

    Args:
      spec: "file.py:function", the path from where the process stands.
      what: what it stands for, e.g. "audience"; errors begin with it.

    Raises:
      ValueError: no such file, a file that does not import, no such function.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f'{what} must name a file that exists, got "{file}" at {what}; give a path from where you are')
    source = path.read_bytes()
    module_spec = importlib.util.spec_from_file_location(
        f"{what}_{hashlib.sha256(spec.encode()).hexdigest()[:12]}", path
    )
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f'{what} must be a Python file, got "{file}" at {what}; use file.py:function')
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{what} must be a file that imports, got {said(error)} at {spec}; mend the file") from None
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise ValueError(f'{what} must name a function of {file}, got "{name}" at {what}; it has {known}')
    return found, source.decode("utf-8", "replace")


def said(error: Exception) -> str:
    """An error of somebody's code in one line, with the line of it where it arose."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    line = error.lineno if isinstance(error, SyntaxError) else frame.tb_lineno if frame is not None else None
    at = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{at}"
