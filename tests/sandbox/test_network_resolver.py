"""The name server alone, fed with whatever bytes: it answers or is silent, and never fails. No network."""

from __future__ import annotations

import asyncio

import dns.edns
import dns.message
import dns.rcode
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.sandbox.network.guests import Guest
from rorqual.sandbox.network.policy import Compiled, NetworkPolicy
from rorqual.sandbox.network.resolver import Resolver


async def nothing(*_: object) -> None:
    raise AssertionError("an address was opened")


def resolver() -> Resolver:
    return Resolver(None, guests=lambda _: None, protected=list, opener=nothing, resolvers=())  # type: ignore[arg-type]


def ask(data: bytes, *, stream: bool = False) -> tuple[bytes, Guest]:
    guest = Guest(id="sb", number=2, policy=Compiled.of(NetworkPolicy(allow=["allowed.test"])))
    return asyncio.run(resolver().answer(guest, data, stream=stream)), guest


QUERY = dns.message.make_query("refused.test", "A", use_edns=0).to_wire()


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=600), st.binary(max_size=40).map(lambda tail: QUERY + tail)), st.booleans()
)
def test_any_bytes_are_answered_or_dropped(data: bytes, stream: bool) -> None:
    answer, guest = ask(data, stream=stream)
    assert guest.pending == 0
    if answer:
        assert answer[:2] == data[:2] and answer[2] & 0x80 and len(answer) <= (65535 if stream else 1232)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(QUERY) - 1), st.integers(0, 255))
def test_a_query_with_one_byte_changed_opens_nothing(place: int, value: int) -> None:
    data = QUERY[:place] + bytes([value]) + QUERY[place + 1 :]
    answer, guest = ask(data)
    assert guest.known == {}
    if answer and answer[3] & 15 == dns.rcode.NOERROR:
        assert not dns.message.from_wire(answer).answer


def test_the_refusal_says_why_to_who_can_read_it() -> None:
    answer, guest = ask(QUERY)
    message = dns.message.from_wire(answer)
    (why,) = message.options
    assert message.rcode() == dns.rcode.NXDOMAIN and why.code == dns.edns.EDECode.PROHIBITED
    assert guest.dns_refused == 1 and guest.events.rows()[0]["what"] == "refused.test"


def test_an_allowed_name_without_a_name_server_is_a_failure_not_a_hang() -> None:
    wire = dns.message.make_query("allowed.test", "A").to_wire()
    made = resolver()
    made._resolv_conf = made._resolv_conf.with_name("no-such-file")
    guest = Guest(id="sb", number=2, policy=Compiled.of(NetworkPolicy(allow=["allowed.test"])))
    message = dns.message.from_wire(asyncio.run(made.answer(guest, wire, stream=False)))
    assert message.rcode() == dns.rcode.SERVFAIL
