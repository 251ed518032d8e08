"""States, versions, fences, deletion and aliases; caches of several workers; concurrent changes."""

from __future__ import annotations

import functools
import itertools
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from keystore_lab import Lab, new_key
from sqlalchemy import text

from keystore import (
    AliasInUse,
    Bounds,
    Envelope,
    InputRefused,
    Key,
    KeyDestroyed,
    KeyNotFound,
    KeySpec,
    KeyState,
    ListFilter,
    Purpose,
    Rotation,
    RowDamaged,
    StaleKey,
    VersionFenced,
    WrongState,
    check_use,
)
from keystore.key import TRANSITIONS

WEEK = 7 * 86_400
STATES = ("enabled", "disabled", "compromised", "pending_deletion", "compromised pending", "destroyed")


def brought_to(lab: Lab, key: Key, state: str) -> Key:
    store = lab.store
    if state in {"compromised", "compromised pending"}:
        key = lab.apply(store.plan_transition(key, KeyState.COMPROMISED))
    if state == "disabled":
        key = lab.apply(store.plan_transition(key, KeyState.SUSPENDED))
    if state in {"pending_deletion", "compromised pending", "destroyed"}:
        key = lab.apply(store.plan_schedule_deletion(key, wait_s=WEEK))
    if state == "destroyed":
        lab.clock.days(8)
        key = lab.apply(store.plan_destroy(key))
    return key


def opening(lab: Lab, blob: bytes) -> Callable[[Key], bytes]:
    return lambda key: lab.store.open(key, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT)


@pytest.mark.parametrize("state", STATES)
def test_only_an_enabled_key_can_be_used(lab: Lab, state: str) -> None:
    keys = {s: lab.new(s) for s in (KeySpec.AES_256, KeySpec.EC_P256, KeySpec.HMAC_256)}
    blob = lab.seal(keys[KeySpec.AES_256]).ciphertext
    value, _ = lab.store.mac(keys[KeySpec.HMAC_256], b"m", "HMAC_SHA_256")
    signature, _ = lab.store.sign(keys[KeySpec.EC_P256], "ECDSA_SHA_256", message=b"m")
    keys = {s: brought_to(lab, k, state) for s, k in keys.items()}
    aes, signing, macing = keys.values()
    lab.hsm.calls.clear()
    for act in (
        lambda: lab.seal(aes),
        lambda: opening(lab, blob)(aes),
        lambda: lab.store.batch().__enter__().seal(aes, b"x", {}),
        lambda: lab.store.sign(signing, "ECDSA_SHA_256", message=b"m"),
        lambda: lab.store.verify(signing, signature, "ECDSA_SHA_256", message=b"m"),
        lambda: lab.store.mac(macing, b"m", "HMAC_SHA_256"),
        lambda: lab.store.verify_mac(macing, b"m", value, "HMAC_SHA_256"),
    ):
        if state == "enabled":
            act()
        elif state == "destroyed":
            with pytest.raises(KeyDestroyed):
                act()
        else:
            with pytest.raises(WrongState):
                act()
    if state != "enabled":
        assert not lab.hsm.calls


def test_the_state_that_is_told_is_the_apis(lab: Lab) -> None:
    told = {}
    for state in STATES[:-1]:
        key = brought_to(lab, lab.new(), state)
        if state != "enabled":
            with pytest.raises(WrongState) as caught:
                lab.seal(key)
            told[state] = caught.value.state
    assert told == {
        "disabled": "disabled",
        "compromised": "compromised",
        "pending_deletion": "pending_deletion",
        "compromised pending": "pending_deletion",
    }


def test_a_deactivated_key_opens_and_does_not_seal(lab: Lab) -> None:
    key = lab.new()
    blob = lab.seal(key).ciphertext
    stopped = lab.apply(lab.store.plan_transition(key, KeyState.DEACTIVATED))
    assert opening(lab, blob)(stopped) == b"hello"
    with pytest.raises(WrongState):
        lab.seal(stopped)


