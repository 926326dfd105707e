import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_automl"
FLOOR = {
    **{
        "cli": 5,
        "auto": 4,
        "results": 3,
        "studies": 3,
        "tasks": 2,
        "search": 2,
        "data": 2,
        "callbacks": 2,
        "models": 1,
    },
    **{"adapters": 1, "losses": 1, "augment": 1, "metrics": 1, "plots": 1},
    **{"rundir": 0, "image_files": 0, "mistakes": 0, "durations": 0, "__version__": 0},
}


def package_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0]
    for other in package_imports(path):
        assert other == own or FLOOR[other] < FLOOR[own], f"{path} imports {other}, which is not below {own}"


def test_the_check_sees_both_forms_of_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from lightning_automl import tasks\nfrom lightning_automl.data.base import Index\nimport torch\n")
    assert list(package_imports(file)) == ["tasks", "data"]


def test_no_module_is_called_utils():
    assert not list(PACKAGE.rglob("utils.py"))
