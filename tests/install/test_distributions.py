"""The contents of a source distribution and of a wheel. The first builds the same as a checkout."""

from __future__ import annotations

import importlib.util
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.install.checkout import copy_to, files_of, load_setup, run

BUILD = "import build_backend, sys; print(getattr(build_backend, sys.argv[1])(sys.argv[2]))"


def build(folder: Path, kind: str, **environment: str) -> Path:
    """A distribution of a folder, by the hook that installers call."""
    result = run(["-c", BUILD, f"build_{kind}", "dist"], folder, path=[folder / "csrc"], **environment)
    assert result.returncode == 0, result.stderr
    return folder / "dist" / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module", params=["none", "auto"])
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkout, and its source distribution unpacked; made with and without an extension to build."""
    checkout = copy_to(tmp_path_factory.mktemp("sdist") / "checkout")
    before = files_of(checkout)
    path = build(checkout, "sdist", UNIRL_BUILD=request.param)
    with tarfile.open(path) as archive:
        archive.extractall(checkout.parent / "unpacked", filter="data")
    (folder,) = (checkout.parent / "unpacked").iterdir()
    for name in files_of(checkout) - before:
        (checkout / name).unlink()
    return checkout, folder


def test_sdist_has_all_of_the_checkout(unpacked: tuple[Path, Path]) -> None:
    checkout, folder = unpacked
    assert {"csrc/cuda/fused_loss.cu", "csrc/cuda/bindings.cpp", "unirl_kernels/py.typed"} <= files_of(folder)
    assert files_of(checkout) - files_of(folder) == set()


def test_sdist_has_nothing_else(unpacked: tuple[Path, Path]) -> None:
    checkout, folder = unpacked
    more = {name for name in files_of(folder) - files_of(checkout) if ".egg-info/" not in name}
    assert more == {"PKG-INFO", "setup.cfg"}


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_sdist_compiles_what_a_checkout_compiles(
    unpacked: tuple[Path, Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # sources alone, whatever torch is installed
    of_checkout, of_sdist = (load_setup(folder).extension(mode)["ext_modules"] for folder in unpacked)
    assert [native.name for native in of_sdist] == ["unirl_kernels._C", "unirl_kernels._cuda"][: 1 + (mode == "cuda")]
    for ours, theirs in zip(of_checkout, of_sdist, strict=True):
        assert (ours.name, ours.sources, ours.depends) == (theirs.name, theirs.sources, theirs.depends)
    assert any(name.endswith(".cu") for name in of_sdist[-1].sources) == (mode == "cuda")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure Python wheel."""
    return build(copy_to(tmp_path_factory.mktemp("wheel") / "checkout"), "wheel", UNIRL_BUILD="none")


def test_wheel_has_the_package_and_its_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "unirl_kernels/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"unirl_kernels"}


def test_wheel_says_where_to_read_on(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_all("Project-URL")


def test_types_are_seen_by_a_user(wheel: Path, tmp_path: Path) -> None:
    """mypy, in an environment where the wheel is installed."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    environment = tmp_path / "environment"
    assert run(["-m", "venv", "--without-pip", str(environment)], tmp_path).returncode == 0
    (packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (tmp_path / "user.py").write_text("import unirl_kernels as uk\nreveal_type(uk.grpo())\nuk.Plan(backend=3)\n")
    python = environment / "bin" / "python"
    options = ["--python-executable", str(python), "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache")]
    said = run(["-m", "mypy", "--config-file", "", *options, "user.py"], tmp_path).stdout
    assert 'Revealed type is "unirl_kernels.objectives.loss.Loss"' in said
    assert 'Argument "backend" to "Plan" has incompatible type "int"' in said
    assert "py.typed" not in said
