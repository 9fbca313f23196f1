"""What autodoc shows of docstrings: links, signatures, members.

Resolves `Name` and `deq.Name` in docstrings to what the reference documents as deq_jax....Name.

Sphinx looks for a name in the module where it is used and at its full path only.  Numbers of arXiv
become links, too.
"""

from __future__ import annotations

import re
from types import FunctionType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5}|math-ph/\d{7})")
TOP = ("class", "data", "exception", "function", "module")


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Returns a link if the reference documents one object of this name, else None."""
    if node.get("refdomain") != "py":
        return None
    domain: Any = env.get_domain("py")
    name = node["reftarget"]
    name = f"deq_jax.{name.removeprefix('deq.')}" if name.startswith("deq.") else name
    found = [
        (path, entry)
        for path, entry in domain.objects.items()
        if path == name or path.endswith(f".{name}")
        if not entry.aliased and ("." in name or entry.objtype in TOP)
    ]
    # `deq_jax.Task` before `deq_jax.training.task.Task`.
    found.sort(key=lambda pair: pair[0].count("."))
    if not found or (len(found) > 1 and found[0][0].count(".") == found[1][0].count(".")):
        return None
    _, entry = found[0]
    docname = node.get("refdoc", env.docname)
    return make_refnode(app.builder, docname, entry.docname, entry.node_id, contnode, name)


def link_arxiv(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes a link of "arXiv 2106.14342"."""
    for i, line in enumerate(lines):
        lines[i] = ARXIV.sub(r"`arXiv \1 <https://arxiv.org/abs/\1>`__", line)


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str, Any] | None:
    """Leaves out what says nothing: the call of a protocol, the parent of a Linen module."""
    if getattr(obj, "_is_protocol", False):
        return "", None
    if signature is None:
        return None
    short = re.sub(r", parent=<flax[^>]*>, name=None", "", signature)
    return re.sub(r"<function (\w+)>", r"\1", short), returns


def skip_default(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """A function that is the default of a field is documented elsewhere, under its own name."""
    own = getattr(obj, "__qualname__", "").split(".")
    borrowed = isinstance(obj, FunctionType) and (len(own) == 1 or own[-1] != name)
    return True if what == "class" and borrowed else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", link_arxiv)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-skip-member", skip_default)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
