"""The house: imports run one way, files stay small, recipes stay recipes."""

import ast
import subprocess

import pytest

from common.config import ROOT

# Each room, a folder or a module of common/, may import the rooms of lines before its own and itself, no other.
ORDER = [
    ["core"],
    ["config"],
    ["io"],
    ["run"],
    ["fda", "merging"],
    ["domain"],
    ["validation"],
    ["experiment"],
    ["opening"],
    ["layout"],
    ["provenance"],
    ["assembly"],
    ["start"],
    ["descent"],
    ["evaluation", "planning"],
    ["report"],
    ["pipeline"],
    ["analysis"],
    ["command", "api"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted((ROOT / "common").rglob("*.py"))


def imported(file):
    """Modules of this project that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "common" else [node.module]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    room = file.relative_to(ROOT / "common").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for module in imported(file):
        top, _, rest = module.partition(".")
        assert top not in ("Vision", "NLU", "NLG", "scripts"), f"common depends on {module}"
        if top == "common":
            other = rest.split(".")[0]
            assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {other}, which is not below it"


def test_files_stay_small():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    long = {f: n for f in tracked if (n := len((ROOT / f).read_text().splitlines())) > 280 and "tests/" not in f}
    assert not long


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda f: f.name)
def test_tests_share_by_helpers_and_have_short_names(file):
    """What two tests need is in helpers.py, conftest.py or a pico_….py; pyproject.toml says where modules are found."""
    modules = {part for module in imported(file) for part in module.split(".")}
    assert not [m for m in modules if m.startswith("test_") or m == "conftest"], "a test file is imported"
    tree = ast.walk(ast.parse(file.read_text()))
    nodes = [node for node in tree if isinstance(node, ast.FunctionDef | ast.Attribute)]
    long = [
        n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_") and len(n.name) >= 70
    ]
    assert not long, "a test's name has 70 characters or more"
    assert "sys.path" not in [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)], "see pythonpath"


@pytest.mark.parametrize("launcher", sorted(ROOT.glob("[VN]*/*.sh")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_launcher_passes_its_arguments_on(launcher):
    done = subprocess.run(["sh", str(launcher), "--nonsense"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "nonsense" in done.stderr
