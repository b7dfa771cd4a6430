"""Errors of the SDK as HTTP answers. Owns the table of statuses."""

from __future__ import annotations

import errno

from fastapi.responses import JSONResponse, Response

from rorqual.sandbox import errors
from rorqual.sandbox._remote_codec import encode_error

_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidRequest, 400),
    (errors.Unsupported, 422),
    (errors.ImageNotFound, 404),
    (errors.ImageRejected, 422),
    (errors.SandboxNotFound, 404),
    (errors.CommandNotFound, 404),
    (errors.SandboxEnded, 410),
    (errors.EdgeFull, 429),
    (errors.GuestRefused, 409),
    (errors.HostUnfit, 503),
    (errors.GuestGone, 502),
    (errors.GuestProtocolError, 502),
    (errors.TrajectoryError, 503),
    (errors.LaunchFailed, 503),
)


def status_of(error: Exception) -> int:
    """HTTP's number for an error of the SDK."""
    if isinstance(error, errors.EdgeRefused):
        return error.status
    if isinstance(error, errors.GuestFileError):
        found = {
            errno.ENOENT: 404,
            errno.ENOTDIR: 404,
            errno.EACCES: 403,
            errno.EPERM: 403,
            errno.ENOSPC: 507,
        }
        return found.get(error.errno, 409)
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def failure(error: Exception) -> Response:
    """The answer for an error."""
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, errors.EdgeFull) else {}
    return JSONResponse({"error": encode_error(error)}, status_code=status_of(error), headers=headers)
