"""All HSM groups of a node, and the rows that every worker follows: what operators want of each HSM, whose audit keys
are known."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from sqlalchemy import Connection

from keystore import rowmac
from keystore.catalog import AuditKeyRow, Catalog, HsmRow, RootRow
from keystore.exchange import Exchange
from keystore.group import Admin, GroupWouldBeEmpty, HsmGroup, MemberStatus, NoSuchHsm
from keystore.hsm import Hsm, HsmUnavailable, RowDamaged
from keystore.store import Keystore

alarm: Final = logging.getLogger("skms.alarm")


def proof_of(catalog: Catalog, region: str) -> Callable[[Hsm], bool]:
    """Whether an HSM holds the row-MAC key under which this installation's rows of a region were written.

    Says yes while there are no such rows.
    """
    rows = [r for r in catalog.audit_keys() if r.region == region]

    def proven(hsm: Hsm) -> bool:
        for row in rows:
            with contextlib.suppress(RowDamaged):
                hsm.check_row(rowmac.audit_key_row(row.region, row.hsm, row.public, row.since), row.mac)
                return True
        return not rows

    return proven


class Fleet:
    """The groups of one node by region. Thread-safe."""

    def __init__(self, catalog: Catalog, groups: Mapping[str, HsmGroup], *, clock: Callable[[], int]) -> None:
        self._catalog, self.groups, self._clock = catalog, dict(groups), clock
        self._lock = threading.Lock()
        self._roots: dict[str, int] = {}
        self._audit_keys: dict[str, tuple[bytes, ...]] = dict.fromkeys(groups, ())

    def __iter__(self) -> Iterator[HsmGroup]:
        return iter(self.groups.values())

    def group_of(self, name: str) -> HsmGroup:
        """The group that an HSM belongs to; NoSuchHsm if the configuration names none."""
        for group in self.groups.values():
            if name in group.names:
                return group
        raise NoSuchHsm(f"no HSM {name!r} in this node's configuration")

    def members(self) -> list[MemberStatus]:
        """Every HSM of the node, without calling a token."""
        return [member for group in self.groups.values() for member in group.members()]

    # ---- what operators want -----------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take over what operators want now. A row without a right MAC changes nothing and raises the alarm."""
        rows, roots = self._catalog.hsms(), self._catalog.roots()
        for region, group in self.groups.items():
            group.apply(self._wanted(group, [r for r in rows if r.region == region]))
            for row in roots:
                if row.region == region and self._roots.get(region) != row.version:
                    self._follow_root(group, row)

    def _follow_root(self, group: HsmGroup, row: RootRow) -> None:
        try:
            group.check_row(rowmac.root_row(row.region, row.version, row.changed_at), row.mac)
        except RowDamaged:
            facts = {"region": row.region}
            alarm.critical("the row of a root KEK was changed outside the service", extra={"facts": facts})
        except HsmUnavailable:
            return  # nobody can check it now; the next round does
        else:
            group.use_root(row.version)
            self._roots[row.region] = row.version

    def plan_root(self, region: str, version: int) -> tuple[Callable[[Connection], None], Callable[[], None]]:
        """(what makes a version of a region's root KEK the current one, what makes this process follow)."""
        group, now = self.groups[region], self._clock()
        row = RootRow(region, version, now, group.row_mac(rowmac.root_row(region, version, now)))

        def applied() -> None:
            group.use_root(version)
            self._roots[region] = version

        return lambda c: self._catalog.put_root(c, row), applied

    def _wanted(self, group: HsmGroup, rows: list[HsmRow]) -> dict[str, Admin]:
        now = {m.name: m.admin for m in group.members()}
        wanted = {}
        for row in rows:
            if row.name not in now:
                continue  # it has left the configuration
            try:
                group.check_row(rowmac.hsm_row(row.name, row.region, row.admin, row.changed_at), row.mac)
                wanted[row.name] = Admin(row.admin)
            except (RowDamaged, ValueError):
                alarm.critical("the row of an HSM was changed outside the service", extra={"facts": {"hsm": row.name}})
                wanted[row.name] = now[row.name]
            except HsmUnavailable:
                wanted[row.name] = now[row.name]  # nobody can check it now, and nobody can serve either
        return wanted

    def plan(self, changes: Mapping[str, Admin]) -> tuple[Callable[[Connection], None], Callable[[], None]]:
        """(what writes a change of members of one region, what makes this process follow).

        GroupWouldBeEmpty, at once or when written, if no usable member would be left to serve.
        """
        group = self.group_of(next(iter(changes)))
        self._enough(group, {m.name: m.admin for m in group.members()} | dict(changes))
        now = self._clock()
        rows = [
            HsmRow(n, group.region, a, now, group.row_mac(rowmac.hsm_row(n, group.region, a, now)))
            for n, a in changes.items()
        ]

        def write(c: Connection) -> None:
            self._catalog.hold(c)  # two operators that drain one member each must not both be right
            others = {r.name: Admin(r.admin) for r in self._catalog.hsms(c) if r.region == group.region}
            self._enough(group, others | dict(changes))
            self._catalog.put_hsms(c, rows)

        def applied() -> None:
            group.apply({m.name: m.admin for m in group.members()} | dict(changes))

        return write, applied

    def _enough(self, group: HsmGroup, wanted: Mapping[str, Admin]) -> None:
        if not group.serving(wanted):
            states = ", ".join(f"{m.name} {m.state}" for m in group.members())
            raise GroupWouldBeEmpty(f"no usable HSM would be left in region {group.region} ({states})")

    def exchange(self, keystore: Keystore, source: str, target: str) -> Exchange:
        """What proves that one HSM can take over from another; NoSuchHsm unless both are of one group."""
        group = self.group_of(source)
        group.member(target)
        return Exchange(self._catalog, keystore, group, source, target)

    # ---- audit keys --------------------------------------------------------------------------------------------------

    def remember_audit_keys(self) -> None:
        """Store the audit keys of the open members, and load all that were ever stored; bad rows raise the alarm."""
        with self._lock:
            rows = self._catalog.audit_keys()
            for region, group in self.groups.items():
                known = self._checked(group, [r for r in rows if r.region == region])
                for hsm, public in group.audit_public_keys().items():
                    if public not in known:
                        since = self._clock()
                        mac = group.row_mac(rowmac.audit_key_row(region, hsm, public, since))
                        self._catalog.insert_audit_key(AuditKeyRow(region, hsm, public, since, mac))
                        known.append(public)
                self._audit_keys[region] = tuple(known)

    def _checked(self, group: HsmGroup, rows: list[AuditKeyRow]) -> list[bytes]:
        known = []
        for row in rows:
            try:
                group.check_row(rowmac.audit_key_row(row.region, row.hsm, row.public, row.since), row.mac)
                known.append(row.public)
            except RowDamaged:
                facts = {"hsm": row.hsm, "region": row.region}
                alarm.critical("the row of an audit key was changed outside the service", extra={"facts": facts})
        return known

    def audit_keys(self) -> tuple[bytes, ...]:
        """Every audit key that HSMs of any region have or had, as far as `remember_audit_keys` knows."""
        return tuple(dict.fromkeys(key for keys in self._audit_keys.values() for key in keys))
