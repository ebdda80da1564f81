from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import typing as t
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {
    path.relative_to(ROOT).as_posix()
    for path in ROOT.joinpath("flask_apitask").rglob("*")
    if path.suffix in {".html", ".py"} or path.name == "py.typed"
}
BUILD_SECONDS = 120


class Distributions(t.NamedTuple):
    """The wheel and the sdist, the files in each, and the metadata of the wheel."""

    paths: list[pathlib.Path]
    wheel: set[str]
    sdist: set[str]
    metadata: importlib.metadata.PackageMetadata


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist from a copy of the project, and the wheel from the sdist."""
    source = tmp_path_factory.mktemp("source") / "project"
    target = tmp_path_factory.mktemp("dist")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "venv*")
    shutil.copytree(ROOT, source, ignore=leftovers)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    subprocess.run([*command, target, source], check=True, timeout=BUILD_SECONDS)
    (wheel_path,) = target.glob("*.whl")
    (sdist_path,) = target.glob("*.tar.gz")

    with zipfile.ZipFile(wheel_path) as wheel, tarfile.open(sdist_path) as sdist:
        wheel_names = set(wheel.namelist())
        sdist_names = {file.name.partition("/")[2] for file in sdist if file.isfile()}

    (installed,) = importlib.metadata.distributions(path=[str(wheel_path)])
    paths = [wheel_path, sdist_path]
    return Distributions(paths, wheel_names, sdist_names, installed.metadata)


def find_requirements(distributions: Distributions, extra: str = "") -> set[str]:
    """Return the packages that are installed too, with an extra or with none."""
    lines = distributions.metadata.get_all("Requires-Dist", [])
    requirements = [Requirement(line) for line in lines]
    return {
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    }


def test_wheel_holds_the_package_only(distributions: Distributions) -> None:
    """A wheel installs the modules and the type marker, and nothing else."""
    names = {name for name in distributions.wheel if ".dist-info/" not in name}
    assert "flask_apitask/py.typed" in names
    assert names == MODULES


def test_sdist_holds_what_is_needed_to_test_it(distributions: Distributions) -> None:
    """An sdist has the package, its tests, its documentation and how to run them."""
    names = {name for name in distributions.sdist if ".egg-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("tests", "docs", "benchmarks")
        for path in ROOT.joinpath(folder).rglob("[!.]*.*")
        if path.suffix != ".pyc" and path.is_file()
    }
    assert MODULES | sources < names
    assert names - MODULES - sources == {
        "CHANGES.md",
        "LICENSE.txt",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "example_app.py",
        "pyproject.toml",
        "setup.cfg",
        "tox.ini",
    }


def test_wheel_holds_the_license(distributions: Distributions) -> None:
    """The license goes with the package and is named in its metadata."""
    assert distributions.metadata["License-Expression"] == "BSD-3-Clause"
    assert any(name.endswith("/licenses/LICENSE.txt") for name in distributions.wheel)


def test_install_brings_flask_only(distributions: Distributions) -> None:
    """Without an extra, only Flask and its own dependencies are installed."""
    assert find_requirements(distributions) == {"Flask"}


def test_extras_are_explained(distributions: Distributions) -> None:
    """The page for contributors says which extras are for users, and which are not."""
    page = ROOT.joinpath("docs", "contributing.md").read_text("utf-8")
    (section,) = re.findall("^## Extras\n(.*?)(?=^## )", page, re.M | re.S)
    extras = distributions.metadata.get_all("Provides-Extra", [])
    assert sorted(re.findall(r"^\| `(\w+)`", section, re.M)) == sorted(extras)
    assert find_requirements(distributions, "mail") == {"Flask", "Flask-Mail"}


def test_page_on_the_index(distributions: Distributions) -> None:
    """The index shows the README, and finds the package under Flask and as typed."""
    metadata = distributions.metadata
    assert metadata["Name"] == "flask-apitask"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.json["description"] == ROOT.joinpath("README.md").read_text("utf-8")
    classifiers = set(metadata.get_all("Classifier", []))
    assert {"Framework :: Flask", "Typing :: Typed"} <= classifiers


def test_distributions_can_be_uploaded(distributions: Distributions) -> None:
    """The index takes the wheel and the sdist, and can render their description."""
    if os.environ.get("APITASK_REQUIRE_SERVICES") != "1":
        pytest.importorskip("twine")

    command = [sys.executable, "-m", "twine", "check", "--strict"]
    subprocess.run([*command, *distributions.paths], check=True, timeout=60)


def test_environments_are_explained() -> None:
    """Each tox environment is on the page for contributors."""
    page = ROOT.joinpath("docs", "contributing.md").read_text("utf-8")
    sections = re.findall(
        r"^\[testenv:(.+)\]$", ROOT.joinpath("tox.ini").read_text(), re.M
    )
    assert len(sections) > 5
    assert [name for name in sections if f"`{name}`" not in page] == []
    assert "tox run -e style,typing,py" in page


def test_version_is_the_newest_in_the_changes(distributions: Distributions) -> None:
    """The version is that of the newest changes, and says if they are released."""
    changes = ROOT.joinpath("CHANGES.md").read_text("utf-8")
    head = re.search(r"Version (\d+\.\d+\.\d+)\W+(.*)", changes)
    assert head is not None
    number, status = head.groups()
    unreleased = status.lower().startswith("unreleased")
    assert distributions.metadata["Version"] == number + (".dev0" if unreleased else "")
