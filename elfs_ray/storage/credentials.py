"""Refuse URIs that contain credentials, without showing them: tables, logs and reports all contain URIs."""

import re

# Also with a single slash: the message that refuses s3:/bucket shows what was given.
_START = re.compile(r"^(?!file:)[^/]*://?|://", re.IGNORECASE)
# Query parameters of pyarrow's URIs and of presigned links to S3 and Google Cloud Storage.
_SECRET = re.compile(
    r"[?&#;](access_key|secret_key|(session_|access_)?token|sig|signature|awsaccesskeyid|x-(amz|goog)-[a-z-]+)=",
    re.IGNORECASE,
)


def holds_credentials(uri: str) -> bool:
    """Return whether a URI contains a user, a password, a key or a token."""
    start = _START.search(uri)
    rest = uri[start.end() :] if start else ""
    # An @ is a letter like any other in a path, but before the first slash it ends "user:password".
    return "@" in rest.split("/", 1)[0] or _SECRET.search(rest) is not None


def refuse_credentials(uri: str, what: str) -> None:
    """Raise ValueError for a URI that contains credentials; the message has `what` in place of the URI."""
    if holds_credentials(uri):
        raise ValueError(
            f"{what} is a URI with credentials in it, which tables and logs would show: give scheme://bucket/path, and "
            "set credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
        )