@pytest.mark.parametrize(("start", "end"), list(itertools.product(STATES, KeyState)))
def test_transitions_are_those_of_the_table_and_no_other(lab: Lab, start: str, end: KeyState) -> None:
    key = brought_to(lab, lab.new(), start)
    allowed = end in TRANSITIONS[key.state] and end is not KeyState.DESTROYED
    if "pending" in start:
        allowed = end is KeyState.COMPROMISED and start == "pending_deletion"
    if allowed:
        changed = lab.apply(lab.store.plan_transition(key, end))
        assert (changed.state, changed.kv, changed.delete_at) == (end, key.kv + 1, key.delete_at)
    else:
        with pytest.raises((WrongState, KeyDestroyed)):
            lab.store.plan_transition(key, end)


def test_no_transition_destroys_a_key_without_its_waiting_time(lab: Lab) -> None:
    key = lab.new()
    with pytest.raises(WrongState):
        lab.store.plan_transition(key, KeyState.DESTROYED)
    with pytest.raises(WrongState):
        lab.store.plan_destroy(key)


@pytest.mark.parametrize("days", [-1, 0, 6, 6.99, 90.01, 91, 10_000])
def test_deletion_waits_7_to_90_days(lab: Lab, days: float) -> None:
    key = lab.new()
    with pytest.raises(InputRefused) as caught:
        lab.store.plan_schedule_deletion(key, wait_s=int(days * 86_400))
    assert caught.value.pointer == "/wait"
    for right in (7, 90):
        lab.store.plan_schedule_deletion(key, wait_s=right * 86_400)


def test_a_deletion_is_not_early_not_lost_and_can_be_cancelled(lab: Lab) -> None:
    key, other = lab.new(), lab.new()
    waiting = lab.apply(lab.store.plan_schedule_deletion(key, wait_s=WEEK))
    lab.apply(lab.store.plan_schedule_deletion(other, wait_s=2 * WEEK))
    assert waiting.api_state == "pending_deletion"
    lab.clock.days(6.99)
    assert lab.store.due_deletions(lab.clock()) == []
    with pytest.raises(WrongState):
        lab.store.plan_destroy(waiting)
    lab.clock.days(0.02)
    assert [k.id for k in lab.store.due_deletions(lab.clock())] == [key.id]
    cancelled = lab.apply(lab.store.plan_cancel_deletion(waiting))
    assert (cancelled.api_state, cancelled.delete_at) == ("disabled", None)
    assert lab.store.due_deletions(lab.clock()) == []
    assert lab.seal(lab.apply(lab.store.plan_transition(cancelled, KeyState.ACTIVE))).version == 1


def test_cancelling_a_compromised_keys_deletion_leaves_it_compromised(lab: Lab) -> None:
    for order in (("compromise", "schedule"), ("schedule", "compromise")):
        key = lab.new()
        for step in order:
            if step == "compromise":
                key = lab.apply(lab.store.plan_transition(key, KeyState.COMPROMISED))
            else:
                key = lab.apply(lab.store.plan_schedule_deletion(key, wait_s=WEEK))
        assert key.api_state == "pending_deletion"
        assert lab.apply(lab.store.plan_cancel_deletion(key)).api_state == "compromised"


def test_destroying_erases_every_blob_and_evicts_every_version(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new(alias="doomed")))
    blobs = [v.blob for v in key.versions]
    for number in (1, 2):
        lab.store.seal(key, b"x", {}, version=number)
    assert len(lab.hsm.cached) == 2
    gone = brought_to(lab, key, "destroyed")
    assert not lab.hsm.cached
    assert [(v.blob, v.state) for v in gone.versions] == [(b"", KeyState.DESTROYED)] * 2
    rows = lab.sql("SELECT blob, state FROM keystore_version WHERE key_id = :k", k=str(key.id))
    assert [(bytes(b), s) for b, s in rows] == [(b"", "destroyed")] * 2
    for plan in (
        lab.store.plan_rotate,
        lab.store.plan_cancel_deletion,
        lab.store.plan_destroy,
        lambda k: lab.store.plan_schedule_deletion(k, wait_s=WEEK),
        lambda k: lab.store.plan_update(k, description="x"),
        lambda k: lab.store.plan_revoke_version(k, 1),
        lambda k: lab.store.plan_put_alias("acme", "x", k),
        lambda k: lab.store.plan_transition(k, KeyState.ACTIVE),
    ):
        with pytest.raises(KeyDestroyed):
            plan(gone)
    found = lab.worker().find("acme", "alias/doomed")  # its metadata remains
    assert (found.api_state, found.latest.number) == ("destroyed", 2)
    with lab.engine.connect() as c:
        c.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    stored = Path(lab.url.removeprefix("sqlite:///")).read_bytes()
    assert not any(blob in stored for blob in blobs)


