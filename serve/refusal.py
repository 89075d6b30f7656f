"""Why the service does not answer a request, a picture or a phrase: one kind of error for all of them."""

from __future__ import annotations

from rlfseg.errors import RlfsegError

STATUS = {
    "invalid": 422,  # the request says something that can't be done
    "picture": 422,  # not a picture, or a damaged one
    "too_large": 413,
    "media_type": 415,
    "unauthorized": 401,
    "host": 421,
    "not_found": 404,
    "method": 405,
    "conflict": 409,
    "short": 503,  # the cluster lacks what a batch asks for
    "overloaded": 503,
    "starting": 503,
    "stopping": 503,
    "lost": 503,  # the process that worked on it died
    "deadline": 504,
    "failed": 500,  # the network or a library failed
}
"""HTTP status of each kind; metrics count errors by kind."""


class Refusal(RlfsegError):
    """No answer, and why.

    Args:
        kind: A key of STATUS.
        message: One line for the client: field, value, what is allowed; never a path of the server or a secret.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind, self.message = kind, message

    @property
    def status(self) -> int:
        """Its HTTP status."""
        return STATUS[self.kind]

    def __reduce__(self) -> tuple[object, ...]:
        """Survives the way between processes with its fields."""
        return Refusal, (self.kind, self.message)
