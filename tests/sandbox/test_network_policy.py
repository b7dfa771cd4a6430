"""Rules, policies and networks.toml: what is accepted, what is refused and how the refusal reads. No packets."""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from rorqual.sandbox import NetworkPolicy, Secret, host, secret_url
from rorqual.sandbox.errors import HostUnfit, InvalidRequest, Unsupported
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.network.addresses import PROTECTED, guest_address, uplink_addresses
from rorqual.sandbox.network.guests import EVENTS, Events, Guest
from rorqual.sandbox.network.order import network_capabilities, network_order
from rorqual.sandbox.network.policy import BUILT_IN, Compiled, config_file, load, parse_policy, parse_rule
from rorqual.sandbox.network.secret import check_secrets


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a rule"),
        (7, "is not a rule"),
        ("a b", "is not a host name"),
        ("-a.org", "is not a host name"),
        ("a..org", "is not a host name"),
        ("a" * 64 + ".org", "is not a host name"),
        ("a.*.org", "only be the first label"),
        ("*.", "is not a host name"),
        ("http://a.org", "is a URL"),
        ("a.org:1:2", "more than one"),
        ("a.org/path", "is not a host name"),
        ("a.org:0", "port must be a number"),
        ("a.org:65536", "port must be a number"),
        ("a.org:https", "port must be a number"),
        ("10.0.0.1/8", "has host bits set"),
        ("10.0.0.256", "not permitted"),
        ("10.0.0.0/33", "netmask"),
        ("::1", "IPv6 is not routed"),
        ("[fe80::1]", "IPv6 is not routed"),
        ("2001:db8::/32", "IPv6 is not routed"),
        ("a.org\n", None),
    ],
)
def test_a_rule_that_is_none_is_named(text: object, words: str | None) -> None:
    if words is None:  # space around a rule is no mistake
        assert parse_rule(text).name == "a.org"
        return
    with pytest.raises(InvalidRequest, match=words):
        parse_rule(text)


@pytest.mark.parametrize(
    ("rules", "name", "ports"),
    [
        (["a.org"], "a.org", (None,)),
        (["a.org"], "b.a.org", ()),
        (["*.a.org"], "a.org", ()),
        (["*.a.org"], "x.y.a.org", (None,)),
        (["*.a.org"], "xa.org", ()),
        (["A.Org:443"], "a.org", (443,)),
        (["a.org:443", "a.org:80", "*.a.org"], "a.org", (80, 443)),
        (["*:443"], "any.thing", (443,)),
        (["*"], "any.thing", (None,)),
        (["10.0.0.0/8"], "10.0.0.1", ()),
        (["bücher.example"], "xn--bcher-kva.example", (None,)),
    ],
)
def test_a_name_is_matched_whole_or_below_a_star(
    rules: list[str], name: str, ports: tuple[int | None, ...]
) -> None:
    assert Compiled.of(NetworkPolicy(allow=rules)).ports(name) == ports


def test_deny_wins() -> None:
    policy = Compiled.of(NetworkPolicy(allow=["*", "a.org:443"], deny=["a.org", "*.b.org", "9.9.9.0/24"]))
    assert policy.ports("a.org") == policy.ports("x.b.org") == () and policy.ports("b.org") == (None,)
    with pytest.raises(InvalidRequest, match=r"denied whole; to close a port, deny '0\.0\.0\.0/0:25'"):
        NetworkPolicy(allow=["*"], deny=["c.org:25"])
    assert policy.denies(IPv4Address("9.9.9.9")) and not policy.denies(IPv4Address("9.9.8.9"))


def test_policies_are_found_by_name_and_an_unknown_one_names_the_others() -> None:
    for name in BUILT_IN:
        assert parse_policy(name).name == name
    with pytest.raises(
        InvalidRequest, match=r"'intranet': no policy has this name; there are debian, npm, offline"
    ):
        parse_policy("intranet")
    with pytest.raises(InvalidRequest, match="neither"):
        parse_policy(7)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="unknown key 'allowed'"):
        parse_policy({"allowed": ["a.org"]})
    with pytest.raises(InvalidRequest, match="must be a list"):
        NetworkPolicy(allow="pypi.org")
    with pytest.raises(InvalidRequest, match="at most"):
        NetworkPolicy(allow=["a.org"] * 513)
    with pytest.raises(InvalidRequest, match="not a policy's name"):
        NetworkPolicy(name="../x")


