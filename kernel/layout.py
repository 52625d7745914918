"""Lays the package out as a kernel of Hugging Face's ``kernels``: ``python kernel/layout.py FOLDER``.

FOLDER gets

    build.toml, flake.nix, CARD.md, torch-ext/unirl_kernels     what kernel-builder builds from
    build/torch-cpu, build/torch-cuda                           what it builds: Python and Triton, nothing compiled
    build/torch213-cxx11-cpu-x86_64-linux                       with the C++ kernels of this checkout: for this Python
                                                                alone, not to be published

so that ``kernels.get_local_kernel(Path(FOLDER))`` loads it. A kernel is imported under a name of its own, from any
folder, several versions in one process; imports are therefore relative there, and ``torch.ops`` gets that name.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "unirl_kernels"
NAME = PACKAGE.name
COMMANDS = ("__main__.py", "commands")
"""The command line: a kernel has none."""

OLDER = '''"""Where ``kernels`` before 0.12 looks for the kernel."""

import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parents[1]
_name = json.loads((_folder / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({name: getattr(sys.modules[_name], name) for name in sys.modules[_name].__all__})
__all__ = sys.modules[_name].__all__
'''


def relative(source: str, folders: int) -> str:
    """The source of a module with its imports of the package made relative.

    Args:
        source: of a module of the package.
        folders: how many lie between the package and the module.

    Raises:
        ValueError: at ``import unirl_kernels``, which cannot be made relative.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise ValueError(f"line {node.lineno}: `from {NAME} import ...` is needed, as it can be made relative")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == NAME:
            _, _, inner = str(node.module).partition(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(
                f"from {node.module} import", f"from {'.' * (folders + 1)}{inner} import", 1
            )
    return "".join(lines)


def copy_sources(folder: Path) -> None:
    """Copy the package's Python files."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE)
        if inner.parts[0] in COMMANDS:
            continue
        try:
            text = relative(path.read_text(), len(inner.parts) - 1)
        except ValueError as error:
            raise SystemExit(f"{path}, {error}") from error
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner).write_text(text)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in base64, by its path."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hashed = hashlib.sha256(path.read_bytes()).digest()
            hashes[path.relative_to(folder).as_posix()] = base64.b64encode(hashed).decode()
    return hashes


def finish(folder: Path, backend: str) -> None:
    """Add what every variant has: the folder where older loaders look, and ``metadata.json``."""
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    (folder / NAME).mkdir()
    (folder / NAME / "__init__.py").write_text(OLDER)
    files = digest(folder)
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    metadata = {
        "name": general["name"],
        "id": f"_{NAME}_{backend}_{unique}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def compiled() -> tuple[Path, str] | None:
    """The extension that this interpreter imports, and its variant's name, which has the torch of the loader.

    None where it is not built.
    """
    found = sorted(PACKAGE.glob(f"_C.{sys.implementation.cache_tag}-*.so"))
    if not found or platform.system() != "Linux":
        return None
    major, minor = re.findall(r"\d+", importlib.metadata.version("torch"))[:2]
    return found[0], f"torch{major}{minor}-cxx11-cpu-{platform.machine()}-linux"


def lay_out(folder: Path) -> list[str]:
    """Make the kernel anew in a folder.

    Returns:
        The names of its variants.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, folder)
    shutil.copy(HERE.parent / "LICENSE", folder)
    copy_sources(folder / "torch-ext" / NAME)
    backends = {f"torch-{backend}": backend for backend in ("cpu", "cuda")}
    extension = compiled()
    if extension is not None:
        backends[extension[1]] = "cpu"
    for variant, backend in backends.items():
        shutil.copytree(folder / "torch-ext" / NAME, folder / "build" / variant)
        if extension is not None and variant == extension[1]:
            shutil.copy(extension[0], folder / "build" / variant)
        finish(folder / "build" / variant, backend)
    return list(backends)


def main() -> None:
    folder = Path(sys.argv[1])
    for variant in lay_out(folder):
        print(folder / "build" / variant)


if __name__ == "__main__":
    main()
