"""Settings of the documentation: ``sphinx-build -W -n docs docs/_build``."""

import os
import sys
from pathlib import Path

from deq_jax import __version__

HERE = Path(__file__).parent
# Of the tutorials' time most goes into compiling programs that run for seconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# The flag tables are made from the experiments, which are not installed.
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "deq_jax"
author = "the deq_jax authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "flag_tables",
    "docstrings",
    "links",
    "mathml",
]
exclude_patterns = ["_build", ".jupyter_cache"]
html_theme = "sphinx_book_theme"
html_title = f"deq_jax {version}"
html_math_renderer = "mathml"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme_options = {"navbar_start": [], "navbar_persistent": []}

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
# The build has no network: intersphinx would fetch an inventory from each of these packages.  Their
# names stay without a link; all other names in single backticks must lead somewhere.
OTHERS = "app|collections|dataclasses|datasets|flax|jax|jnp|nn|nnx|numpy|os|safetensors|tfds"
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})(\..*)?")]
