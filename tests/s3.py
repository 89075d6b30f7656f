"""Where s3fs finds the S3 of a test, and with which keys."""

from __future__ import annotations

import pytest


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """To HOST:PORT, by the environment, with one try a request."""
    import s3fs

    patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