def test_a_blob_is_overwritten_before_it_is_emptied(lab: Lab) -> None:
    key = lab.new()
    length = len(key.latest.blob)
    lab.sql("CREATE TABLE seen (at INTEGER PRIMARY KEY, blob BLOB)")
    lab.sql(
        "CREATE TRIGGER watch AFTER UPDATE OF blob ON keystore_version "
        "BEGIN INSERT INTO seen (blob) VALUES (NEW.blob); END"
    )
    lab.store.poll()
    brought_to(lab, lab.store.by_id(key.id), "destroyed")
    assert [bytes(row[0]) for row in lab.sql("SELECT blob FROM seen ORDER BY at")] == [bytes(length), b""]


# ---- versions ------------------------------------------------------------------------------------------------------


def test_every_version_goes_on_opening_what_it_sealed(lab: Lab) -> None:
    for suite in (1, 2):
        key, made = lab.new(suite=suite), []
        for n in range(6):
            made.append(lab.seal(key, b"%d" % n).ciphertext)
            key = lab.apply(lab.store.plan_rotate(key))
        assert [v.number for v in key.versions] == list(range(1, 8))
        fresh = lab.worker().find("acme", str(key.id))
        assert [opening(lab, b)(fresh) for b in made] == [b"%d" % n for n in range(6)]
        assert len({v.object_id for v in key.versions}) == len({v.blob for v in key.versions}) == 7


@pytest.mark.parametrize("state", STATES[1:])
def test_only_an_enabled_key_rotates(lab: Lab, state: str) -> None:
    key = brought_to(lab, lab.new(), state)
    made = lab.hsm.calls["generate"]
    with pytest.raises((WrongState, KeyDestroyed)):
        lab.store.plan_rotate(key)
    assert lab.hsm.calls["generate"] == made


def test_two_concurrent_rotations_give_one_version_and_one_stale_key(lab: Lab) -> None:
    key = lab.new()
    stores = [lab.worker(), lab.worker()]
    plans = [s.plan_rotate(s.find("acme", str(key.id))) for s in stores]
    lab.apply(plans[0])
    with pytest.raises(StaleKey):
        lab.apply(plans[1])
    assert [v.number for v in lab.worker().find("acme", str(key.id)).versions] == [1, 2]
    stores[1].poll()
    again = lab.apply(stores[1].plan_rotate(stores[1].find("acme", str(key.id))))
    assert again.latest.number == 3


def test_a_key_read_while_it_rotates_is_never_taken_for_damaged(lab: Lab) -> None:
    key, stop, wrong = lab.new(), threading.Event(), []

    def read() -> None:
        store = lab.worker()
        try:
            while not stop.is_set():
                store.poll()
                found = store.find("acme", str(key.id))
                store.seal(found, b"x", {})
                assert len(found.versions) == found.kv
        except Exception as error:  # seen by the test, not by the thread's hook
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for t in threads:
        t.start()
    rotated = key
    for _ in range(60):
        rotated = lab.apply(lab.store.plan_rotate(rotated))
    stop.set()
    for t in threads:
        t.join()
    assert wrong == []
    assert rotated.latest.number == 61


def test_concurrent_rotations_from_threads_never_lose_or_repeat_a_version(lab: Lab) -> None:
    key, outcomes = lab.new(), []

    def work() -> None:
        store = lab.worker()
        for _ in range(5):
            store.poll()
            plan = store.plan_rotate(store.find("acme", str(key.id)))
            try:
                with lab.engine.begin() as c:
                    plan.write(c)
                outcomes.append("done")
            except StaleKey:
                outcomes.append("stale")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(outcomes) == 15
    found = lab.worker().find("acme", str(key.id))
    assert [v.number for v in found.versions] == list(range(1, 2 + outcomes.count("done")))
    assert found.kv == 1 + outcomes.count("done")


