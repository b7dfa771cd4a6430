"""Our guest agent as a service of a guest's own system (systemd), started by the ports through which it is reached.

`agent_files()` is everything that must be in an image: the static binary, its unit, and a udev rule that starts the
unit when a virtio-serial port of ours appears. So an image with the agent runs anywhere, and serves where it is asked.
"""

from __future__ import annotations

PORT = "org.rorqual.agent.%d"
"""Names of the ports, from 0 on (native/guest/ports.c)."""
PORTS = 8
"""Clients at the same time."""
BINARY = "usr/local/sbin/rorqual-guest"
UNIT = "etc/systemd/system/rorqual-guest.service"
RULE = "etc/udev/rules.d/80-rorqual-guest.rules"

_UNIT = f"""[Unit]
Description=Rorqual guest agent
Documentation=https://github.com/rorqual/rorqual/blob/main/docs/sandbox-machines.md
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
Before=shutdown.target
Conflicts=shutdown.target

[Service]
ExecStart=/{BINARY} --ports {PORTS} --own-kernel
Restart=always
RestartSec=1
KillMode=mixed
TasksMax=infinity
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""
_RULE = (
    'SUBSYSTEM=="virtio-ports", ATTR{name}=="org.rorqual.agent.0", TAG+="systemd", '
    'ENV{SYSTEMD_WANTS}+="rorqual-guest.service"\n'
)


def agent_files() -> dict[str, tuple[int, bytes]]:
    """Path inside the image, without the first slash -> (mode, content). All belong to root.

    Raises:
        HostUnfit: the agent is not built.
    """
    # Here, because its room imports the images', which import us.
    from rorqual.sandbox.substrates.container import guest_binary

    return {
        BINARY: (0o755, guest_binary().read_bytes()),
        UNIT: (0o644, _UNIT.encode()),
        RULE: (0o644, _RULE.encode()),
    }
