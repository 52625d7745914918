"""``UNIRL_BUILD``, the build backend and the search for a CUDA toolkit; nothing is compiled."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import stat
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from tests.install.checkout import ROOT, copy_to, load_setup, run


@pytest.fixture
def setup() -> ModuleType:
    return load_setup()


def toolkit(folder: Path, version: int | None = 13000, compiler: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit."""
    (folder / "include").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    if version is not None:
        (folder / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}\n")
    if compiler:
        script(folder / "bin" / "nvcc", "exit 0")
    return folder


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without CUDA: no variable, nothing on PATH; returns the folder that is on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_cuda_home_is_taken(setup: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", 12080)))
    assert setup.version_of(tmp_path / "cuda") == "12.8"
    assert setup.toolkit_for("12.6", "2.14.1") == tmp_path / "cuda"


def test_nvcc_that_is_a_script_says_where_its_toolkit_is(setup: ModuleType, bare: Path, tmp_path: Path) -> None:
    folder = toolkit(tmp_path / "elsewhere" / "cuda")
    script(bare / "nvcc", f'echo "#\\$ TOP={folder}/bin/.." >&2')
    assert setup.toolkits()[0] == folder
    assert setup.toolkit_for("13.0", "2.14.1") == folder


def test_nvcc_that_is_a_link_is_followed(setup: ModuleType, bare: Path, tmp_path: Path) -> None:
    folder = toolkit(tmp_path / "elsewhere" / "cuda")
    (bare / "nvcc").symlink_to(folder / "bin" / "nvcc")
    assert setup.toolkit_for("13.0", "2.14.1") == folder


def test_toolkit_from_pip_is_found(
    setup: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = toolkit(tmp_path / "site-packages" / "nvidia" / "cu99", 99000)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    assert setup.toolkit_for("99.0", "9.9.0") == folder


Toolkit = dict[str, int] | None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"version": 12080}, "CUDA 12.8"),
        ({"compiler": False}, "no include/cuda_runtime.h and bin/nvcc"),
        (None, "no include/cuda_runtime.h and bin/nvcc"),
    ],
    ids=["another version", "no compiler", "no such folder"],
)
def test_error_says_where_it_looked(
    setup: ModuleType,
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: dict[str, int] | None,
    said: str,
) -> None:
    folder = tmp_path / "cuda" if kind is None else toolkit(tmp_path / "cuda", **kind)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    with pytest.raises(SystemExit, match=re.escape(f"{folder}: {said}")) as raised:
        setup.toolkit_for("13.0", "2.14.1")
    assert "a toolkit of CUDA 13 must be installed, as torch 2.14.1 is built with CUDA 13.0" in str(raised.value)


def test_torch_without_cuda_is_named(setup: ModuleType) -> None:
    with pytest.raises(SystemExit, match=re.escape("torch must be built with CUDA, got torch 2.13.0+cpu")):
        setup.toolkit_for(None, "2.13.0+cpu")


