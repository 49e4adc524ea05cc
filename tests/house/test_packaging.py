"""What `pip install .` puts on a machine, and that the command finds its own packages there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "executor", "protos", "scheduler", "services")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, as pip would leave it."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "pagewire"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "wheel").glob("*.whl")
    site = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_only_pagewire_lands_in_site_packages(site_packages: Path) -> None:
    names = {path.name for path in site_packages.iterdir() if path.suffix != ".dist-info"}

    assert names == {"pagewire"}


def test_the_wheel_holds_every_file_of_every_package(site_packages: Path) -> None:
    in_checkout = {
        path.relative_to(ROOT)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    app = site_packages / "pagewire" / "app"
    in_wheel = {path.relative_to(app) for path in app.rglob("*") if path.is_file()}

    assert in_wheel == in_checkout  # a package that is missing: name it in pyproject.toml, [tool.setuptools] packages
    assert Path("protos/inference.proto") in in_wheel
    assert (site_packages / "pagewire" / "py.typed").is_file()


def test_an_installed_pagewire_and_its_children_take_their_own_packages(site_packages: Path, tmp_path: Path) -> None:
    for name in PACKAGES:  # the folder that the command is called in has the same names
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')")
    child = "import common, scheduler, services; print(services.__file__)"
    parent = (
        "import subprocess, sys; from pagewire.launcher import app_folder, put_first; put_first(app_folder());"
        "import common, scheduler, services; print(services.__file__, flush=True);"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    # -P: as for a console script, the working directory is not on the path
    command = [sys.executable, "-P", "-c", parent]
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)

    ours = str(site_packages / "pagewire" / "app" / "services" / "__init__.py")
    assert done.stdout.split() == [ours, ours]


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "in a checkout"])
def test_the_client_takes_no_name_but_pagewire_from_a_program(
    installed: bool, site_packages: Path, tmp_path: Path
) -> None:
    for name in PACKAGES:  # the program's own, which have nothing to do with ours
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not asked for')")
    home = site_packages
    if not installed:
        home = tmp_path / "elsewhere"
        home.mkdir()
        (home / "pagewire").symlink_to(ROOT / "pagewire")
    code = (
        "import sys; from pagewire import AsyncClient, Client, InvalidRequest;"
        f"client = Client('127.0.0.1:1', patience_s=0); print([n for n in {PACKAGES!r} if n in sys.modules]);"
        "from pagewire import Unavailable\n"
        "try: client.generate('hi')\n"
        "except Unavailable as error: print(type(error).__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(home)])}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)

    assert done.stdout.splitlines() == ["[]", "pagewire.app.common.errors"]


def test_the_launcher_needs_nothing_of_the_client() -> None:
    code = "import sys, pagewire.launcher; print([name for name in ('grpc', 'google.protobuf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"


def test_in_a_checkout_the_packages_lie_beside_the_launcher() -> None:
    code = "from pagewire.launcher import app_folder; print(app_folder())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)

    assert done.stdout.strip() == str(ROOT)
