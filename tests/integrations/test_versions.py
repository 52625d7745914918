"""A release that was not tried warns; the switch says nothing or refuses."""

from __future__ import annotations

import warnings

import pytest

from unirl_kernels.integrations import versions

TRIED = ("1.10", "1.16")


def released(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(versions, "version", lambda _: release)


@pytest.mark.parametrize("release", ["1.10", "1.10rc1", "1.10.0.dev3", "1.16.9", "1.12.0+cu130", "1!1.11"])
def test_tried_releases_say_nothing(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released(monkeypatch, release)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_release("trl", *TRIED)


@pytest.mark.parametrize("release", ["1.9.2", "1", "1.17rc1", "2.0.0.dev0", "0.29.1", "main"])
def test_others_warn(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released(monkeypatch, release)
    with pytest.warns(UserWarning, match=f"trl {release} was not tried, only 1.10 to 1.16") as found:
        versions.check_release("trl", *TRIED)
    assert versions.SWITCH in str(found[0].message)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    released(monkeypatch, "1.17.0")
    monkeypatch.setenv("UNIRL_UNTRIED_VERSIONS", "allow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_release("trl", *TRIED)
    monkeypatch.setenv("UNIRL_UNTRIED_VERSIONS", "refuse")
    with pytest.raises(RuntimeError, match=r"trl must be of version 1\.10 to 1\.16, got 1\.17\.0"):
        versions.check_release("trl", *TRIED)
    released(monkeypatch, "1.10rc1")
    versions.check_release("trl", *TRIED)
    monkeypatch.setenv("UNIRL_UNTRIED_VERSIONS", "yes")
    with pytest.raises(ValueError, match="UNIRL_UNTRIED_VERSIONS must be one of warn, allow, refuse, got 'yes'"):
        versions.check_release("trl", *TRIED)


def test_a_missing_package() -> None:
    with pytest.raises(ImportError, match="no-such-package is not installed: pip install no-such-package"):
        versions.check_release("no-such-package", *TRIED)
