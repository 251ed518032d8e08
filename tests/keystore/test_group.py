"""HSMs of one region as a group: balance, failover, drain, members that join late (O11, A-09, R6)."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap
from keystore_lab import Lab, TestHsm

from keystore import (
    Admin,
    Catalog,
    Fleet,
    GroupWouldBeEmpty,
    Hsm,
    HsmEmpty,
    HsmFault,
    HsmGroup,
    HsmLocked,
    HsmTimeout,
    HsmUnavailable,
    InvalidCiphertext,
    KeySpec,
    NoSuchHsm,
    Purpose,
    RowDamaged,
    UnsupportedByHsm,
    proof_of,
)
from keystore.hsm import Material, StoredKey


@dataclass
class Token(TestHsm):
    """A member: what it shall do with the next calls, and what came."""

    __test__ = False
    label: str = "a"
    told_state: str | None = None
    raising: Exception | None = None
    gate: threading.Event | None = None  # calls wait here: the token hangs
    slow_s: float = 0.0
    takes_s: float = 0.0  # what a call adds to `clock`
    clock: list[float] = field(default_factory=lambda: [0.0])
    inside: int = 0
    most: int = 0
    served: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return self.label

    @property
    def state(self) -> str:
        return self.told_state or super().state

    def _called(self, what: str) -> None:
        super()._called(what)
        self.clock[0] += self.takes_s
        if self.raising is not None and what not in {"row_mac", "check_row", "unwrap"}:
            raise self.raising
        if what in {"hmac", "gcm_open", "canary"}:
            if self.gate is not None:
                self.gate.wait(20)
            if self.slow_s:
                time.sleep(self.slow_s)
            self.served[what] += 1

    def _clear(self, key: StoredKey) -> bytes:
        try:
            return super()._clear(key)
        except InvalidUnwrap:
            raise HsmFault("CKR_WRAPPED_KEY_INVALID") from None

    def audit_public_key(self) -> bytes:
        return b"public key of " + self.label.encode()

    def audit_sign(self, statement: bytes) -> bytes:
        self._called("audit_sign")
        return self.label.encode() + statement


def tokens(count: int = 2, **facts: Any) -> list[Token]:
    """Tokens that hold the same root KEK and row-MAC key."""
    made = [Token(label=name, **facts) for name in "abcd"[:count]]
    for token in made[1:]:
        token.root, token.row_key = made[0].root, made[0].row_key
    return made


def group_of(*members: Token, openers: dict[str, Callable[[], Hsm]] | None = None, **options: Any) -> HsmGroup:
    """A group whose members count as equally quick, however busy this machine is, unless `timer` says otherwise."""
    options.setdefault("timer", lambda: 0.0)
    plain: dict[str, Callable[[], Hsm]] = {t.name: (lambda t=t: t) for t in members}  # type: ignore[misc]
    group = HsmGroup("eu-de-1", plain | (openers or {}), **options)
    group.open()
    for token in members:
        token.calls.clear()  # what admitting it took
    return group


def stored(hsm: Any, material: Material = Material.KDK_512) -> StoredKey:
    object_id = uuid.uuid4()
    made = hsm.generate(material, object_id)
    binding = b"row of " + object_id.bytes
    return StoredKey(
        object_id, material, made.blob, made.mechanism, made.kek, made.public, binding, hsm.row_mac(binding)
    )


def use(group: HsmGroup, key: StoredKey, times: int = 1) -> None:
    for _ in range(times):
        group.hmac(key, "sha512", b"x")


def test_idle_members_of_one_speed_take_turns_and_agree() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    expected = a.hmac(key, "sha512", b"x")
    before = (a.calls["hmac"], b.calls["hmac"])
    for _ in range(40):
        assert group.hmac(key, "sha512", b"x") == expected
    assert min(a.calls["hmac"] - before[0], b.calls["hmac"] - before[1]) >= 10


def test_an_idle_member_that_was_found_slower_is_left_out() -> None:
    clock = [0.0]
    a, b = tokens(clock=clock)
    a.takes_s = 0.001
    group = group_of(a, b, timer=lambda: clock[0])
    use(group, stored(b), 20)
    assert group.member("a").speed_us == pytest.approx(1_000)
    assert (a.calls["hmac"], b.calls["hmac"]) == (0, 20)


def test_work_goes_to_the_member_with_less_of_it() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    a.served.clear()
    b.served.clear()
    a.slow_s, b.slow_s = 0.05, 0.005
    workers = [threading.Thread(target=use, args=(group, key, 25)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert b.served["hmac"] > 2 * a.served["hmac"] > 0


def test_O11_a_killed_member_costs_no_call_and_is_taken_back_by_its_canary() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    a.online = False
    use(group, key, 200)
    assert a.calls["hmac"] <= 3
    assert group.out() == ["a"]
    with pytest.raises(HsmUnavailable):
        group.probe("a")
    a.online = True
    group.probe("a")
    assert group.out() == []
    served = a.calls["hmac"]
    use(group, key, 20)
    assert a.calls["hmac"] > served


def test_a_member_that_dies_under_load_refuses_nobody() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    refused: list[Exception] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                use(group, key)
            except Exception as error:
                refused.append(error)

    workers = [threading.Thread(target=load) for _ in range(16)]
    for worker in workers:
        worker.start()
    for _ in range(5):
        a.online = False
        time.sleep(0.03)
        a.online = True
        group.probe("a")
        time.sleep(0.03)
    stop.set()
    for worker in workers:
        worker.join()
    assert not refused, refused[:3]


def test_a_member_says_UP_and_fails_is_left_out_after_three_failures() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    a.raising = HsmFault("CKR_FUNCTION_FAILED")
    use(group, key, 50)
    assert a.calls["hmac"] == 3
    assert group.member("a").state == "SUSPECT"
    assert group.member("a").errors == {"CKR_FUNCTION_FAILED": 3}
    assert group.member("a").last_error == "CKR_FUNCTION_FAILED"
    assert group.member("a").failovers == 3
    a.raising = None
    group.probe("a")
    assert group.member("a").state == "UP"


def test_a_timeout_makes_a_member_suspect_at_once() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    a.raising = HsmTimeout("late")
    use(group, key, 50)
    assert a.calls["hmac"] == 1
    assert group.member("a").state == "SUSPECT"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


def test_others_do_not_queue_behind_a_member_that_hangs() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    a.gate = threading.Event()
    caught = [threading.Thread(target=use, args=(group, key, 1)) for _ in range(4)]
    for thread in caught:
        thread.start()
    until(lambda: group.member("a").in_flight + sum(not thread.is_alive() for thread in caught) == len(caught))
    time.sleep(1.2)  # longer than a call may be inside before others go elsewhere
    inside = group.member("a").in_flight
    use(group, key, 100)  # behind it they would stay for ever
    assert group.member("a").in_flight == inside > 0
    assert group.usable() == 1
    a.gate.set()
    for thread in caught:
        thread.join()
    assert group.usable() == 2


def test_a_locked_member_is_never_asked_again() -> None:
    a, b = tokens()
    tries: list[int] = []

    def refused() -> Hsm:
        tries.append(1)
        raise HsmLocked("wrong PIN")

    group = group_of(b, openers={"locked": refused})
    assert group.member("locked").state == "LOCKED"
    assert group.out() == []
    use(group, stored(group), 20)
    assert len(tries) == 1
    a.told_state = "LOCKED"
    again = group_of(a, b)
    use(again, stored(b), 20)
    assert a.calls["hmac"] == 0


def test_A_09_ten_thousand_bad_ciphertexts_change_nothing() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group, Material.AES_256)
    iv, sealed = group.gcm_seal(key, b"", b"x")
    wrong = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for _ in range(10_000):
        with pytest.raises(InvalidCiphertext):
            group.gcm_open(key, iv, b"", wrong)
    assert group.gcm_open(key, iv, b"", sealed) == b"x"
    for member in group.members():
        assert (member.state, member.errors, member.failovers, member.last_error) == ("UP", {}, 0, "")
    assert sum(m.calls["gcm_open"] for m in (a, b)) == 10_001


def test_a_damaged_row_is_an_answer_and_no_reason_to_fail_over() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    forged = StoredKey(uuid.uuid4(), key.material, key.blob, key.mechanism, key.kek, b"", key.binding + b"!", key.mac)
    with pytest.raises(RowDamaged):
        use(group, forged)
    assert all(m.failovers == 0 and m.state == "UP" for m in group.members())


def test_a_key_goes_only_to_members_that_can_hold_it() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group, Material.ED25519)
    a.lacks[Material.ED25519] = "no CKM_EDDSA"
    from keystore.hsm import SignScheme

    for _ in range(10):
        group.sign(key, SignScheme.ED25519, b"x")
    assert (a.calls["sign"], b.calls["sign"]) == (0, 10)
    assert group.missing(Material.ED25519) == "HSM a: no CKM_EDDSA"
    with pytest.raises(UnsupportedByHsm, match="HSM a"):
        group.generate(Material.ED25519, uuid.uuid4())
    b.lacks[Material.ED25519] = "no CKM_EDDSA"
    with pytest.raises(UnsupportedByHsm):
        group.sign(key, SignScheme.ED25519, b"x")


def test_a_member_without_one_root_kek_still_serves_the_other_keys() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)

    a.raising = HsmEmpty("no root KEK (version 2)")
    use(group, key, 10)
    assert a.calls["hmac"] == 1
    assert group.member("a").state == "UP"
    a.raising = None
    other = stored(b)
    a.kek = b.kek = uuid.uuid4()
    other = stored(b)
    use(group, other, 10)
    assert a.calls["hmac"] > 1


def test_a_fallback_member_serves_only_when_no_active_one_can() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    group.apply({"b": Admin.FALLBACK})
    before = b.calls["hmac"]
    use(group, key, 50)
    assert b.calls["hmac"] == before
    a.online = False
    use(group, key, 50)
    assert b.calls["hmac"] == before + 50


def test_drain_under_load_refuses_nobody_and_ends_every_call_first() -> None:
    a, b = tokens(slow_s=0.002)
    group = group_of(a, b)
    key = stored(group)
    refused: list[Exception] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                use(group, key)
            except Exception as error:
                refused.append(error)

    workers = [threading.Thread(target=load) for _ in range(16)]
    for worker in workers:
        worker.start()
    for _ in range(5):
        group.apply({"a": Admin.DRAINED})
        until(lambda: not group.member("a").in_flight)
        served = a.served["hmac"]
        time.sleep(0.03)
        assert a.served["hmac"] == served, "a drained member was called"
        group.apply({})
        group.probe("a")
        until(lambda served=served: a.served["hmac"] > served)
    stop.set()
    for worker in workers:
        worker.join()
    assert not refused, refused[:3]


def test_an_undrained_member_serves_after_its_canary_only() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    group.apply({"a": Admin.DRAINED})
    group.apply({})
    before = a.calls["hmac"]
    use(group, key, 10)
    assert a.calls["hmac"] == before
    assert group.out() == ["a"]
    group.probe("a")
    use(group, key, 10)
    assert a.calls["hmac"] > before


def test_below_the_minimum_no_key_is_made_and_reading_goes_on() -> None:
    a, b = tokens()
    group = group_of(a, b, minimum=2)
    key = stored(group)
    b.online = False
    with pytest.raises(HsmUnavailable, match=r"1 of 2 members .*\(a\).* fewer than 2: bring a member back"):
        group.generate(Material.AES_256, uuid.uuid4())
    use(group, key, 5)
    b.online = True
    group.probe("b")
    b.kek = uuid.uuid4()  # up, but with another root KEK than its fellow
    with pytest.raises(HsmUnavailable, match="hold the current root KEK"):
        group.generate(Material.AES_256, uuid.uuid4())
    b.kek = a.kek
    assert group.generate(Material.AES_256, uuid.uuid4()).blob


def test_forget_reaches_every_member_whatever_its_state() -> None:
    a, b = tokens()
    group = group_of(a, b)
    group.apply({"a": Admin.DRAINED})
    b.online = False
    object_id = uuid.uuid4()
    group.forget(object_id)
    assert object_id in a.forgotten
    assert object_id in b.forgotten


def test_an_empty_member_joins_when_it_holds_the_keys() -> None:
    a, b = tokens()
    held = False

    def opener() -> Hsm:
        if not held:
            raise HsmEmpty("token 'b' holds no root-kek key of this installation")
        return b

    group = group_of(a, openers={"b": opener})
    assert group.member("b").state == "EMPTY"
    use(group, stored(group), 5)
    with pytest.raises(HsmEmpty):
        group.probe("b")
    held = True
    group.probe("b")
    assert group.member("b").state == "UP"
    before = b.calls["hmac"]
    use(group, stored(group), 10)
    assert b.calls["hmac"] > before


@pytest.mark.parametrize("what", ["root", "row_key"])
def test_a_member_with_other_keys_of_the_same_names_is_not_taken_in(what: str) -> None:
    a, b = tokens()
    setattr(b, what, bytes(32))
    group = group_of(a, b)
    assert group.member("b").state == "FOREIGN"
    assert "holds other keys than HSM a" in group.member("b").last_error
    use(group, stored(group), 20)


def test_a_group_without_any_member_that_opens_says_why() -> None:
    def dead() -> Hsm:
        raise HsmUnavailable("PKCS#11 module /x does not exist")

    with pytest.raises(HsmUnavailable, match="does not exist"):
        group_of(openers={"a": dead, "b": dead})


def test_all_members_down_is_unavailable_and_names_their_states() -> None:
    a, b = tokens()
    group = group_of(a, b)
    key = stored(group)
    group.apply({"a": Admin.DRAINED})
    b.online = False
    with pytest.raises(HsmUnavailable):
        use(group, key)
    b.told_state = "LOCKED"
    with pytest.raises(HsmUnavailable, match="a drained UP, b active LOCKED"):
        use(group, key)
    with pytest.raises(NoSuchHsm):
        group.member("c")


def test_only_a_group_of_quick_active_members_runs_on_the_event_loop() -> None:
    a, b = tokens()
    b.fast = False
    group = group_of(a, b)
    assert not group.fast
    group.apply({"b": Admin.FALLBACK})
    assert group.fast


def test_each_member_has_its_audit_key_and_the_group_knows_them_all() -> None:
    a, b = tokens()
    group = group_of(a, b)
    assert group.audit_public_keys() == {"a": b"public key of a", "b": b"public key of b"}
    a.online = False
    assert group.audit_sign(b"!") == b"b!"


# ---- with a database -------------------------------------------------------------------------------------------------


def fleet_of(lab: Lab, group: HsmGroup) -> Fleet:
    made = Fleet(Catalog(lab.engine), {"eu-de-1": group}, clock=lab.clock)
    made.follow()
    made.remember_audit_keys()
    return made


def write(lab: Lab, fleet: Fleet, **wanted: Admin) -> None:
    act, applied = fleet.plan(wanted)
    with lab.engine.begin() as c:
        act(c)
    applied()


def test_every_worker_follows_what_one_was_told(lab: Lab) -> None:
    a, b = tokens()
    mine, theirs = group_of(a, b), group_of(a, b)
    here, there = fleet_of(lab, mine), fleet_of(lab, theirs)
    write(lab, here, a=Admin.DRAINED)
    assert mine.member("a").admin is Admin.DRAINED
    there.follow()
    assert theirs.member("a").admin is Admin.DRAINED
    write(lab, there, a=Admin.ACTIVE)
    here.follow()
    assert mine.member("a").admin is Admin.ACTIVE


def test_the_last_usable_member_cannot_be_drained_even_by_two_at_once(lab: Lab) -> None:
    a, b = tokens()
    fleet = fleet_of(lab, group_of(a, b))
    one, _ = fleet.plan({"a": Admin.DRAINED})
    two, _ = fleet.plan({"b": Admin.DRAINED})
    with lab.engine.begin() as c:
        one(c)
    with pytest.raises(GroupWouldBeEmpty), lab.engine.begin() as c:
        two(c)
    fleet.follow()
    b.online = False
    with pytest.raises(GroupWouldBeEmpty, match=r"a SUSPECT|a UP"):
        write(lab, fleet, b=Admin.DRAINED)


def test_a_row_that_somebody_changed_changes_nothing(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    a, b = tokens()
    group = group_of(a, b)
    fleet = fleet_of(lab, group)
    write(lab, fleet, a=Admin.FALLBACK)
    lab.sql("UPDATE keystore_hsm SET admin = 'drained'")
    fleet.follow()
    assert group.member("a").admin is Admin.FALLBACK
    assert "row of an HSM was changed" in caplog.text


def test_audit_keys_of_members_that_left_stay_known_and_forged_ones_do_not_get_in(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = tokens()
    fleet_of(lab, group_of(a, b))
    later = fleet_of(lab, group_of(b))
    assert set(later.audit_keys()) == {b"public key of a", b"public key of b"}
    lab.sql("UPDATE keystore_audit_key SET public = :p WHERE hsm = 'a'", p=b"forged")
    forged = fleet_of(lab, group_of(b))
    assert forged.audit_keys() == (b"public key of b",)
    assert "row of an audit key was changed" in caplog.text


def test_a_token_of_another_ceremony_is_told_even_without_a_member_to_compare(lab: Lab) -> None:
    (a,) = tokens(1)
    fleet_of(lab, group_of(a))
    stranger = Token(label="stranger")
    proven = proof_of(Catalog(lab.engine), "eu-de-1")
    with pytest.raises(HsmUnavailable, match="another ceremony"):
        group_of(stranger, proven=proven)
    assert group_of(a, proven=proven).usable() == 1


def test_a_keystore_sees_a_group_as_one_hsm(lab: Lab) -> None:
    a, b = tokens()
    store = lab.worker(hsms={"eu-de-1": group_of(a, b)})  # type: ignore[dict-item]
    lab.store = store
    key = lab.new(KeySpec.AES_256)
    a.online = False
    sealed = store.seal(key, b"hello", {"row": "7"})
    a.online, b.online = True, False
    from keystore import Envelope

    assert store.open(key, Envelope.parse(sealed.ciphertext), {"row": "7"}, purpose=Purpose.ENCRYPT) == b"hello"


def test_every_kind_that_a_row_can_have_can_be_compared_on_two_hsms() -> None:
    from keystore.exchange import _HASHES, _SCHEMES

    known = {Material.AES_256, *_HASHES, *_SCHEMES}
    assert {m for m in Material if not m.startswith("TRANSPORT")} == known
