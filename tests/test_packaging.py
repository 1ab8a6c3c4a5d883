"""What gets installed: `fxcollab` and `fxcollab_cli`, whole, and no module called `cli`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fxcollab_cli
import pytest

import fxcollab

ROOT = Path(__file__).parent.parent
FOLDERS = {"fxcollab": "fxcollab", "cli": "fxcollab_cli"}


def modules() -> Iterator[str]:
    """Every file of the two packages, by its name when installed."""
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py" or path.name == "py.typed":
                yield f"{package}/{path.relative_to(ROOT / folder).as_posix()}"


def test_every_package_is_listed() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name.rpartition("/")[0].replace("/", ".") for name in modules()}
    assert set(configuration["packages"]) == found


INSTALLED = """
import importlib.metadata, importlib.util, json
distribution = importlib.metadata.distribution("fxcollab")
files = {path.parts[0] for path in distribution.files}
found = importlib.util.find_spec("cli") is not None
print(json.dumps([distribution.read_text("top_level.txt").split(), sorted(files), found]))
"""


def test_no_module_called_cli_is_installed() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", INSTALLED], capture_output=True, text=True, timeout=60)
    tops, files, found = json.loads(done.stdout)
    assert set(tops) == {"fxcollab", "fxcollab_cli"}
    assert not {"cli", "tests", "samples"} & set(files)
    assert not found
    assert fxcollab_cli.__name__ == "fxcollab_cli"


def test_the_command_is_the_application() -> None:
    [command] = importlib.metadata.distribution("fxcollab").entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("fxcollab", "fxcollab_cli.start:main")
    assert callable(command.load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built offline from a copy of the sources by the setuptools at hand."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return build(source, "wheel")


def build(source: Path, kind: str) -> Path:
    required = 77
    if int(_version_of_setuptools().partition(".")[0]) < required:
        pytest.skip(f"building needs setuptools {required} or later in the environment")
    (source / "dist").mkdir(exist_ok=True)
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.splitlines()[-1]


def _version_of_setuptools() -> str:
    try:
        return importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    information = next(name for name in names if name.endswith("/METADATA")).partition("/")[0]
    packaged = {name for name in names if not name.startswith(information)}
    page = (ROOT / "fxcollab/diffs/page").iterdir()
    assert packaged == set(modules()) | {f"fxcollab/diffs/page/{file.name}" for file in page}
    assert "fxcollab/py.typed" in packaged


def test_the_unpacked_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop()); sys.argv[0] = 'fxcollab'; import fxcollab_cli.app as app;"
        "print(app.__file__); sys.argv.append('--help'); app.main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, _, text = done.stdout.partition("\n")
    assert Path(first) == tmp_path / "fxcollab_cli/app.py"
    assert "transform" in text and "verify" in text and "prune" in text


@pytest.mark.slow
def test_the_archive_of_the_sources_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build(wheel.parent.parent, "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    again = build(source, "wheel")
    assert again.name == wheel.name
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_one_version_is_named_everywhere() -> None:
    version = fxcollab.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version  # type: ignore[index]
    assert f"version = {{{version}}}" in (ROOT / "samples/guides/versions.md").read_text()


def test_the_main_job_needs_what_the_documents_say_and_no_extra_is_left_out() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "samples/guides/versions.md").read_text()
    needs = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}  # type: ignore[index]
    assert needs == {"torch", "torchvision", "networkx", "rich", "typer", "safetensors"}
    assert all(name in text for name in needs)
    assert all(f"`{name}`" in text for name in project["optional-dependencies"])
