"""Sphinx's settings: ``make docs`` builds the site into build/docs, and runs every page that has code cells."""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import page_kernels  # noqa: E402
from source_links import source_of as linkcode_resolve  # noqa: E402, F401

BUILD = HERE.parent / "build"
os.environ["PYTHONPATH"] = str(HERE.parent)  # of the pages' kernels: they use the problems in scaling/
os.environ["IPYTHONDIR"] = str(page_kernels.profile(BUILD / "ipython"))

project = "slt-jax"
author = "the slt-jax authors"
copyright = "the slt-jax authors"
release = version_of("slt-jax")
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "repository_links",
]
exclude_patterns = ["_ext"]

# --- pages
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(page_kernels.cache(BUILD / "notebooks", HERE.parent))
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 900  # seconds a cell, on a machine that is busy with other work
nb_merge_streams = True
nb_render_markdown_format = "myst"
copybutton_exclude = ".linenos, .gp, .go"

# --- the reference
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!slt_jax\.).*"),  # types of other packages have no page here
    ("py:.*", r"slt_jax\.posterior\.flax\.Model"),  # a type variable
    ("py:.*", r"slt_jax\.diagnostics\.quadrature\..*"),  # inside an effective dimension, not for users
]
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # so that several names share one description
napoleon_use_ivar = True

# --- the theme
html_theme = "sphinx_book_theme"
html_title = "slt-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": "https://github.com/slt-jax/slt-jax",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_source_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the side bar has the search already
}
html_copy_source = True
