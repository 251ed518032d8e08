"""A hundred thousand keys in SQL: rows as the service writes them, copied from one key and MAC'd by the real token."""

from __future__ import annotations

import dataclasses
import itertools
import uuid

import sqlalchemy as sa
from sqlalchemy import Engine

from keystore import Hsm, Key, rowmac
from keystore.catalog import _key_values, _version_values, tables
from keystore.hsm import Material

CHUNK = 5_000


def copy_of(template: Key, hsm: Hsm) -> Key:
    """A key of its own id and object id around the template's wrapped key."""
    version = dataclasses.replace(template.latest, object_id=uuid.uuid4())
    key = dataclasses.replace(template, id=uuid.uuid4(), versions=(version,))
    return dataclasses.replace(key, mac=hsm.row_mac(rowmac.key_row(key, Material.KDK_512)))


def fill(engine: Engine, template: Key, hsm: Hsm, count: int) -> list[uuid.UUID]:
    """Insert that many copies; their ids."""
    keys, versions = tables.tables["keystore_key"], tables.tables["keystore_version"]
    made: list[uuid.UUID] = []
    rest = (copy_of(template, hsm) for _ in range(count))
    while chunk := list(itertools.islice(rest, CHUNK)):
        with engine.begin() as connection:
            connection.execute(sa.insert(keys), [{**_key_values(k), "changed": 0} for k in chunk])
            connection.execute(sa.insert(versions), [_version_values(k.id, k.latest) for k in chunk])
        made += [k.id for k in chunk]
    return made
