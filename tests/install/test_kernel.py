"""The package as a kernel of the Hub: loaded from any folder, under another name, beside the installed package."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import unirl_kernels as uk
from tests.install.checkout import ROOT, run
from unirl_kernels.backends import native

LOADER = """
import importlib.util, json, sys, warnings
from pathlib import Path
import torch
warnings.simplefilter("ignore")

def load(folder):
    name = json.loads((Path(folder) / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

def loss_and_gradient(uk, **plan):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 50, requires_grad=True), torch.randint(0, 50, (2, 3))
    advantage, old = torch.tensor([1.0, -1.0]), torch.full((2, 3), -4.0)
    out = uk.fused_loss(logits, uk.Batch(target, advantage, old), uk.ppo(clip=0.2), plan=uk.Plan(**plan))
    out.loss.backward()
    z = logits.detach().double().requires_grad_()
    logp = z.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    ratio, a = (logp - old).exp(), advantage[:, None].double()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    loss.backward()
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=1e-5, atol=1e-7)
    return loss
"""
"""As ``kernels`` 0.17 imports a variant; and a loss of PPO with its gradient, held against its formula."""


@pytest.fixture(scope="module")
def layout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_layout", ROOT / "kernel" / "layout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(layout: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel") / "kernel"
    assert {"torch-cpu", "torch-cuda"} <= set(layout.lay_out(folder))
    return folder


def run_loaded(code: str, folder: Path, *arguments: object, **environment: str) -> str:
    result = run(["-c", LOADER + code, *map(str, arguments)], folder, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


ALONE = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unirl_kernels":
            raise ImportError(f"the kernel imports {name}")

sys.meta_path.insert(0, Blocked())
uk = load(sys.argv[1])
loss_and_gradient(uk)
assert uk.explain(uk.grpo())
assert not hasattr(torch.ops.unirl, "fused_loss")
assert getattr(torch.ops, uk.__name__).fused_loss
print(uk.fused_loss.__module__)
"""


def test_a_kernel_needs_no_installed_package(kernel: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(kernel / "build" / "torch-cuda", tmp_path / "elsewhere")
    name = json.loads((moved / "metadata.json").read_text())["id"]
    assert run_loaded(ALONE, tmp_path, moved).strip() == f"{name}.api.logits"


def test_its_triton_kernels_run(kernel: Path, tmp_path: Path) -> None:
    """Interpreted, and without the installed package."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = ALONE.replace("loss_and_gradient(uk)", "loss_and_gradient(uk, backend='triton', kernel='two_sweep')")
    run_loaded(code, tmp_path, kernel / "build" / "torch-cuda", TRITON_INTERPRET="1")


TOGETHER = """
sys.path.insert(0, sys.argv[1])
import unirl_kernels
copies = [unirl_kernels, *map(load, sys.argv[2:])]
assert len({copy.__name__ for copy in copies}) == len(copies) == 3
for copy in copies:
    loss_and_gradient(copy)
    assert sum(name.startswith(copy.__name__ + ".") for name in sys.modules) > 50
for copy in copies:  # the last one has not replaced the first one's operators
    loss_and_gradient(copy)
logits, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
try:
    copies[1].fused_loss(logits, unirl_kernels.Batch(target), copies[1].sft())
except TypeError as error:
    print(error)
print(copies[1].__name__)
"""


def test_the_package_and_two_kernels_in_one_process(kernel: Path, tmp_path: Path) -> None:
    variants = [path for path in sorted((kernel / "build").iterdir()) if path.name != "torch-cuda"]
    if len(variants) < 2:  # no extension is built
        variants = [kernel / "build" / name for name in ("torch-cpu", "torch-cuda")]
    said, name = run_loaded(TOGETHER, tmp_path, ROOT, *variants).splitlines()
    assert said == f"batch must be a Batch of {name}, got one of unirl_kernels: they share no types"


NATIVE = """
warnings.simplefilter("error", RuntimeWarning)
uk = load(sys.argv[1])
loss_and_gradient(uk)
print(f"{uk.__name__}._C" in sys.modules)
"""


@pytest.mark.skipif(
    importlib.util.find_spec(f"{native.PACKAGE}._C") is None, reason="the native extension is not built"
)
def test_the_variant_with_an_extension_runs_it(kernel: Path, layout: ModuleType, tmp_path: Path) -> None:
    _, variant = layout.compiled()
    assert run_loaded(NATIVE, tmp_path, kernel / "build" / variant).strip() == "True"


def test_older_loaders_find_the_same_module(kernel: Path, tmp_path: Path) -> None:
    code = """
spec = importlib.util.spec_from_file_location("abc123", Path(sys.argv[1]) / "unirl_kernels" / "__init__.py")
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
loss_and_gradient(older)
print(older.fused_loss is sys.modules[older.fused_loss.__module__.split(".")[0]].fused_loss, len(older.__all__))
"""
    assert run_loaded(code, tmp_path, kernel / "build" / "torch-cpu").split() == ["True", str(len(uk.__all__))]


def test_what_cannot_be_made_relative_is_named(layout: ModuleType) -> None:
    source = "from unirl_kernels import a\nif a:\n    from unirl_kernels.b.c import (\n        d,\n    )\n"
    assert layout.relative(source, 1) == source.replace("unirl_kernels.b.c", "..b.c").replace("unirl_kernels ", ".. ")
    with pytest.raises(ValueError, match="line 2"):
        layout.relative("import os\nimport unirl_kernels.batch\n", 0)


def test_version_is_that_of_the_package(kernel: Path) -> None:
    metadata = json.loads((kernel / "build" / "torch-cuda" / "metadata.json").read_text())
    assert metadata["version"] == int(uk.__version__.split(".")[0])
    assert metadata["id"].isidentifier()
    assert metadata["backend"] == {"type": "cuda"}


def test_kernels_loads_it(kernel: Path, tmp_path: Path) -> None:
    """The library itself, its check of the build's description and of what the files hash to."""
    pytest.importorskip("kernels._rust", reason="kernels is not installed")
    code = """
import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
folder = Path(sys.argv[1])
print(*(backend for backend in Build.open(folder).general.backends))
for variant in sorted((folder / "build").iterdir()):
    found = Metadata.read_from_file(variant / "metadata.json")
    found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
uk = kernels.get_local_kernel(folder)
loss_and_gradient(uk)
print(uk.__name__)
"""
    (shown,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "hub.md").read_text(), flags=re.M | re.S)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "kernel").symlink_to(kernel)
    result = run(["-c", LOADER + code + shown, str(kernel)], tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    backends, name = result.stdout.splitlines()
    assert sorted(backends.split()) == ["cpu", "cuda"]
    assert name.startswith("_unirl_kernels_cpu_")


def test_no_string_names_a_module_of_the_package(kernel: Path) -> None:
    """It would be that of the installed package: ``__name__`` says where a module lies."""
    sources = kernel / "torch-ext" / "unirl_kernels"
    for path in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"unirl_kernels(\.\w+)+", str(node.value)):
                module = sources.joinpath(*node.value.split(".")[1:])
                assert not any(x.exists() for x in (module, module.with_suffix(".py"))), (path, node.value)
