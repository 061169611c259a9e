"""Sphinx: Markdown pages by MyST, the Python API by autodoc."""

from importlib.metadata import version as installed_version

project = "place"
author = "the authors of place"
version = release = installed_version("place-llama")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
exclude_patterns = ["images"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
# types of the reference that have no page here: those of Python itself, and what their owners' modules document
nitpick_ignore_regex = [
    ("py:class", r"(Path|Program|collections\..*|placement\.(inputs|llamacpp|predict)\..*|.*\[.*)")
]

html_theme = "furo"
html_title = "place"
