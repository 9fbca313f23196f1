"""Settings of the documentation: ``sphinx-build -W -n docs docs/_build``."""

from deq_jax import __version__

project = "deq_jax"
author = "the deq_jax authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", ".jupyter_cache"]
html_theme = "sphinx_book_theme"
html_title = f"deq_jax {version}"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files outside of docs/; the tests follow them
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

default_role = "py:obj"  # `name` in a docstring is a link where the name is documented
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
# Names of other packages and private helpers; no inventory is fetched.
nitpick_ignore_regex = [("py:.*", ".*")]
