"""The site of the documentation: ``sphinx-build --fail-on-warning --conf-dir docs . build/site``.

The pages are the Markdown files as they are, so their links are those of the repository.
"""

import shutil
from pathlib import Path
from typing import Any

import mnist_lightning

project = "mnist_lightning"
release = mnist_lightning.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/notebook.ipynb", "examples/**/README.md"]
exclude_patterns = [".*", "build", "dist", "lightning_logs", "tests"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
nb_execution_mode = "off"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

CONTENTS = """

```{toctree}
:hidden:
:caption: Start

docs/howto
docs/notebook
docs/porting
docs/results
examples/letters/README
```

```{toctree}
:hidden:
:caption: Commands

docs/data
docs/networks
docs/tune
docs/report
docs/tensorboard
docs/use
docs/export
docs/python
docs/api
```

```{toctree}
:hidden:
:caption: Machines

docs/gpus
docs/machines
docs/faults
docs/speed
docs/conformance
```

```{toctree}
:hidden:
:caption: Project

docs/internals
CONTRIBUTING
CHANGELOG
```
"""


def setup(app: Any) -> None:
    """Add the table of contents to the README, and make it the first page."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)


def add_contents(app: Any, name: str, source: list[str]) -> None:
    """Append the table of contents to the README."""
    if name == root_doc:
        source[0] += CONTENTS


def add_index(app: Any, error: Exception | None) -> None:
    """Copy the README's page to the address that servers show first."""
    if error is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
