"""The audit log: one line per request and per call of a channel. Who, what, of which sandbox, with what outcome.

Never an argument, a header, a query or a body: they may hold secrets. The logger is `rorqual.edge.audit`, at INFO;
whoever runs the edge decides where it goes.
"""

from __future__ import annotations

import json
import logging
import time

LOGGER = logging.getLogger("rorqual.edge.audit")


def audit(who: str, call: str, *, sandbox: str = "", outcome: str, seconds: float) -> None:
    """One line of JSON."""
    LOGGER.info(
        "%s",
        json.dumps(
            {
                "time": round(time.time(), 3),
                "who": who,
                "call": call[:200],
                "sandbox": sandbox[:80],
                "outcome": outcome,
                "seconds": round(seconds, 4),
            }
        ),
    )
