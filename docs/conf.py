"""The documentation as pages: `sphinx-build docs docs/_build`."""

import session_sync

project = "session_sync"
author = "the authors of session_sync"
version = release = session_sync.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Markdown
myst_heading_anchors = 4  # links to headings as on GitHub, where these pages are read as well
myst_enable_extensions = ["colon_fence"]

# Docstrings: what stands in single backquotes there is code.
default_role = "code"
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_numpy_docstring = False
nitpick_ignore_regex = [
    # Other projects' names: to link them, their index would have to be fetched at each build.
    ("py:.*", r"(telebot|telegram|redis|collections|datetime|os|uuid|typing)\b.*"),
]

html_theme = "furo"
html_title = f"session_sync {release}"
html_show_copyright = False