@pytest.mark.parametrize("change", ["disable", "update", "schedule", "rotate", "revoke"])
def test_every_change_of_an_old_row_is_stale(lab: Lab, change: str) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    plan = {
        "disable": lambda: lab.store.plan_transition(key, KeyState.SUSPENDED),
        "update": lambda: lab.store.plan_update(key, description="x"),
        "schedule": lambda: lab.store.plan_schedule_deletion(key, wait_s=WEEK),
        "rotate": lambda: lab.store.plan_rotate(key),
        "revoke": lambda: lab.store.plan_revoke_version(key, 1),
    }[change]()
    lab.apply(lab.store.plan_update(key, description="first"))
    before = lab.sql("SELECT * FROM keystore_version ORDER BY number")
    with pytest.raises(StaleKey):
        lab.apply(plan)
    assert lab.worker().find("acme", str(key.id)).description == "first"
    assert lab.sql("SELECT * FROM keystore_version ORDER BY number") == before


def test_a_plan_changes_nothing_until_it_is_written_and_a_rolled_back_one_never(lab: Lab) -> None:
    key = lab.new()
    plan = lab.store.plan_transition(key, KeyState.SUSPENDED)
    lab.seal(key)
    lab.store.poll()
    with lab.engine.connect() as c:
        plan.write(c)
        c.rollback()
    assert lab.seal(lab.worker().find("acme", str(key.id))).version == 1
    assert not lab.store.poll()


def test_fences_refuse_older_versions(lab: Lab) -> None:
    key, made = lab.new(), []
    for _ in range(3):
        made.append(lab.seal(key).ciphertext)
        key = lab.apply(lab.store.plan_rotate(key))
    key = lab.apply(lab.store.plan_update(key, min_decrypt_version=3))
    for number, blob in enumerate(made, 1):
        if number < 3:
            with pytest.raises(VersionFenced):
                opening(lab, blob)(key)
            with pytest.raises(VersionFenced):  # nothing is sealed that could not be opened
                lab.store.seal(key, b"x", {}, version=number)
        else:
            assert opening(lab, blob)(key) == b"hello"
    with pytest.raises(InputRefused, match="takes approvals") as lowered:
        lab.store.plan_update(key, min_decrypt_version=2)
    assert (lowered.value.pointer, lowered.value.code) == ("/min_decrypt_version", "lowers")
    with pytest.raises(InputRefused, match="between 1 and the latest"):
        lab.store.plan_bounds(key, Bounds(min_decrypt_version=5))
    key = lab.apply(lab.store.plan_bounds(key, Bounds(min_decrypt_version=1)))
    key = lab.apply(lab.store.plan_update(key, min_decrypt_version=1, min_encrypt_version=4))
    assert opening(lab, made[0])(key) == b"hello"
    with pytest.raises(VersionFenced):
        lab.store.seal(key, b"x", {}, version=3)
    assert lab.seal(key).version == 4
    for bad in (0, -1, 5):
        for name in ("min_decrypt_version", "min_encrypt_version"):
            with pytest.raises(InputRefused) as caught:
                lab.store.plan_update(key, **{name: bad})
            assert caught.value.pointer == f"/{name}"


def test_a_revoked_version_is_refused_and_leaves_the_hsm_at_once(lab: Lab) -> None:
    first = lab.new()
    blob = lab.seal(first).ciphertext
    key = lab.apply(lab.store.plan_rotate(first))
    lab.seal(key)
    revoked = lab.apply(lab.store.plan_revoke_version(key, 1))
    assert first.latest.object_id not in lab.hsm.cached
    assert revoked.latest.object_id in lab.hsm.cached
    for act in (lambda: opening(lab, blob)(revoked), lambda: lab.store.seal(revoked, b"x", {}, version=1)):
        with pytest.raises(VersionFenced):
            act()
    with pytest.raises(WrongState):
        lab.store.plan_revoke_version(revoked, 1)
    with pytest.raises(InputRefused):
        lab.store.plan_revoke_version(revoked, 2)
    for unknown in (0, 3, -1):
        with pytest.raises(KeyNotFound):
            lab.store.plan_revoke_version(revoked, unknown)
    assert lab.seal(revoked).version == 2


