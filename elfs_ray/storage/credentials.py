"""URIs that carry credentials: told apart without being shown, since tables, logs and reports show URIs."""

import re

_SECRET = re.compile(
    r"[?&#;](access_key|secret_key|(session_|access_)?token|sig|signature|awsaccesskeyid|x-(amz|goog)-[a-z-]+)=",
    re.IGNORECASE,
)


def holds_credentials(uri: str) -> bool:
    """Whether a URI carries a user, a password, a key or a token."""
    _, scheme, rest = uri.partition("://")
    return bool(scheme) and ("@" in rest.split("/", 1)[0] or _SECRET.search(rest) is not None)


def refuse_credentials(uri: str, what: str) -> None:
    """Raise ValueError, which does not show the URI, for one with credentials in it; `what` says whose it is."""
    if holds_credentials(uri):
        raise ValueError(
            f"{what} is a URI with credentials in it, which tables and logs would show: give scheme://bucket/path, and "
            "credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
        )
