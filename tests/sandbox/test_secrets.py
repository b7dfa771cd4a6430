"""Secrets: used from inside, never seen there. The real host is api.test of internet.py, its certificate is checked."""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.sandbox import NetworkPolicy, Sandbox, Secret, Unsupported, secret_url
from rorqual.sandbox.network.proxy import Blackout, Denied, check_path
from rorqual.sandbox.state import StateDir
from tests.sandbox.internet import World
from tests.sandbox.test_network import REFUSED, UNKNOWN, curl

VALUE = 'tok-/7f3a+9c"1e%q5'
FORMS = (
    VALUE,
    base64.b64encode(VALUE.encode()).decode().rstrip("="),
    quote(VALUE, safe=""),
    VALUE.replace('"', '\\"'),
)


@pytest.fixture(scope="module")
def box(internet: World, runtime: str) -> Iterator[Sandbox]:
    before = os.environ.get("XDG_CONFIG_HOME")
    os.environ["XDG_CONFIG_HOME"] = str(internet.config)
    try:
        secrets = {
            "API": Secret(
                host="api.test", value=VALUE, format="Bearer {}", ca=internet.ca, max_body=30 << 20
            ),
            "READ": Secret(
                host="api.test",
                value=VALUE,
                header="X-Key",
                ca=internet.ca,
                methods=["GET"],
                paths=["/echo", "/echo/*"],
            ),
            "STRANGER": Secret(host="evil.test", value=VALUE, ca=internet.ca),
            "NOBODY": Secret(host="nobody.test", value=VALUE, ca=internet.ca),
            "UNTRUSTED": Secret(host="api.test", value=VALUE),
        }
        with Sandbox.create(secrets=secrets, memory_mb=256) as sandbox:
            yield sandbox
    finally:
        os.environ.pop("XDG_CONFIG_HOME")
        if before is not None:
            os.environ["XDG_CONFIG_HOME"] = before


def echo(box: Sandbox, *words: str) -> dict[str, object]:
    answer: dict[str, object] = json.loads(curl(box, *words))
    return answer


def status(box: Sandbox, *words: str) -> tuple[str, str]:
    """(HTTP status, body)"""
    text = curl(box, "-w", "\n%{http_code}", *words)
    body, _, code = text.rpartition("\n")
    return code, body


def test_the_host_gets_the_credential_and_only_the_proxy_is_reached(box: Sandbox) -> None:
    assert box.info().network == "offline"
    found = echo(
        box,
        "-H",
        "Authorization: Bearer forged",
        "-H",
        "X-Mine: 1",
        "$URL/echo/a?b=c".replace("$URL", secret_url("API")),
    )
    headers = found["headers"]
    assert isinstance(headers, dict)
    assert found["path"] == "/echo/a?b=c" and headers["host"] == "api.test" and headers["x-mine"] == "1"
    # An echo is blacked out, so it was there: one longer, since JSON puts a backslash before the quote in it.
    assert headers["authorization"] == "Bearer " + "*" * (len(VALUE) + 1)
    assert box.commands.run("echo $RORQUAL_SECRET_API_URL").stdout.strip() == secret_url("API")
    assert curl(box, "http://93.184.216.34/") == REFUSED and curl(box, "http://api.test/") == UNKNOWN