def test_metadata_can_change_and_the_rest_of_the_row_stays(lab: Lab) -> None:
    key = lab.new(tags={"team": "a"}, rotation=Rotation(86_400, 10))
    changed = lab.apply(lab.store.plan_update(key, description="d", tags={"x": "y"}, rotation=Rotation()))
    found = lab.worker().find("acme", str(key.id))
    assert found == changed
    assert (found.description, dict(found.tags), found.rotation, found.kv) == ("d", {"x": "y"}, Rotation(), 2)
    assert (found.spec, found.versions, found.residency) == (key.spec, key.versions, key.residency)


# ---- several workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["disable", "compromise", "schedule", "destroy", "revoke", "fence"])
def test_S_01_another_workers_stop_is_obeyed_after_one_poll_and_its_handles_are_gone(lab: Lab, change: str) -> None:
    first = lab.new()
    old = lab.seal(first).ciphertext
    key = lab.apply(lab.store.plan_rotate(first))
    other = lab.worker()
    seen = other.find("acme", str(key.id))
    for number in (1, 2):
        other.seal(seen, b"x", {}, version=number)
    other.poll()
    seen = other.find("acme", str(key.id))
    assert other.current(seen)
    match change:
        case "disable":
            lab.apply(lab.store.plan_transition(key, KeyState.SUSPENDED), told=False)
        case "compromise":
            lab.apply(lab.store.plan_transition(key, KeyState.COMPROMISED), told=False)
        case "schedule" | "destroy":
            waiting = lab.apply(lab.store.plan_schedule_deletion(key, wait_s=WEEK), told=False)
            if change == "destroy":
                lab.clock.days(8)
                lab.apply(lab.store.plan_destroy(waiting), told=False)
        case "revoke":
            lab.apply(lab.store.plan_revoke_version(key, 1), told=False)
        case "fence":
            lab.apply(lab.store.plan_update(key, min_decrypt_version=2), told=False)
    assert lab.hsm.cached.keys() == {v.object_id for v in key.versions}
    assert other.poll()
    assert not other.poll()
    assert not other.current(seen)
    with pytest.raises((WrongState, KeyDestroyed, VersionFenced)):
        other.open(other.find("acme", str(key.id)), Envelope.parse(old), {}, purpose=Purpose.ENCRYPT)
    left = {key.versions[1].object_id} if change in {"revoke", "fence"} else set()
    assert lab.hsm.cached.keys() == left


def test_a_stop_in_this_process_needs_no_poll_and_stops_what_holds_the_old_row(lab: Lab) -> None:
    key = lab.new()
    lab.seal(key)
    lab.apply(lab.store.plan_transition(key, KeyState.SUSPENDED))
    assert not lab.store.current(key)
    with pytest.raises(WrongState):
        lab.seal(key)  # the old value, from before the stop: it must not bring the handle back
    assert not lab.hsm.cached


def test_a_row_read_before_a_change_is_never_cached_after_it(lab: Lab) -> None:
    key = lab.new(alias="a")
    slow = lab.worker()
    real = slow._catalog

    class Between:
        """A catalog whose reads take so long that a change commits, and is applied, meanwhile."""

        def __init__(self) -> None:
            self.once = True

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def key(self, key_id: uuid.UUID) -> Key:
            found = real.key(key_id)
            if self.once:
                self.once = False
                lab.apply(slow.plan_transition(found, KeyState.SUSPENDED))
            return found

    slow._catalog = Between()
    slow.find("acme", str(key.id))
    assert slow.find("acme", str(key.id)).api_state == "disabled"


