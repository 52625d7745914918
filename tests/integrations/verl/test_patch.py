"""Where verl's functions are replaced, that every object is put back, and what is refused."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import ROOT
from tests.integrations.verl.modules import V, Verl, verl
from unirl_kernels.integrations import verl as ours
from unirl_kernels.integrations import versions
from unirl_kernels.integrations.verl import megatron

__all__ = ["verl"]

README = ROOT / "README.md"


Names = dict[tuple[str, str], object]


def everything() -> Names:
    """What each name of each of verl's modules stands for."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "verl"}
    return {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}


def changed(before: Names) -> set[tuple[str, str]]:
    """Names that stand for another object than before, or did not exist, or do not any more."""
    now, nothing = everything(), object()
    return {name for name in before.keys() | now.keys() if before.get(name, nothing) is not now.get(name, nothing)}


def test_patch_and_unpatch(verl: Verl) -> None:
    before = everything()
    ours.unpatch()
    ours.patch()
    once = everything()
    ours.patch()
    assert not changed(once)
    assert all(verl.patched())
    assert changed(before) == {(module.__name__, name) for module, name in verl.places}
    ours.unpatch()
    ours.unpatch()
    assert not changed(before)
    with ours.patch():
        assert all(verl.patched())
    assert not changed(before)


def test_functions_of_split_vocabularies(verl: Verl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where Megatron is installed, and back again."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    for path in (core.parent / "__init__.py", core / "__init__.py", core / "parallel_state.py"):
        path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    package = ModuleType("verl.utils.megatron")
    package.__path__ = [str(Path(verl.logits.__file__ or "").parent / "megatron")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    try:
        theirs = importlib.import_module("verl.utils.megatron.tensor_parallel")
        before = {name: getattr(theirs, name) for name in ours.OF_SHARDS}
        ours.patch()
        assert all(getattr(theirs, name) is getattr(megatron, name) for name in before)
        ours.unpatch()
        assert all(getattr(theirs, name) is old for name, old in before.items())
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
            del sys.modules[name]
        sys.modules.pop("verl.utils.megatron.tensor_parallel", None)


def test_modules_that_have_imported_the_functions(verl: Verl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under other names, too; before the patch or under it. Never in somebody else's modules."""
    early, late, stranger = (ModuleType(name) for name in ("verl.early", "verl.late", "verlorn"))
    own = verl.logits.logprobs_from_logits, verl.hidden.FusedLinearForPPO, verl.kernel.linear_cross_entropy
    early.logp = stranger.logp = own[0]
    for module in (early, stranger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ours.patch()
    assert early.logp is ours.logprobs_from_logits
    assert stranger.logp is own[0]
    late.head, late.cross_entropy = verl.hidden.FusedLinearForPPO, verl.kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, late.__name__, late)
    ours.unpatch()
    assert early.logp is own[0]
    assert late.head is own[1]
    assert late.cross_entropy is own[2]


def test_functions_of_verl_that_call_them(verl: Verl) -> None:
    logits, labels = torch.randn(2, 9, V), torch.randint(0, V, (2, 9))
    wanted = verl.logits.log_probs_from_logits_response(labels, logits, 4)
    with ours.patch():
        got = verl.logits.log_probs_from_logits_response(labels, logits, 4)
    assert torch.equal(got, ours.logprobs_from_logits(logits[:, -5:-1], labels[:, -4:]))
    torch.testing.assert_close(got, wanted)


def test_patch_refuses_what_it_does_not_know(verl: Verl, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything()

    def refused(module: ModuleType, name: str, value: object, match: str) -> None:
        with monkeypatch.context() as version:
            if value is None:
                version.delattr(module, name)
            else:
                version.setattr(module, name, value)
            with pytest.raises(RuntimeError, match=match):
                ours.patch()
            assert not any(verl.patched())
        assert not changed(before)

    monkeypatch.setenv(versions.SWITCH, "refuse")
    refused(versions, "version", lambda _: "0.8.0", r"verl must be of version 0\.9, got 0\.8\.0")
    refused(versions, "version", lambda _: "1.0rc1", r"verl must be of version 0\.9, got 1\.0rc1")
    refused(
        verl.logits,
        "logprobs_from_logits",
        lambda logits, labels: None,
        r"looked for logprobs_from_logits\(logits, labels, inplace_backward\) in verl\.utils\.torch_functional, "
        r"found logprobs_from_logits\(logits, labels\)",
    )
    refused(verl.logits, "entropy_from_logits", None, r"looked for entropy_from_logits\(logits\) .*, found nothing of")
    refused(
        verl.logits,
        "entropy_from_logits_with_chunking",
        lambda logits, chunk_size, weights: None,
        r"looked for entropy_from_logits_with_chunking\(logits, chunk_size\) .*\(logits, chunk_size, weights\)",
    )

    class Changed(torch.nn.Module):
        def forward(self, hidden_states: object, vocab_weights: object, input_ids: object) -> None:
            raise NotImplementedError

    signature = r"FusedLinearForPPO\(hidden_states, vocab_weights, input_ids"
    refused(verl.hidden, "FusedLinearForPPO", Changed, rf"{signature}, temperature\) .*, found {signature}\)")
    refused(verl.kernel, "LinearCrossEntropy", None, r"looked for LinearCrossEntropy\(hidden, weight, labels, temp")
    refused(verl.kernel, "linear_cross_entropy", None, r"looked for linear_cross_entropy = LinearCrossEntropy\.apply")


def test_patch_again_refuses_what_has_changed(verl: Verl, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves verl's own functions in place."""
    before = everything()
    ours.patch()
    monkeypatch.setattr(verl.kernel, "LinearCrossEntropy", None)
    with pytest.raises(RuntimeError, match="looked for LinearCrossEntropy"):
        ours.patch()
    monkeypatch.undo()
    assert not changed(before)


def test_patch_without_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(versions, "version", absent)
    with pytest.raises(ImportError, match="verl is not installed: pip install verl"):
        ours.patch()


def test_readme(verl: Verl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's module, imported as verl imports what ``VERL_USE_EXTERNAL_MODULES`` names."""
    section = README.read_text().split("## Use it in verl\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    file, name = re.search(r"# (\w+\.py), .*VERL_USE_EXTERNAL_MODULES=(\w+)", block).groups()
    (tmp_path / file).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    load = importlib.import_module("verl.utils.import_utils").import_external_libs
    load([name])
    assert all(verl.patched())
    sys.modules.pop(name)
