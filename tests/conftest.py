"""Fixtures that several suites share: a prepared node, the node in this process, the node as users run it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from msgspec import structs

from databases import address, behind
from harness import Files, Lab, Served, lab_of, prepared, served, until
from policy.freeze import LEASES
from postgres import Cluster, cluster

# How quickly a busy machine makes examples says nothing about what is tested.
settings.register_profile("skms", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("skms")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the soak, which lasts five minutes by itself: at the end it would keep one worker waiting."""
    items.sort(key=lambda item: item.path.name != "test_long_life.py")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def dev_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What `skms dev up` prepares, with tokens in two regions; nothing runs."""
    from service.dev import prepare

    directory = tmp_path_factory.mktemp("dev") / "node"
    prepare(directory, regions=("eu-de-1", "eu-de-2"), port=0, database=address(directory))
    return prepared(directory)


@pytest.fixture(scope="session")
async def running(dev_files: Files) -> AsyncIterator[Lab]:
    """The node, wired in this process."""
    async with lab_of(dev_files) as made:
        yield made


@pytest.fixture
async def lab(running: Lab) -> Lab:
    """The node once it knows what is frozen: tests without an event loop keep it from saying that it lives."""
    freezes = running.node.kms.freezes
    await until(lambda: freezes.age_s is not None and freezes.age_s < min(LEASES.values()), "freezes are not read")
    return running


@pytest.fixture
async def elsewhere(lab: Lab, dev_files: Files) -> AsyncIterator[Lab]:
    """A second node over the same database and tokens that stands in eu-de-2."""
    section = structs.replace(dev_files.config.node, name="n1", region="eu-de-2")
    config = structs.replace(dev_files.config, node=section)
    async with lab_of(dataclasses.replace(dev_files, config=config)) as made:
        yield made


@pytest.fixture
def pkcs11_calls(lab: Lab) -> Callable[[], int]:
    """How many PKCS#11 functions this process has called so far."""
    return lab.node.pkcs11_calls


class Database:
    """Changes behind the service's back, as a database owner would make them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def forge_key_row(self, key: str) -> None:
        """Lower a key's tier without its row MAC, and let the service see it."""
        lowered = f"UPDATE keystore_key SET tier = 3 WHERE key_id = '{uuid.UUID(key)}'"
        behind(self._lab.files.config.database.url, lowered, "UPDATE keystore_epoch SET epoch = epoch + 1")
        self._lab.node.kms.keystore.poll()


@pytest.fixture
def database(lab: Lab) -> Database:
    return Database(lab)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running development node."""
    with served(tmp_path_factory.mktemp("served") / "node") as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server, durable as the audit log demands; `postgres.fresh(name)` gives a database of one's own."""
    with cluster() as made:
        yield made
