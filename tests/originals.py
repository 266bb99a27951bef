"""Classes and functions of other repositories, from a checkout that a variable names, or skip.

DINOV2, IBOT and CAPI name checkouts of facebookresearch/dinov2, bytedance/ibot and
facebookresearch/capi. None of their code is in this repository.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def load(
    variable: str, file: str, *names: str, replace: tuple[str, str] = ("", ""), **namespace: Any
) -> SimpleNamespace:
    """Return definitions of a file of a checkout, without running the rest of the file.

    Args:
        variable: the environment variable with the checkout's folder; the test is skipped without.
        file: path within the checkout.
        names: functions, classes and variables to define, at the top level or in a `try`.
        replace: a piece of the file that occurs once, and what is put in its place.
        namespace: what the code imports, by name.

    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs {variable}=<checkout>")
    source = (Path(folder) / file).read_text(encoding="utf-8")
    if replace[0]:
        assert source.count(replace[0]) == 1
        source = source.replace(*replace)
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if _defines(node, names)]
    code = compile(tree, file, "exec")  # annotations are not evaluated: as in this file
    variables = {"__name__": file, **namespace}
    exec(code, variables)
    return SimpleNamespace(**{name: variables[name] for name in names})


def _defines(node: ast.stmt, names: tuple[str, ...]) -> bool:
    if isinstance(node, ast.Try):
        return any(_defines(child, names) for child in node.body)
    if isinstance(node, ast.Assign):
        return any(ast.unparse(target) in names for target in node.targets)
    return getattr(node, "name", None) in names
