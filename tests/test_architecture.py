"""The structure that the documentation promises, held by the code's own imports."""

import ast
import pathlib

import pytest

import hybridopt

PACKAGE = pathlib.Path(hybridopt.__file__).parent

# A module imports only from rows above its own; rooms in a row are blind to each other.
ROWS = [
    ["errors", "types"],
    [
        "checked",
        "config_files",
        "config",
        "protocols",
        "history",
        "codec",
        "closure",
        "hooks",
        "holding",
    ],
    ["kernels", "distributed"],
    ["weights"],
    ["control", "guard", "dynamics", "residuals", "telemetry", "pending"],
    ["leading", "unseen"],
    ["run"],
    ["assembly", "calling", "gradients"],
    ["quasi_newton", "correcting", "checkpoint", "statistics", "skipping"],
    ["measuring", "moving", "glancing"],
    ["phases"],
    ["recording"],
    ["optimizer"],
    ["__init__"],
    ["integrations", "demo", "cli"],
]
# Inside their row these are ordered as written.
ORDERED_ROWS = {0, 1, 14}


def _row(module: str) -> int:
    for index, names in enumerate(ROWS):
        if module in names:
            return index
    raise AssertionError(f"hybridopt.{module} has no row in tests/test_architecture.py")


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "hybridopt":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "hybridopt" and len(parts) > 1:
                    found.add(parts[1])
    return found


def _modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in _imports(path):
        if other == own or not (
            (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
        ):
            continue
        mine, theirs = _row(own), _row(other)
        if mine == theirs:
            names = ROWS[mine]
            assert mine in ORDERED_ROWS, f"{own} and {other} must not know each other"
            assert names.index(other) < names.index(own), f"{own} imports {other}"
        else:
            assert theirs < mine, f"{own} imports {other}, which stands below it"


def test_only_cupy_ops_imports_cupy():
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(n.split(".")[0] == "cupy" for n in names):
                assert path.name == "cupy_ops.py", path


def test_no_module_reads_data_attribute_of_parameters():
    # ``p.data =`` breaks DDP, FSDP and CUDA graphs.
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    assert not (
                        isinstance(target, ast.Attribute) and target.attr == "data"
                    ), path


def test_optimizer_assigns_no_state_outside_construction():
    # Frameworks run the methods with a proxy as ``self``: an assignment would be lost.
    allowed = {"__init__", "_build"}
    tree = ast.parse((PACKAGE / "optimizer.py").read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    for method in (n for n in cls.body if isinstance(n, ast.FunctionDef)):
        if method.name in allowed or "setter" in ast.dump(method):
            continue
        for node in ast.walk(method):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                for target in targets:
                    if isinstance(target, ast.Attribute):
                        owner = target.value
                        assert not (
                            isinstance(owner, ast.Name) and owner.id == "self"
                        ), f"{method.name} assigns self.{target.attr}"


def test_files_stay_readable():
    for path in _modules():
        lines = path.read_text().count("\n")
        assert lines <= 400, f"{path.name} has {lines} lines"