def test_a_damaged_row_elsewhere_does_not_stop_the_others_from_being_polled(lab: Lab) -> None:
    good, bad = lab.new(), lab.new()
    lab.seal(good)
    other = lab.worker()
    lab.apply(lab.store.plan_transition(good, KeyState.SUSPENDED), told=False)
    lab.sql("UPDATE keystore_key SET state = 'nonsense', changed = changed + 5 WHERE key_id = :k", k=str(bad.id))
    assert other.poll()
    assert good.latest.object_id not in lab.hsm.cached


# ---- aliases, lists ------------------------------------------------------------------------------------------------


def test_aliases_repoint_at_once_for_every_worker(lab: Lab) -> None:
    one, two = lab.new(alias="payments"), lab.new()
    other = lab.worker()
    assert other.find("acme", "alias/payments").id == lab.store.find("acme", "alias/payments").id == one.id
    lab.apply(lab.store.plan_put_alias("acme", "payments", two))
    assert lab.store.find("acme", "alias/payments").id == two.id
    other.poll()
    assert other.find("acme", "alias/payments").id == two.id
    lab.apply(lab.store.plan_delete_alias("acme", "payments"))
    other.poll()
    for store in (lab.store, other):
        with pytest.raises(KeyNotFound):
            store.find("acme", "alias/payments")
    with pytest.raises(KeyNotFound):
        lab.store.plan_delete_alias("acme", "payments")


def test_readers_see_the_old_or_the_new_key_of_an_alias_and_never_none(lab: Lab) -> None:
    keys = [lab.new(alias="a"), lab.new()]
    reader, stop, seen = lab.worker(), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            reader.poll()
            seen.append(reader.find("acme", "alias/a").id)

    thread = threading.Thread(target=read)
    thread.start()
    for n in range(40):
        lab.apply(lab.store.plan_put_alias("acme", "a", keys[(n + 1) % 2]))
    stop.set()
    thread.join()
    assert set(seen) <= {k.id for k in keys}
    reader.poll()
    assert reader.find("acme", "alias/a").id == keys[0].id


def test_a_new_key_does_not_take_over_an_alias_and_leaves_nothing_behind(lab: Lab) -> None:
    lab.new(alias="taken")
    plan = lab.store.plan_create(new_key(), alias="taken")
    with pytest.raises(AliasInUse):
        lab.apply(plan)
    assert plan.key is not None
    with pytest.raises(KeyNotFound):
        lab.store.find("acme", str(plan.key.id))
    assert lab.new(alias="taken", tenant="other").tenant == "other"  # each tenant has its own names


def test_an_alias_moved_meanwhile_is_not_removed_for_its_new_key(lab: Lab) -> None:
    lab.new(alias="a")
    plan = lab.store.plan_delete_alias("acme", "a")
    two = lab.new()
    lab.apply(lab.store.plan_put_alias("acme", "a", two))
    with pytest.raises(StaleKey):
        lab.apply(plan)
    assert lab.store.find("acme", "alias/a").id == two.id


def test_an_alias_never_reaches_another_tenants_key(lab: Lab) -> None:
    mine = lab.new(alias="a")
    with pytest.raises(KeyNotFound):
        lab.store.plan_put_alias("evil", "a", mine)
    lab.sql("INSERT INTO keystore_alias (tenant, alias, key_id) VALUES ('evil', 'a', :k)", k=str(mine.id))
    lab.store.poll()
    with pytest.raises(KeyNotFound):
        lab.store.find("evil", "alias/a")


def pages(lab: Lab, filters: ListFilter, size: int, between: Callable[[], object] = lambda: None) -> list[uuid.UUID]:
    got: list[uuid.UUID] = []
    while page := lab.store.list("acme", filters=filters, after=got[-1] if got else None, limit=size):
        got += [k.id for k in page]
        between()
    return got


def test_paging_is_stable_under_inserts(lab: Lab) -> None:
    known = {lab.new().id for _ in range(25)}
    lab.new(tenant="evil")
    got = pages(lab, ListFilter(), 4, between=lambda: lab.new(description="late"))
    assert got == sorted(got, key=str)
    assert len(got) == len(set(got))
    assert known <= set(got)


def _in_state(state: str, key: Key) -> bool:
    return key.api_state == state


