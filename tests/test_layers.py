"""Who may import whom: a module imports only from layers below its own, and each layer has its own hosts.

Imports are read from the source, so one inside a function counts like one at the top of the file.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANYTHING = None

HOSTS = frozenset({"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "tqdm"})


class Rule(NamedTuple):
    """What one module, or every module of one package, may import."""

    layer: int
    packages: frozenset[str] | None  # from outside; None: anything
    in_functions: frozenset[str] = frozenset()  # from outside, inside functions only


# The core's layers follow the data: operators -> objective -> optimize -> solve; then the edges.
# The most specific name wins. A new module needs a line here (and one in CONTRIBUTING.md's table).
RULES = {
    "vml_ldm": Rule(7, frozenset()),
    "vml_ldm.assets": Rule(0, frozenset()),
    "vml_ldm.operators": Rule(0, frozenset({"torch"})),
    "vml_ldm.damage": Rule(1, frozenset({"torch"})),
    "vml_ldm.posing": Rule(2, frozenset({"torch"})),
    "vml_ldm.closeup": Rule(2, frozenset({"torch"})),
    "vml_ldm.manifest": Rule(0, frozenset()),
    "vml_ldm.families": Rule(0, frozenset()),
    "vml_ldm.fitting": Rule(1, frozenset({"torch"})),
    "vml_ldm.objective": Rule(1, frozenset({"torch"})),
    "vml_ldm.optimize": Rule(2, frozenset({"torch"})),
    "vml_ldm.metering": Rule(2, frozenset({"torch"})),
    "vml_ldm.proximal": Rule(3, frozenset({"torch"})),
    "vml_ldm.pixels": Rule(0, frozenset({"torch"})),
    "vml_ldm.holding": Rule(0, frozenset({"torch"})),
    "vml_ldm.guidance": Rule(0, frozenset({"torch"})),
    "vml_ldm.images": Rule(0, frozenset({"torch", "numpy", "PIL"})),
    "vml_ldm.report": Rule(0, frozenset({"torch"}), in_functions=frozenset({"matplotlib"})),
    "vml_ldm.spread": Rule(0, frozenset({"torch"})),
    "vml_ldm.solve": Rule(4, frozenset({"torch"})),
    "vml_ldm.measuring": Rule(5, frozenset({"torch"})),
    "vml_ldm.presets": Rule(5, frozenset()),
    "vml_ldm.red": Rule(5, frozenset({"torch"})),
    "vml_ldm.adapters": Rule(5, frozenset()),
    "vml_ldm.adapters.deepinv": Rule(5, frozenset({"torch"})),
    "vml_ldm.adapters.diffusers": Rule(5, frozenset({"torch", "numpy", "diffusers"})),
    "vml_ldm.adapters.comfyui": Rule(
        5,
        frozenset({"torch", "comfy", "latent_preview"}),
        in_functions=frozenset({"diffusers", "transformers"}),  # the bundled checkpoint's networks
    ),
    "vml_ldm.pipelines": Rule(6, HOSTS),
    "vml_ldm.nodes": Rule(6, frozenset({"torch", "comfy_api"})),
    "vml_ldm.evaluation": Rule(8, ANYTHING),
    "vml_ldm.batch": Rule(8, HOSTS),
    "vml_ldm.app": Rule(9, ANYTHING),
    "vml_ldm.cli": Rule(10, ANYTHING),
}


def module_files() -> dict[str, Path]:
    """Map every module's name as installed to its file."""
    files = {}
    for folder, package in ((ROOT / "vml_ldm", "vml_ldm"), (ROOT / "pipelines", "vml_ldm.pipelines")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((package, *parts))] = path
    return files


def rule_name(module: str) -> str | None:
    """The entry of RULES that governs a module: its own, or that of the nearest package above it."""
    parts = module.split(".")
    candidates = [".".join(parts[:n]) for n in range(len(parts), 1, -1)] or [module]
    return next((name for name in candidates if name in RULES), None)


def imports(source: str, module: str, is_package: bool) -> list[tuple[str, bool, int]]:
    """List (imported name, inside a function?, line) of every import statement of a source text.

    What a module does when it is run (``if __name__ == "__main__":``) is the command line's and not listed.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, in_function, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{stem}.{alias.name}", in_function, node.lineno) for alias in node.names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """List what a module imports against the rules, one sentence each."""
    own = rule_name(module)
    if own is None:
        return [f"{module} has no rule; add its layer to RULES in tests/test_layers.py."]
    rule = RULES[own]
    wrong = []
    for name, in_function, line in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == "vml_ldm":
            target = rule_name(name)
            if target is None or (target != own and RULES[target].layer >= rule.layer):
                wrong.append(f"{module}, line {line}: imports {name}, which is not in a layer below.")
        elif top not in sys.stdlib_module_names and rule.packages is not ANYTHING:
            allowed = rule.packages | (rule.in_functions if in_function else frozenset())
            if top not in allowed:
                wrong.append(f"{module}, line {line}: imports {top}; allowed here: {sorted(allowed)}.")
    return wrong


FILES = module_files()


@pytest.mark.parametrize("module", FILES)
def test_imports_only_from_below(module: str) -> None:
    path = FILES[module]
    assert violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vml_ldm.objective", "import diffusers"),
        ("vml_ldm.objective", "def f():\n    from diffusers import DDIMScheduler"),
        ("vml_ldm.objective", "import numpy as np"),
        ("vml_ldm.objective", "from vml_ldm.solve import vml_map"),
        ("vml_ldm.objective", "from .solve import vml_map"),
        ("vml_ldm.objective", "from vml_ldm import optimize"),
        ("vml_ldm.operators", "from vml_ldm.images import load"),
        ("vml_ldm.operators", "from . import vml_map"),
        ("vml_ldm.operators.jpeg", "from PIL import Image"),
        ("vml_ldm.pipelines.vml_inpaint", "import vml_ldm"),
        ("vml_ldm.solve", "from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline"),
        ("vml_ldm.solve", "from .adapters.diffusers import prior"),
        ("vml_ldm.adapters.diffusers.prior", "from ...pipelines import vml_inpaint"),
        ("vml_ldm.adapters.comfyui", "import diffusers"),
        ("vml_ldm.report", "import matplotlib.pyplot as plt"),
        ("vml_ldm.pipelines.vml_inpaint", "from vml_ldm.evaluation import metrics"),
        ("vml_ldm.helpers", "import torch"),
    ],
)
def test_rules_catch(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "vml_ldm.objective",
            "import math\nimport torch.nn.functional as F\nfrom collections.abc import Sized",
        ),
        ("vml_ldm.objective", "from .operators import Measurement"),
        ("vml_ldm.operators.blur", "from .base import LinearOperator"),
        ("vml_ldm.report", "def plot():\n    import matplotlib.pyplot as plt"),
        ("vml_ldm.solve", "from vml_ldm.objective import vml_gradient\nfrom .report import Report"),
        ("vml_ldm.adapters.diffusers.prior", "from diffusers import X\nfrom .schedule import scales"),
        (
            "vml_ldm.pipelines.vml_inpaint",
            "from vml_ldm.pipelines._common import f\nfrom vml_ldm import solve",
        ),
        ("vml_ldm.cli", "def main():\n    from vml_ldm.evaluation.demo import run"),
        ("vml_ldm.evaluation.demo", 'if __name__ == "__main__":\n    from vml_ldm.cli import main'),
    ],
)
def test_rules_allow(module: str, source: str) -> None:
    assert violations(source, module) == []
