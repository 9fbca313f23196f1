"""Formulas as MathML, which browsers show without a script from the network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging


def _visit(writer: Any, node: nodes.Element) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        text = latex2mathml.tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        text = writer.encode(node.astext())
    tag = "div" if block else "span"
    writer.body.append(f'<{tag} class="math-ml">{text}</{tag}>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_visit, None), (_visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
