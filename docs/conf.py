"""Configuration of the documentation; `python -m sphinx -W --keep-going -b html docs docs/_build/html` builds it."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parent))
matplotlib.use("agg")

project = "simattn"
version = release = installed_version("simattn")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "extension",
]
exclude_patterns = ["_build", "examples"]
nitpicky = True
nitpick_ignore_regex = [
    # Classes of other projects, whose inventories would need the network, and aliases inside annotations.
    (r"py:.*", r"(cupy|numpy|np|npt|matplotlib|concurrent|collections|hypothesis|st|os|pathlib)\..*"),
    (r"py:.*", r"(Any|Axes|Callable|Executor|Iterable|Iterator|Mapping|Path|Sequence|NoneType)"),
    (
        r"py:.*",
        r"(simattn\.\w+\.)?(ClosedForm|Direction|Family|Heads|InputKind|Inputs|OnError|PlanKind|Phase|Place|PlanT)",
    ),
    (r"py:.*", r"(simattn\.\w+\.)?(Program|R|Role|Row|Runs|Values|Window)"),
]
show_warning_types = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"simattn {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r".*\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "capture_repr": (),
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,
    "plot_gallery": True,
    "matplotlib_animations": False,
}
