"""The IPython kernels that run the pages, and where their outputs are kept."""

import ast
import hashlib
import shutil
from pathlib import Path

_CONFIG = """
c = get_config()  # noqa: F821
c.InteractiveShellApp.matplotlib = "inline"
c.InlineBackend.figure_formats = {"retina"}
"""


def profile(folder: Path) -> Path:
    """``folder`` as IPython's own, with pictures as the last value of a cell shown inline."""
    target = folder / "profile_default/ipython_kernel_config.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_CONFIG)
    return folder


def cache(folder: Path, repository: Path) -> Path:
    """A folder for the outputs of pages with the present code: any change but of words runs all pages again."""
    digest = hashlib.sha256()
    for package in ("slt_jax", "kernels", "scaling"):
        for file in sorted((repository / package).rglob("*.py")):
            digest.update(without_words(file.read_text()).encode())
    digest.update((repository / "pyproject.toml").read_bytes())
    present = folder / digest.hexdigest()[:16]
    for old in folder.glob("*"):
        if old != present:
            shutil.rmtree(old)
    return present


def without_words(source: str) -> str:
    """The program of ``source``, without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
