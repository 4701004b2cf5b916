"""Fixtures of the whole suite. Nothing here imports torch: the ranks do, once each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests import jobs
from tests.ranks import Ranks

# Before anything imports datasets or transformers, here and in every process started from here.
CACHE = tempfile.mkdtemp(prefix="distmerge-tests-")
os.environ.update(HF_DATASETS_CACHE=CACHE, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

LONG = ("test_launch_scripts.py", "test_silence.py", "test_runs.py", "test_launch.py", "test_malformed.py", "test_kills.py")
"""Files that take minutes. They come first, or one process would work on the last of them while the other has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def pytest_sessionfinish() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def started() -> Iterator[list[jobs.Job]]:
    """Jobs to end, whatever becomes of the test."""
    running: list[jobs.Job] = []
    yield running
    for job in running:
        job.end()
