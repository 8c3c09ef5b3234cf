"""What a wheel contains: `meshd/` with every module, and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("meshd", "agents", "protocol", "kernels", "tui")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Build a wheel without a network, from a copy of the tree, since setuptools leaves a `build/` folder."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-P", "-c", build, "dist"], cwd=tree, check=True, capture_output=True, timeout=100)
    (built,) = (tree / "dist").glob("*.whl")
    return zipfile.Path(built)


def test_a_wheel_holds_only_meshd(wheel: zipfile.Path) -> None:
    tops = {entry.name for entry in wheel.iterdir()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"meshd"}


def test_a_wheel_holds_every_module_of_the_tree(wheel: zipfile.Path) -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not _through_a_link(path)
    }
    expected = {module if module.startswith("meshd/") else f"meshd/{module}" for module in modules}
    assert "meshd/agents/service.py" in expected
    assert expected == {name for name in wheel.root.namelist() if name.endswith(".py")}


def test_a_wheel_holds_its_data_licence_and_command(wheel: zipfile.Path) -> None:
    names = set(wheel.root.namelist())
    assert "meshd/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "meshd = meshd.__main__:run" in wheel.root.read(entry_points).decode()


def test_top_level_names_of_other_distributions_are_not_used() -> None:
    script = "from importlib.util import find_spec; print(*(spec.origin for n in %r if (spec := find_spec(n))), sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script % (["agents", "kernels", "protocol", "tui"],)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert str(ROOT) not in result.stdout


def test_every_package_is_declared() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = (path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py") if not _through_a_link(path))
    names = (".".join(package.relative_to(ROOT).parts) for package in packages)
    assert {name if name.split(".")[0] == "meshd" else f"meshd.{name}" for name in names} == declared


def _through_a_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent != ROOT and ROOT in parent.parents)