def test_lists_hold_what_the_filter_asks_for_and_only_that(lab: Lab) -> None:
    keys = []
    for n in range(24):
        tags = {"team": ("a", "b", 'a","x":"y')[n % 3], "n": str(n)}
        key = lab.new((KeySpec.AES_256, KeySpec.HMAC_256)[n % 2], tier=1 + n % 3, tags=tags)
        keys.append(brought_to(lab, key, ("enabled", "disabled", "compromised", "pending_deletion")[n // 6]))
    lab.new(tenant="evil", tags={"team": "a"})
    cases: list[tuple[ListFilter, Callable[[Any], bool]]] = [
        (ListFilter(), lambda k: True),
        (ListFilter(tier=2), lambda k: k.tier == 2),
        (ListFilter(usage="mac"), lambda k: k.usage == "mac"),
        (ListFilter(region="eu-de-1"), lambda k: True),
        (ListFilter(region="eu-fr-1"), lambda k: False),
        *((ListFilter(state=s), functools.partial(_in_state, s)) for s in STATES if " " not in s),
        (ListFilter(tags={"team": "a"}), lambda k: k.tags["team"] == "a"),
        (ListFilter(tags={"team": "a", "n": "3"}), lambda k: k.tags["n"] == "3"),
        (ListFilter(tags={"team": "%"}), lambda k: False),
        (ListFilter(tags={"none": "a"}), lambda k: False),
        (
            ListFilter(state="disabled", tier=1, usage="encrypt"),
            lambda k: (k.api_state, k.tier, k.usage) == ("disabled", 1, "encrypt"),
        ),
    ]
    for filters, keep in cases:
        want = sorted((k.id for k in keys if keep(k)), key=str)
        for size in (1, 5, 100):
            assert pages(lab, filters, size) == want, filters


def test_aliases_are_paged_in_the_order_of_their_names(lab: Lab) -> None:
    key = lab.new()
    names = [f"n{i:02d}" for i in range(12)]
    for name in reversed(names):
        lab.apply(lab.store.plan_put_alias("acme", name, key))
    got: list[str] = []
    while page := lab.store.aliases("acme", after=got[-1] if got else None, limit=5):
        assert {k for _, k in page} == {key.id}
        got += [name for name, _ in page]
    assert got == names
    assert lab.store.aliases("evil", after=None, limit=5) == []


def test_check_use_refuses_a_version_that_does_not_exist(lab: Lab) -> None:
    key = lab.new()
    for number in (0, -1, 2):
        with pytest.raises(VersionFenced):
            check_use(key, number, "process", now=0)


def test_keys_are_found_by_what_they_have_in_common(lab: Lab) -> None:
    """More kinds of places than one statement asks for, page by page; a destroyed key is none, a damaged row an error."""
    kinds = [frozenset({"eu-de-1", f"somewhere-{n}"}) for n in range(120)]
    keys = [lab.new(tier=1, residency=kind) for kind in (*kinds, kinds[0], kinds[119])]
    destroyed, foreign = lab.new(tier=1, residency=kinds[1]), lab.new(tenant="evil", tier=1, residency=kinds[2])
    brought_to(lab, destroyed, "destroyed")
    brought_to(lab, keys[5], "pending_deletion")
    found = dict(lab.store.placed("acme"))
    assert sorted(found.values()) == [1] * 118 + [2, 2]
    assert {p.residency for p in found} == set(kinds)
    assert sum(count for _, count in lab.store.placed(None)) == len(keys) + 1
    got: list[uuid.UUID] = []
    while page := lab.store.located(list(found), after=str(got[-1]) if got else None, limit=50):
        got += [key.id for key in page]
    assert got == sorted((key.id for key in keys), key=str)
    (two,) = [p for p in found if p.residency == kinds[5]]
    (only,) = lab.store.located([two], after=None, limit=9)
    assert (only.id, only.placed.tenant, only.state) == (keys[5].id, "acme", "pending_deletion")
    assert foreign.id not in got
    lab.sql("UPDATE keystore_key SET places = '{}' WHERE key_id = :id", id=str(foreign.id))
    with pytest.raises(RowDamaged):
        lab.store.placed(None)
    assert dict(lab.store.placed("acme")) == found
