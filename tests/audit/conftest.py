"""A log for every test of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `audit_lab`: this folder is named like the package it tests

from audit_lab import Lab


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    """A fresh database."""
    return Lab(tmp_path)
