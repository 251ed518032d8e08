"""The keystore against a model that holds no key: any order of changes, workers that come, go and miss the news."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from keystore_lab import Lab, new_key

from keystore import (
    Envelope,
    InputRefused,
    Key,
    KeyDestroyed,
    KeyNotFound,
    KeyState,
    Keystore,
    Purpose,
    StaleKey,
    VersionFenced,
    WrongState,
)

REFUSALS = (WrongState, KeyDestroyed, VersionFenced, InputRefused, KeyNotFound)


def attempt(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(value, None), or (None, the refusal); any other error passes through."""
    try:
        return act(), None
    except REFUSALS as error:
        return None, error


def agrees(error: Exception | None, expect: type[Exception] | None) -> bool:
    """Whether what came is what the model says."""
    return error is None if expect is None else isinstance(error, expect)


class Model:
    """What one key is, in words of the specification."""

    def __init__(self) -> None:
        self.state, self.delete_at = "active", None
        self.versions, self.revoked, self.fence = 1, set[int](), 1
        self.kv = 1

    def usable(self, version: int) -> type[Exception] | None:
        if self.state == "destroyed":
            return KeyDestroyed
        if self.state != "active" or self.delete_at is not None:
            return WrongState
        return VersionFenced if version in self.revoked or version < self.fence else None


