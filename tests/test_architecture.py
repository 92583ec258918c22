"""The layering of the packages: imports point downwards, and only where :data:`LAYERS` allows it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the lowest layer to the highest; a package may import packages of its own layer and of lower ones.
LAYERS = [
    {"errors", "allocator", "extras", "logs"},
    {"config"},
    {"text"},
    {"data"},
    {"models", "generation"},
    {"cluster"},
    {"textgen"},
    {"training", "evaluation"},
    {"stages"},
    {"api"},
    {"serving", "benchmarks", "describe"},
    {"assistant"},  # Former names of modules that stored models name.
    {"cli"},
    {"__init__", "__main__"},  # The package's public names, and its command.
]
# The pipeline and the tracking store are used by stages and above, and know nothing but what is listed here.
MAY_IMPORT = {
    "pipeline": {"errors", "logs", "allocator", "config", "data", "tracking"},
    "tracking": {"errors", "logs", "config", "data", "pipeline"},
    # A report is a query of the store; it computes perplexities of reference models, and trains nothing.
    "reports": {"errors", "config", "tracking", "data", "models", "evaluation"},
    "ablations": {"reports", "cli", "describe"}
    | {"errors", "allocator", "config", "tracking", "pipeline", "text", "data", "models", "training", "stages"},
}
EXCEPTIONS = {
    ("*", "mmphi.tracking.tracker"),  # A Protocol without dependencies, for annotations.
    ("pipeline", "mmphi.models.checkpoint"),  # Imported lazily, where a setting names a stored model.
}


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"mmphi.relative.{node.module or ''}"  # In no layer: imports are absolute.
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from mmphi import describe` imports a module, `from mmphi.errors import DataError` a name of one.
            prefix = node.module in ("mmphi", "ablations", "reports")
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if prefix else (node.module,)


def package_of(module: str) -> str:
    """``config`` for ``mmphi.config.declared_view``, ``reports`` for ``reports.study_query``."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "mmphi" else top


def layer(package: str) -> int:
    return next((number for number, packages in enumerate(LAYERS) if package in packages), len(LAYERS))


def is_allowed(importer: str, module: str) -> bool:
    imported = package_of(module)
    if imported == importer or {(importer, module), ("*", module)} & EXCEPTIONS:
        return True
    if importer in MAY_IMPORT:
        return imported in MAY_IMPORT[importer]
    if imported in ("ablations", "reports"):
        return False
    if imported in MAY_IMPORT:
        return layer(importer) >= layer("stages")
    return layer(imported) <= layer(importer)


def violations(root: Path) -> list[str]:
    found = []
    for top in ("mmphi", "ablations", "reports"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            importer = parts[1] if top == "mmphi" else top
            own = [m for m in imported_modules(path) if m.startswith(("mmphi.", "ablations", "reports"))]
            found += [f"{path.relative_to(root)} imports {m}" for m in own if not is_allowed(importer, m)]
    return found


def test_imports_point_downwards() -> None:
    assert violations(ROOT) == []


def test_violations_are_found(tmp_path: Path) -> None:
    """One of each kind, in a tree of its own."""
    for name, code in {
        "mmphi/text/a.py": "from mmphi.models.language.phi import x",
        "mmphi/models/b.py": "def f():\n    import mmphi.pipeline.build",
        "mmphi/stages/c.py": "from mmphi.pipeline.stage import Stage\nfrom reports.study_query import load_study",
        "mmphi/errors.py": "def f():\n    import reports.study_query\n    import mmphi.stages",
        "mmphi/text/g.py": "from ..stages import STAGES\nfrom .. import cli",
        "mmphi/training/d.py": "from mmphi.tracking.tracker import Tracker\nfrom mmphi import describe",
        "reports/e.py": "from ablations import study\nfrom mmphi.stages import STAGES\nimport mmphi.errors",
        "ablations/f.py": "from mmphi.serving import serve\nfrom reports import query",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    assert violations(tmp_path) == [
        "mmphi/errors.py imports reports.study_query",
        "mmphi/errors.py imports mmphi.stages",
        "mmphi/models/b.py imports mmphi.pipeline.build",
        "mmphi/stages/c.py imports reports.study_query",
        "mmphi/text/a.py imports mmphi.models.language.phi",
        "mmphi/text/g.py imports mmphi.relative.stages",
        "mmphi/text/g.py imports mmphi.relative.",
        "mmphi/training/d.py imports mmphi.describe",
        "ablations/f.py imports mmphi.serving",
        "reports/e.py imports ablations.study",
        "reports/e.py imports mmphi.stages",
    ]


# Packages that know neither the pipeline nor MLflow: they are a library.
LIBRARY = ("config", "text", "data", "models", "generation", "training", "evaluation")


def test_the_library_knows_neither_mlflow_nor_the_pipeline_nor_stages() -> None:
    forbidden = ("mlflow", "optuna", "mmphi.pipeline", "mmphi.stages", "mmphi.tracking", "mmphi.cli")
    allowed = "mmphi.tracking.tracker"  # A Protocol without dependencies.
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for package in LIBRARY
        for path in sorted((ROOT / "mmphi" / package).rglob("*.py"))
        for module in imported_modules(path)
        if module.startswith(forbidden) and not module.startswith(allowed)
    ]
    assert found == []


def test_serving_uses_stages_and_pipeline_through_load_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / "mmphi" / "serving").rglob("*.py"))
        for module in imported_modules(path)
        if module.startswith(("mmphi.stages", "mmphi.pipeline", "ablations", "reports"))
    }
    # Which stages end in a model that answers.
    assert found == {"mmphi/serving/model_args.py imports mmphi.stages"}


def test_few_modules_are_outside_a_package() -> None:
    assert {path.stem for path in (ROOT / "mmphi").glob("*.py")} == {
        "__init__",
        "__main__",
        "allocator",
        "api",
        "cli",
        "describe",
        "errors",
        "extras",
        "logs",
    }


def test_modules_of_other_libraries_are_patched_in_one_package() -> None:
    """Attention implementations and forward functions of instances are set in ``mmphi/models/patches``."""
    signs = ("set_attn_implementation(", "AttentionInterface", ".forward = ", "set_submodule(")
    places = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("mmphi", "ablations", "reports")
        for path in (ROOT / top).rglob("*.py")
        if any(sign in path.read_text() for sign in signs)
    }
    assert places == {"mmphi/models/patches"}
