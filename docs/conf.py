"""Configure the documentation's site: `sphinx-build -W --keep-going -n docs docs/_build/html`.

Building and reading the site needs no network: equations are converted to MathML, style sheets and scripts are copied,
and notebooks keep their committed outputs.
"""

import os
import sys
from pathlib import Path


# for site_extension and research/
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tic_grpo_trl.version import __version__


project = "tic-grpo-trl"
author = "the authors of tic-grpo-trl"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "site_extension"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"TIC-GRPO for TRL {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the same anchors as GitHub's, so that links work in both places
nb_execution_mode = "off"
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["aiohttp"]  # comes with vLLM
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"
# Names of other libraries are not linked, because their inventories would have to be downloaded.
nitpick_ignore_regex = [(r"py:class", r".*"), (r"py:obj", r"(typing|trl|transformers|torch|datasets|accelerate)\..*")]

linkcheck_timeout = 20
linkcheck_ignore = [r"http://localhost.*"]