WITH_CUDA = """
import runpy, sys, torch
torch.version.cuda, sys.argv = "13.0", ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_auto_ignores_cuda_that_is_broken(tmp_path: Path) -> None:
    """A torch with CUDA, an nvcc that fails, and a CUDA_HOME without headers."""
    folder = copy_to(tmp_path / "checkout")
    path = f"{script(tmp_path / 'nvcc', 'exit 1').parent}:/usr/bin:/bin"
    result = run(["-c", WITH_CUDA], folder, CUDA_HOME=str(tmp_path), PATH=path)
    assert result.returncode == 0, result.stderr
    assert "CPU kernels alone" in result.stdout


def test_auto_compiles_no_cuda_source(setup: ModuleType) -> None:
    (native,) = setup.extension("auto")["ext_modules"]
    assert native.sources == setup.extension("cpu")["ext_modules"][0].sources
    assert {"csrc/cpu/module.cpp", "csrc/tensor.cpp"} <= set(native.sources)
    assert not any("cuda" in Path(name).parts for name in native.sources)


def test_unknown_mode_is_an_error(tmp_path: Path) -> None:
    result = run(["setup.py", "--version"], copy_to(tmp_path / "checkout"), UNIRL_BUILD="gpu")
    assert result.returncode != 0
    assert "UNIRL_BUILD must be one of auto, none, cpu, cuda, got 'gpu'" in result.stderr


def test_compiling_without_pybind_is_an_error(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = setup.extension("auto")["cmdclass"]["build_ext"](setup.setuptools.Distribution())
    with pytest.raises(SystemExit, match="pybind11 must be installed before the native extension is built"):
        command.run()


def test_a_changed_header_compiles_units_anew(setup: ModuleType, tmp_path: Path) -> None:
    source, compiled = tmp_path / "unit.cpp", tmp_path / "unit.o"
    source.touch()
    made = source.stat().st_mtime
    assert setup.is_stale(str(compiled), str(source), made - 9)
    compiled.touch()
    os.utime(compiled, (made + 5, made + 5))
    assert not setup.is_stale(str(compiled), str(source), made - 9)
    assert setup.is_stale(str(compiled), str(source), made + 9)
    os.utime(source, (made + 9, made + 9))
    assert setup.is_stale(str(compiled), str(source), made - 9)


def test_cpu_kernels_need_no_torch(isolated: Path, tmp_path: Path) -> None:
    """In an environment without torch, what is compiled is what is compiled beside one."""
    (isolated / "pybind11").symlink_to(Path(pybind11.__file__).parent)
    folder = copy_to(tmp_path / "checkout")
    code = "import setup; native = setup.extension('auto')['ext_modules'][0]; print(native.extra_compile_args)"
    without = run(["-S", "-c", code], folder, path=[folder, isolated])
    assert without.returncode == 0, without.stderr
    assert run(["-c", code], folder, path=[folder]).stdout == without.stdout


def test_minimum_of_setuptools_is_one(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    least = f"setuptools>={setup.MINIMUM_SETUPTOOLS}"
    assert f'requires = ["{least}"]' in (ROOT / "pyproject.toml").read_text()
    assert f'"{least},<' in (ROOT / "README.md").read_text()
    monkeypatch.setattr(setup.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=re.escape(f"setuptools must be at least {least[-2:]}, got 65.5.0")):
        setup.main()


@pytest.fixture
def isolated(tmp_path: Path) -> Path:
    """Packages of a build environment as pip makes one: setuptools alone."""
    (tmp_path / "isolated").mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (folder,) = importlib.import_module(name).__path__
        (tmp_path / "isolated" / name).symlink_to(folder)
    (metadata,) = Path(folder).parent.glob("setuptools-*.dist-info")
    (tmp_path / "isolated" / metadata.name).symlink_to(metadata)
    return tmp_path / "isolated"


PYBIND = "pybind11>=3"

ASK = """
import sys
{before}
import build_backend
print(build_backend._compiling())
import importlib.util
print(importlib.util.find_spec("torch") is not None)
"""


@pytest.mark.parametrize(
    ("mode", "outside", "needed", "visible"),
    [
        ("auto", None, [PYBIND], False),
        ("none", None, [], False),
        ("cuda", None, [PYBIND, "ninja"], True),
        ("cuda", "exit 1", [PYBIND, "ninja", "torch>=2.11"], False),
        ("cuda", "echo 2.9.1; echo /nowhere/torch", [PYBIND, "ninja", "torch>=2.11"], False),
    ],
    ids=["cpu", "none", "installed", "not installed", "too old"],
)
def test_what_is_asked_for_and_seen(
    isolated: Path, tmp_path: Path, mode: str, outside: str | None, needed: list[str], visible: bool
) -> None:
    """In a build environment without torch; ``outside`` stands for an interpreter that has none, or an old one."""
    folder = copy_to(tmp_path / "checkout")
    before = "" if outside is None else f"sys.executable = {str(script(tmp_path / 'python', outside))!r}"
    code = ["-S", "-c", ASK.format(before=before)]
    result = run(code, folder, path=[folder / "csrc", isolated], UNIRL_BUILD=mode)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [str(needed), str(visible)]


def test_pure_python_wheel_needs_no_torch(isolated: Path, tmp_path: Path) -> None:
    folder = copy_to(tmp_path / "checkout")
    code = ["-S", "-c", "import build_backend; print(build_backend.build_wheel('dist'))"]
    result = run(code, folder, path=[folder / "csrc", isolated], UNIRL_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("-py3-none-any.whl")
