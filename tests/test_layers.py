"""The packages are layers: every import points down, there is no circle, and nobody outside uses a private name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"cli"},
    {"__init__"},
    {"estimators"},
    {"report", "calibration", "models", "fleet"},
    {"results", "engine"},
    {"samplers", "posterior"},
    {"diagnostics", "kernels"},
    {"_checks", "_io", "machine"},
)
LAZY = {  # the one exception: ``.plot()`` and ``.report()`` of results import what draws them when they are called
    ("slt_jax.results.llc", "slt_jax.report.traces"),
    ("slt_jax.results.llc", "slt_jax.report.write"),
    ("slt_jax.results.loss_covariance", "slt_jax.report.influence"),
    ("slt_jax.results.sweep", "slt_jax.report.heatmaps"),
    ("slt_jax.results.susceptibilities", "slt_jax.report.susceptibilities"),
    ("slt_jax.results.susceptibilities", "slt_jax.report.write"),
    ("slt_jax.results.sweep", "slt_jax.report.write"),
    ("slt_jax.results.trajectory", "slt_jax.report.training"),
    ("slt_jax.results.trajectory", "slt_jax.report.write"),
}
Graph = dict[str, set[str]]


def sources(folder: str) -> Iterator[tuple[str, Path]]:
    """(module, file) of a folder; ``kernels`` is installed as ``slt_jax.kernels``."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("slt_jax", *parts) if parts[0] == "kernels" else parts
        yield ".".join(parts if parts[-1] != "__init__" or parts == ("slt_jax", "__init__") else parts[:-1]), path


def imported(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(module, name or "", whether inside a function) of each import."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.module, alias.name, id(node) in inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", id(node) in inside


def graph_of() -> Graph:
    """Module -> modules of the library that it imports, without the lazy exceptions."""
    files = dict([*sources("slt_jax"), *sources("kernels")])
    graph: Graph = {}
    for module, path in files.items():
        graph[module] = set()
        for name, member, lazy in imported(path):
            target = f"{name}.{member}" if f"{name}.{member}" in files else name
            target = "slt_jax.__init__" if target == "slt_jax" else target
            if target in files and not (lazy and (module, target) in LAZY):
                graph[module].add(target)
    return graph


def level(module: str) -> int:
    package = module.split(".")[1]
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def upward(graph: Graph) -> list[str]:
    return [f"{a} imports {b}" for a, bs in graph.items() for b in sorted(bs) if level(b) < level(a)]


def circles(graph: Graph) -> list[str]:
    """Modules that can be reached from themselves."""
    return [module for module in graph if module in reached(graph, module)]


def reached(graph: Graph, start: str) -> set[str]:
    """All modules that an import of ``start`` loads, beside it."""
    seen: set[str] = set()
    todo = [*graph[start]]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += graph[module]
    return seen


@pytest.mark.quick
def test_every_import_points_down():
    graph = graph_of()
    assert len(graph) > 60
    assert upward(graph) == []


@pytest.mark.quick
def test_there_is_no_circle_of_modules_or_of_packages():
    graph = graph_of()
    assert circles(graph) == []
    packages: Graph = {}
    for module, targets in graph.items():
        own = module.split(".")[1]
        packages.setdefault(own, set()).update(t.split(".")[1] for t in targets if t.split(".")[1] != own)
    assert circles(packages) == []


@pytest.mark.quick
def test_an_import_turned_round_is_seen():
    graph = graph_of()
    assert "slt_jax.engine.plan" in graph["slt_jax.engine.loop"]
    graph["slt_jax.engine.plan"].add("slt_jax.engine.loop")
    graph["slt_jax.posterior.local"].add("slt_jax.results.llc")
    assert upward(graph) == ["slt_jax.posterior.local imports slt_jax.results.llc"]
    assert "slt_jax.engine.loop" in circles(graph)


@pytest.mark.quick
@pytest.mark.parametrize("module", ["slt_jax.models.hub", "slt_jax.models.decoder", "slt_jax.models.restrict"])
def test_a_checkpoint_loads_no_sampler(module):
    loaded = {name.split(".")[1] for name in reached(graph_of(), module)}
    assert not loaded & {"engine", "results", "samplers", "calibration", "estimators"}


@pytest.mark.quick
def test_the_lazy_imports_are_there_and_lazy():
    """Kills: an exception that outlived its import."""
    found = {
        (module, name) for module, path in sources("slt_jax") for name, _, lazy in imported(path) if lazy
    }  # fmt: skip
    assert found >= LAZY


@pytest.mark.quick
def test_no_file_is_long():
    """A file of more than 400 lines has two subjects: move one of them."""
    files = [path for folder in ("slt_jax", "kernels", "scaling") for _, path in sources(folder)]
    assert not [str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 400]


@pytest.mark.quick
def test_studies_import_nothing_of_the_tests_and_nothing_private():
    names = [(path.name, module, name) for _, path in sources("scaling") for module, name, _ in imported(path)]
    assert not [x for x in names if x[1].split(".")[0] == "tests"]
    assert not [
        x for x in names if x[1].startswith("slt_jax") and any(p.startswith("_") for p in f"{x[1]}.{x[2]}".split("."))
    ]


@pytest.mark.quick
def test_tests_import_no_private_name():
    """Beside the modules of checks and files, which are private as modules alone."""
    names = [(path.name, module, name) for _, path in sources("tests") for module, name, _ in imported(path)]
    assert not [
        x for x in names if x[1].startswith(("slt_jax", "scaling")) and x[2].startswith("_") and x[2] not in LAYERS[-1]
    ]
