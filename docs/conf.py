"""Configuration of the documentation: `sphinx-build -W docs site`."""

import re

import tb_optax

project = "tb_optax"
author = "The tb_optax authors"
copyright = author
version = release = tb_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
default_role = "code"
exclude_patterns = ["examples"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "sphinx_book_theme"
html_title = "tb_optax"
html_theme_options = {"show_toc_level": 2}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False


def tables_of_markdown(app, what, name, obj, options, lines):
    """Turn the tables of a docstring from Markdown to what Sphinx reads."""
    del app, what, name, obj, options
    found, table = [], []
    for line in [*lines, ""]:
        if line.lstrip().startswith("|"):
            table.append(line)
            continue
        if table:
            indent = re.match(r"\s*", table[0]).group()
            found += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            for row in [table[0], *table[2:]]:
                first, *rest = row.strip().strip("|").split("|")
                found.append(f"{indent}   * - {first.strip()}")
                found += [f"{indent}     - {cell.strip()}" for cell in rest]
            table = []
        # Bars of absolute values are no substitutions.
        found.append(re.sub(r"\|(\w+)\|", r"\\|\1\\|", line))
    lines[:] = found[:-1]


def setup(app):
    """Connect what turns tables into lists."""
    app.connect("autodoc-process-docstring", tables_of_markdown)
