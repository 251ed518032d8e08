"""A keystore for every test of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `keystore_lab`: this folder is named like the package it tests

from keystore_lab import Lab, sqlite_lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """One worker on a database of its own."""
    with sqlite_lab(tmp_path) as made:
        yield made
