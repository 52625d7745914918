"""Training runs that the tests of TRL's trainers share."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integrations.trl.training import Head, Seen


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Seen]]:
    """Train a case, on TRL's own head or on that of a context."""
    from tests.integrations.trl.training import CASES, saved, train

    out = tmp_path_factory.mktemp("out")
    folder_of = functools.cache(lambda family: saved(family, tmp_path_factory.mktemp(family)))
    gc.freeze()  # a trainer collects garbage, and would look through all that is imported: half of its time

    def of(
        name: str, head: Head = nullcontext, prepare: Callable[[Any], object] = lambda _: None, **options: Any
    ) -> Seen:
        return train(CASES[name], folder_of(CASES[name].family), out, head, prepare, **options)

    yield of
    gc.unfreeze()


@pytest.fixture(scope="session")
def own(run: Callable[..., Seen]) -> Callable[[str], list[Seen]]:
    """A case on TRL's own head, as it is and in other orders."""
    from tests.integrations.trl.heads import reordered
    from tests.integrations.trl.training import ORDERS

    @functools.cache
    def train(name: str) -> list[Seen]:
        return [run(name), *(run(name, partial(reordered, seed)) for seed in range(ORDERS))]

    return train
