"""`doctor` tries, tells and cleans up."""

from __future__ import annotations

import pytest

from rorqual.sandbox import Sandbox, doctor


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_doctor_agrees_with_what_create_does(runtime: str) -> None:
    checks = {check.name: check for check in doctor()}
    assert {"user namespaces", "overlay", "crun", "runc", "KVM", "qemu", "python3 in the base image"} <= set(
        checks
    )
    assert all(check.why for check in checks.values())
    assert all(
        check.fix for check in checks.values() if not check.ok and check.name not in ("crun", "runc", "KVM")
    )
    with Sandbox.create() as sb:
        info = sb.info()
    assert checks[info.runtime].ok
    assert checks["limit: memory"].ok
    if info.limits["pids"] == "cgroup":
        assert checks["limit: processes"].ok and checks["limit: CPU"].ok


def test_a_host_without_a_runtime_is_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    checks = {check.name: check for check in doctor()}
    assert not checks["crun"].ok and checks["crun"].fix == "apt-get install crun"
    assert "limit: memory" not in checks
