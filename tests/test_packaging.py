"""What is released: a wheel with all of the package and nothing else, which works alone."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import secateur

pytest.importorskip("hatchling")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(secateur.__file__).parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, made without network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    wanted = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names - info == wanted
    assert {"secateur/py.typed", "secateur/report/page.html.j2", "secateur/report/page.css"} <= names


def test_its_metadata_are_those_of_a_release(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        about = message_from_string(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        licence = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
    assert about["Name"] == "secateur"
    assert wheel.name == f"secateur-{about['Version']}-py3-none-any.whl"
    assert {"report", "export", "demo", "plot"} <= set(about.get_all("Provides-Extra") or ())
    assert about["Description-Content-Type"] == "text/markdown"
    assert "secateur = secateur.cli.entry:run" in points
    assert len(licence) == 1
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changes or f"## [{about['Version']}]" in changes


def test_it_works_from_the_wheel_alone(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import secateur, secateur.report.html as html\n"
        f"assert secateur.__file__.startswith({str(wheel)!r}), secateur.__file__\n"
        "assert '<h1>' in html._text(html.TEMPLATE) and '{' in html._text(html.STYLE)\n"
        "import secateur.cli.entry as entry\n"
        "sys.argv = ['secateur', '--version']\n"
        "entry.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("secateur ")


def test_the_sdist_can_be_tested(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py"}
    assert needed | {"benchmarks/resnet20.py", "src/secateur/__init__.py", "docs/index.md"} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "benchmarks/cache", "demo"))]