def test_the_value_is_nowhere_inside_and_in_nothing_that_is_written(
    box: Sandbox, state: StateDir, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = [curl(box, "-i", secret_url("API") + path) for path in ("/parts", "/echo", "/here")]
    shown.append(box.commands.run("env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null", user="root").stdout)
    shown.append(
        box.commands.run(
            "grep -rsl 'tok-/7f3a' /etc /home /root /run /tmp /var /dev/shm /.rorqual", user="root"
        ).stdout
    )
    shown += [repr(box.info()), repr(box.network_log()), repr(box.trajectory.list()), caplog.text]
    for form in FORMS:
        assert form not in "\n".join(shown)
        # Not read by this process: to close a file of SQLite's drops the locks that its connections here hold.
        written = subprocess.run(
            [
                "grep",
                "-rlF",
                "--binary-files=text",
                "--devices=skip",
                "--",
                form,
                str(state.run),
                str(state.root),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert written.stdout == "" and written.returncode in (1, 2), written


def test_no_process_of_ours_but_the_gateway_holds_the_value_in_its_command_line_or_variables(
    box: Sandbox,
) -> None:
    for place in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                data = (place / name).read_bytes()
            except OSError:
                continue
            assert VALUE.encode() not in data, place


def test_an_answer_in_pieces_of_one_byte_is_blacked_out(box: Sandbox) -> None:
    text = curl(box, "-i", secret_url("API") + "/parts")
    assert f"x-echo: Bearer {'*' * len(VALUE)}" in text and text.endswith(f"<Bearer {'*' * len(VALUE)}>")


def test_a_redirect_is_not_followed_and_takes_no_credential_along(box: Sandbox) -> None:
    text = curl(box, "-i", secret_url("API") + "/away")
    assert "302" in text and "location: http://evil.test/echo\r\n" in text
    assert curl(box, "-L", secret_url("API") + "/away") == UNKNOWN
    found = echo(box, "-L", secret_url("API") + "/here")
    assert found["path"] == "/echo/moved"


def test_methods_and_paths_are_held(box: Sandbox) -> None:
    url = secret_url("READ")
    assert echo(box, url + "/echo/x?y=1")["path"] == "/echo/x?y=1"
    assert status(box, "-d", "x", url + "/echo")[0] == "405"
    for path in (
        "/parts",
        "/",
        "/echoes",
        "/echo/../parts",
        "/echo/%2e%2e/parts",
        "/echo//parts",
        "/echo/%2fparts",
        "/echo/..%5cparts",
    ):
        assert status(box, "--path-as-is", url + path)[0] in ("400", "403"), path
    assert status(box, "-X", "TRACE", secret_url("API") + "/echo")[0] == "405"
    log = box.network_log()
    assert {"POST /echo", "GET /parts"} <= {
        event.what.replace("/READ", "") for event in log.events if event.kind == "secret"
    }
    assert log.counters["secret_refused"] >= 10


def test_bodies_are_streamed_and_bounded(box: Sandbox) -> None:
    box.commands.run("head -c 20000000 /dev/zero > body")
    assert echo(box, "-T", "body", secret_url("API") + "/echo")["size"] == 20_000_000
    chunked = ("-H", "Transfer-Encoding: chunked", "-T", "body")
    assert echo(box, *chunked, secret_url("API") + "/echo")["size"] == 20_000_000
    box.commands.run("head -c 32000000 /dev/zero > body")
    assert status(box, "-T", "body", secret_url("API") + "/echo")[0] == "413"
    code, body = status(box, *chunked, secret_url("API") + "/echo")
    assert (code, body) == ("413", "rorqual: the body is larger than 31457280 bytes\n") or code == "!56"


def test_an_unknown_name_a_wrong_certificate_and_a_host_that_is_not_there_are_refused(box: Sandbox) -> None:
    code, body = status(box, secret_url("OTHER") + "/echo")
    assert code == "404" and "API, NOBODY, READ, STRANGER, UNTRUSTED" in body
    for name in ("STRANGER", "UNTRUSTED"):
        code, body = status(box, secret_url(name) + "/echo")
        assert code == "502" and "SSLCertVerificationError" in body
    assert status(box, secret_url("NOBODY") + "/echo")[0] == "502"
    assert status(box, secret_url("API") + "/gzip")[0] == "502"


@pytest.mark.parametrize(
    "request_bytes",
    [
        rb"GET /API/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        rb"GET /API/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        rb"GET /API/echo HTTP/1.1\r\n\r\n",
        rb"GET /API/echo\r\n\r\n",
        rb"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        rb"GET /API/echo HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70000,
        rb"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n",
        rb"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_one_clear_request_is_refused(box: Sandbox, request_bytes: bytes) -> None:
    code = f"""
import socket
s = socket.create_connection(("198.18.0.1", 8080), timeout=10)
s.sendall(b'''{request_bytes.decode()}''')
s.shutdown(socket.SHUT_WR)
data = b""
while True:
    try:
        more = s.recv(4096)
    except ConnectionResetError:
        break
    if not more: break
    data += more
print(data[9:12].decode() if data.startswith(b"HTTP/") else "")
"""
    before = box.network_log().counters["secret_requests"]
    assert box.commands.run(["python3", "-c", code], timeout=30).stdout.strip() in (
        "",
        "400",
        "404",
        "405",
        "431",
        "501",
    )
    assert box.network_log().counters["secret_requests"] == before


def test_another_sandbox_has_none_of_it_and_a_fork_has(box: Sandbox, world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"])) as other:
        assert status(other, secret_url("API") + "/echo")[0] == "404"
    (child,) = box.fork()
    with child:
        assert echo(child, secret_url("API") + "/echo")["path"] == "/echo"


def test_a_client_that_does_not_know_the_values_cannot_fork(box: Sandbox) -> None:
    from rorqual.sandbox.network.secret import vault

    held = vault.get(box.id)
    vault.drop(box.id)
    try:
        with pytest.raises(Unsupported, match="only the process that gave it the secrets"):
            box.fork()
    finally:
        vault.put(box.id, held)


def test_a_policy_and_secrets_go_together(world: World) -> None:
    secrets = {"API": Secret(host="api.test", value=VALUE, ca=world.ca)}
    with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"]), secrets=secrets) as both:
        assert curl(both, "http://allowed.test/") == "93.184.216.34"
        both.update_network("offline")
        assert echo(both, secret_url("API") + "/echo")["path"] == "/echo"


@given(
    st.binary(max_size=60),
    st.lists(st.integers(1, 9), max_size=60),
    st.sampled_from(FORMS),
    st.binary(max_size=60),
)
def test_no_way_to_cut_a_stream_lets_a_secret_through(
    head: bytes, cuts: list[int], form: str, tail: bytes
) -> None:
    text = head + form.encode() + tail
    blackout = Blackout(VALUE)
    out, place = b"", 0
    for size in [*cuts, len(text)]:
        out += blackout.feed(text[place : place + size])
        place += size
    out += blackout.rest()
    assert len(out) == len(text)
    assert form.encode() not in out
    if form.encode() not in head + tail and b"*" not in text:
        assert out.count(b"*") >= len(form)


def test_what_cannot_be_a_secret_is_passed_on_at_once() -> None:
    blackout = Blackout(VALUE)
    assert blackout.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert blackout.feed(b"data: tok") == b"data: " and blackout.rest() == b"tok"


def test_paths_are_read_in_one_way_only() -> None:
    check_path("/a/b?c=../..", ["/a/*"])
    check_path("/", [])
    rng = random.Random(5)
    for _ in range(2000):
        path = "/a/" + "".join(
            rng.choice(["..", "%2e", ".", "/", "%2F", "b", "%5c", "\\", "%2E%2e"]) for _ in range(4)
        )
        try:
            check_path(path, ["/a/*"])
        except Denied:
            continue
        assert not {".", "..", ""} & set(unquote(path)[1:].rstrip("/").split("/")) and "\\" not in unquote(
            path
        ), path
    for wrong in ("/b", "/ab", "/a"):
        with pytest.raises(Denied):
            check_path(wrong, ["/a/*"])