class Machine(RuleBasedStateMachine):
    """Two workers over one database; each change is made by either, and the other hears of it by polling."""

    keys, sealed, plans = Bundle("keys"), Bundle("sealed"), Bundle("plans")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.lab = Lab(f"sqlite:///{self.directory.name}/skms.db")
        self.workers = [self.lab.store, self.lab.worker()]
        self.models: dict[str, Model] = {}

    def teardown(self) -> None:
        self.lab.close()
        self.directory.cleanup()

    def found(self, worker: int, name: str) -> tuple[Keystore, Key]:
        store = self.workers[worker]
        store.poll()
        return store, store.find("acme", name)

    def change(
        self, worker: int, name: str, plan: Callable[[Keystore, Key], Any], expect: type[Exception] | None
    ) -> Key | None:
        """Do what the model allows; see it refused, and nothing changed, if the model forbids it."""
        store, key = self.found(worker, name)
        made, error = attempt(lambda: plan(store, key))
        assert agrees(error, expect), (error, expect)
        if error is not None:
            return None
        self.models[name].kv += 1
        return self.lab.apply(made)

    @initialize(target=keys)
    def first(self) -> Any:
        return self.created(1)

    @rule(target=keys, suite=st.sampled_from([1, 2]))
    def create(self, suite: int) -> Any:
        return self.created(suite)

    def created(self, suite: int) -> str:
        key = self.lab.apply(self.lab.store.plan_create(new_key(suite=suite)))
        self.models[str(key.id)] = Model()
        return str(key.id)

    @rule(target=sealed, name=keys, worker=st.integers(0, 1), data=st.binary(max_size=40), batch=st.booleans())
    def seal(self, name: str, worker: int, data: bytes, batch: bool) -> Any:
        model, (store, key) = self.models[name], self.found(worker, name)
        expect = model.usable(model.versions)
        with store.batch() as together:
            sealer = together if batch else store
            made, error = attempt(lambda: sealer.seal(key, data, {"n": name}))
        assert agrees(error, expect), (error, expect)
        if error is not None:
            return multiple()
        assert made.version == model.versions
        return name, made.version, made.ciphertext, data

    @rule(made=sealed, worker=st.integers(0, 1))
    def open(self, made: tuple[str, int, bytes, bytes], worker: int) -> None:
        name, version, blob, data = made
        store, key = self.found(worker, name)
        expect = self.models[name].usable(version)
        opened, error = attempt(lambda: store.open(key, Envelope.parse(blob), {"n": name}, purpose=Purpose.ENCRYPT))
        assert agrees(error, expect), (error, expect)
        assert error is not None or opened == data

    @rule(name=keys, worker=st.integers(0, 1))
    def rotate(self, name: str, worker: int) -> None:
        model = self.models[name]
        expect = model.usable(model.versions)
        if self.change(worker, name, lambda s, k: s.plan_rotate(k), None if expect is VersionFenced else expect):
            model.versions += 1

    @rule(name=keys, worker=st.integers(0, 1), state=st.sampled_from(list(KeyState)))
    def transition(self, name: str, worker: int, state: KeyState) -> None:
        model = self.models[name]
        table = {
            "active": {"suspended", "deactivated", "compromised"},
            "suspended": {"active", "deactivated", "compromised"},
            "deactivated": {"compromised"},
        }
        allowed = state in table.get(model.state, set())
        if model.delete_at is not None:
            allowed = allowed and state == "compromised"
        refusal: type[Exception] = KeyDestroyed if model.state == "destroyed" else WrongState
        if state == "deactivated" and allowed:
            return  # a whole key ends this way only where originator end dates are kept
        if self.change(worker, name, lambda s, k: s.plan_transition(k, state), None if allowed else refusal):
            model.state = str(state)

    @rule(name=keys, worker=st.integers(0, 1), days=st.sampled_from([6, 7, 30, 90, 91]))
    def schedule(self, name: str, worker: int, days: int) -> None:
        model = self.models[name]
        expect: type[Exception] | None = None
        if not 7 <= days <= 90:
            expect = InputRefused
        elif model.state == "destroyed":
            expect = KeyDestroyed
        elif model.delete_at is not None:
            expect = WrongState
        made = self.change(worker, name, lambda s, k: s.plan_schedule_deletion(k, wait_s=days * 86_400), expect)
        if made is not None:
            model.state = "suspended" if model.state == "active" else model.state
            model.delete_at = made.delete_at

    @rule(name=keys, worker=st.integers(0, 1))
    def cancel(self, name: str, worker: int) -> None:
        model = self.models[name]
        expect = KeyDestroyed if model.state == "destroyed" else WrongState
        waiting = model.delete_at is not None
        if self.change(worker, name, lambda s, k: s.plan_cancel_deletion(k), None if waiting else expect):
            model.delete_at = None

    @rule(name=keys, worker=st.integers(0, 1))
    def destroy(self, name: str, worker: int) -> None:
        model = self.models[name]
        due = model.delete_at is not None and model.delete_at <= self.lab.clock.at
        expect = KeyDestroyed if model.state == "destroyed" else WrongState
        if self.change(worker, name, lambda s, k: s.plan_destroy(k), None if due else expect):
            model.state, model.delete_at = "destroyed", None

    @rule(name=keys, worker=st.integers(0, 1), version=st.integers(1, 4))
    def revoke(self, name: str, worker: int, version: int) -> None:
        model = self.models[name]
        allowed = version < model.versions and version not in model.revoked
        allowed = allowed and model.state in {"active", "suspended"} and model.delete_at is None
        if self.change(worker, name, lambda s, k: s.plan_revoke_version(k, version), None if allowed else Exception):
            model.revoked.add(version)

    @rule(name=keys, worker=st.integers(0, 1), fence=st.integers(1, 4))
    def fence(self, name: str, worker: int, fence: int) -> None:
        model = self.models[name]
        allowed = model.state != "destroyed" and model.fence <= fence <= model.versions
        expect = None if allowed else (KeyDestroyed if model.state == "destroyed" else InputRefused)
        if self.change(worker, name, lambda s, k: s.plan_update(k, min_decrypt_version=fence), expect):
            model.fence = fence

    @rule(target=plans, name=keys, worker=st.integers(0, 1))
    def plan_late(self, name: str, worker: int) -> Any:
        """A change that is prepared now and written after others."""
        if self.models[name].state == "destroyed":
            return multiple()
        store, key = self.found(worker, name)
        return name, store.plan_update(key, description="late")

    @rule(late=consumes(plans))
    def write_late(self, late: tuple[str, Any]) -> None:
        name, plan = late
        model = self.models[name]
        assert plan.key is not None
        try:
            self.lab.apply(plan)
        except StaleKey:
            assert plan.key.kv != model.kv + 1
        else:
            assert plan.key.kv == model.kv + 1
            model.kv += 1

    @rule(days=st.integers(1, 40))
    def wait(self, days: int) -> None:
        self.lab.clock.days(days)

    @rule(worker=st.integers(0, 1))
    def crash(self, worker: int) -> None:
        self.workers[worker] = self.lab.worker()

    @invariant()
    def the_database_is_what_the_model_says(self) -> None:
        for name, model in self.models.items():
            key = self.lab.catalog.key(uuid.UUID(name))
            assert (str(key.state), key.delete_at, key.kv) == (model.state, model.delete_at, model.kv)
            assert [v.number for v in key.versions] == list(range(1, model.versions + 1))
            destroyed = model.state == "destroyed"
            assert all((v.blob == b"") == destroyed for v in key.versions)
            if not destroyed:
                assert {v.number for v in key.versions if v.state != "active"} == model.revoked

    @invariant()
    def no_stopped_key_is_held_by_the_hsm_once_both_workers_polled(self) -> None:
        for store in self.workers:
            store.poll()
        for name, model in self.models.items():
            key = self.workers[0].find("acme", name)
            for version in key.versions:
                if model.usable(version.number) is not None:
                    assert version.object_id not in self.lab.hsm.cached


TestKeystoreAgainstItsModel = Machine.TestCase
TestKeystoreAgainstItsModel.settings = settings(max_examples=40, stateful_step_count=40)
