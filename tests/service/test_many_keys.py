"""100,000 keys in SQL: what a start costs, what a cold key costs, and that memory is bounded by the caches.

The figures in seconds stand in docs/measurements.md (`bench/keys.py`); here the work is counted, which no busy machine
changes.
"""

from __future__ import annotations

import asyncio
import resource
import uuid

import pytest

from harness import Files, lab_of, new_key, prepared
from keystore import Purpose
from keystore.envelope import Envelope
from keystore.pkcs11.sessions import CACHE_KEYS
from keystore.store import Keystore
from many import fill
from service.database import open_engine
from service.dev import prepare

KEYS = 100_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("many") / "node"
    prepare(directory, port=0)
    return prepared(directory)


@pytest.mark.anyio
async def test_100_000_keys_cost_a_start_nothing_and_a_cold_key_two_round_trips(files: Files) -> None:
    async with lab_of(files) as lab:
        name = await new_key(lab, "AES_256")
        store = lab.node.kms.keystore
        template = store.find("health", name)
        engine = open_engine(files.config.database.url)
        ids = await asyncio.to_thread(fill, engine, template, store._hsm("eu-de-1"), KEYS)
        engine.dispose()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with lab_of(files) as lab:
        store, hsm = lab.node.kms.keystore, lab.node.kms.keystore._hsm("eu-de-1")
        assert not store._keys, "a start reads no key"
        warm = used(store, ids[0], lab.node)
        cold = used(store, ids[1], lab.node)
        hot = used(store, ids[1], lab.node)
        # An HMAC is two PKCS#11 functions (init and sign), an unwrap one: row MAC and unwrap before the operation itself.
        assert (warm, cold, hot) == (cold, 2 + 1 + 2, 2)
        for key in ids[: 4 * CACHE_KEYS]:
            used(store, key, lab.node)
        assert hsm.status().cached_keys <= CACHE_KEYS
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 120 * 1_024, "100,000 keys in SQL are not in memory"


def used(store: Keystore, key_id: uuid.UUID, node: object) -> int:
    """Seal with a key and open again; how many PKCS#11 functions the sealing called."""
    key = store.by_id(key_id)
    calls = node.pkcs11_calls()
    sealed = store.seal(key, b"x", {})
    made = node.pkcs11_calls() - calls
    assert store.open(key, Envelope.parse(sealed.ciphertext), {}, purpose=Purpose.ENCRYPT) == b"x"
    return int(made)