def test_a_request_keeps_offline_as_a_word_and_everything_else_as_a_policy() -> None:
    assert SandboxSpec().network == SandboxSpec(network={"name": "offline"}).network == "offline"
    assert SandboxSpec(network="pypi").network == BUILT_IN["pypi"]
    assert SandboxSpec(network={"allow": ["a.org"]}).network == NetworkPolicy(allow=["a.org"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[policy", "networks.toml"),
        ("[policies.x]\nallow=[]", "unknown key 'policies'"),
        ("[policy.pypi]\nallow=[]", "'pypi' is built in"),
        ("[policy.x]\nallow=['a b']", "not a host name"),
        ("[policy.x]\nallowed=[]", "unknown key 'allowed'"),
        ("policy = 3", "must be tables"),
        ("[policy]\nx = 3", "networks.toml"),
        ("[gateway]\nnamespace='netns'", "absolute path"),
        ("[gateway]\nresolvers=['dns.example']", "not an IPv4 address"),
        ("[gateway]\nresolvers='9.9.9.9'", "must be a list"),
        ("[gateway]\nresolver=['9.9.9.9']", "unknown key 'resolver'"),
    ],
)
def test_a_wrong_config_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "networks.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=words):
        load(path)


def test_the_config_file_gives_policies_and_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path / "none.toml").policies == BUILT_IN
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    place = config_file()
    place.parent.mkdir()
    place.write_text(
        "[policy.research]\nallow=['arxiv.org:443']\n[gateway]\nnamespace='/run/netns/vpn'\nresolvers=['9.9.9.9:5353']\n"
    )
    assert parse_policy("research") == NetworkPolicy(name="research", allow=["arxiv.org:443"])
    assert load().gateway.namespace == "/run/netns/vpn" and load().gateway.resolvers == ("9.9.9.9:5353",)


def test_metadata_addresses_are_protected() -> None:
    for address in (
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "127.0.0.1",
        "10.0.0.1",
    ):
        assert any(IPv4Address(address) in network for network in PROTECTED), address
    for address in (guest_address(2), guest_address(65534), *uplink_addresses(0), *uplink_addresses(8191)):
        assert any(IPv4Address(address) in network for network in PROTECTED), address


def test_a_protected_range_is_opened_by_a_network_within_it_alone() -> None:
    policy = Compiled.of(
        NetworkPolicy(allow=["0.0.0.0/0", "192.0.0.0/4", "10.1.0.0/16:80", "169.254.169.254"])
    )
    assert [str(cidr) for cidr, _ in policy.opened(PROTECTED)] == ["10.1.0.0/16", "169.254.169.254/32"]
    assert policy.opens(IPv4Address("10.1.2.3"), PROTECTED) and not policy.opens(
        IPv4Address("10.2.2.3"), PROTECTED
    )


def test_without_root_or_a_library_a_network_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SandboxSpec(network="pypi")
    monkeypatch.setattr(host, "find_program", lambda name: None)
    with pytest.raises(HostUnfit, match=r"program ip.*apt-get install iproute2"):
        network_order(spec, sandbox_id="sb-x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match=r"network='pypi'.*need root.*network='offline'"):
        network_order(spec, sandbox_id="sb-x")
    assert network_order(SandboxSpec(), sandbox_id="sb-x") is None and not network_capabilities()


def test_what_a_sandbox_can_fill_is_bounded() -> None:
    events = Events()
    for number in range(EVENTS + 10):
        events.note("dns", f"{number}.example" * 40, "no")
    events.note("dns", "x", "no")
    events.note("dns", "x", "no")
    assert len(events.rows()) == EVENTS and events.dropped == 11 and events.rows()[-1]["count"] == 2
    assert max(len(row["what"]) for row in events.rows()) <= 255
    guest = Guest(id="sb", number=2, policy=Compiled.of(NetworkPolicy()))
    for number in range(5000):
        guest.learn(f"{number}", "a.org", 60.0)
    assert len(guest.known) == 4096
    assert sum(guest.may_ask() for _ in range(2000)) < 700 and guest.dns_limited > 1200


def test_a_secret_is_checked_and_no_text_holds_its_value() -> None:
    value = "hunter2-hunter2"
    secret = Secret(
        host="API.github.com", value=value, format="Bearer {}", methods=["get"], paths=["/user", "/repos/*"]
    )
    assert secret.host == "api.github.com" and secret.methods == ("GET",)
    assert value not in repr(secret) and value not in str(secret.public())
    assert secret_url("GITHUB") == "http://198.18.0.1:8080/GITHUB"
    for wrong, words in (
        ({"host": "*.github.com"}, "one host name"),
        ({"host": "github.com:443"}, "one host name"),
        ({"host": "10.0.0.1"}, "one host name"),
        ({"value": "short"}, "shorter than 8"),
        ({"value": value + "\n"}, "printable ASCII"),
        ({"value": value + "\r\nX: y"}, "printable ASCII"),
        ({"header": "Host"}, "may go into"),
        ({"header": "a b"}, "may go into"),
        ({"format": "Bearer"}, "must hold {} once"),
        ({"format": "{}{}"}, "must hold {} once"),
        ({"port": 0}, "from 1 to 65535"),
        ({"methods": "GET"}, "must be lists"),
        ({"paths": ["user"]}, "must start with '/'"),
        ({"paths": ["/a*b"]}, "must start with '/'"),
        ({"max_body": -1}, "0 or more"),
    ):
        with pytest.raises(InvalidRequest, match=words) as error:
            Secret(**{"host": "a.org", "value": value} | wrong)  # type: ignore[arg-type]
        assert value not in str(error.value)
    for wrong_map, words in (
        ({"a-b": secret}, "not a name"),
        ({"A": value}, "must be a Secret"),
        ({"A": {"value": value}}, "needs host"),
    ):
        with pytest.raises(InvalidRequest, match=words) as error:
            check_secrets(wrong_map)  # type: ignore[arg-type]
        assert value not in str(error.value)
