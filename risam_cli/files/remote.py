"""Asking a store through fsspec: what fails for the moment is tried again, the rest is one line."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from risam_cli.errors import DataError, UsageError, reason_of

T = TypeVar("T")

TRIES = 5
_FIRST_WAIT = 0.2  # seconds before the second try; doubled each time, and spread by chance


class StoreError(DataError):
    """What a store says for good.

    Attributes:
        of_all: it would say the same of every other object: credentials, or a missing package.
    """

    of_all = False


def file_system(url: str) -> tuple[Any, str]:
    """File system of a URL by fsspec, and its name there.

    Raises:
        StoreError: the package for it is not installed, or no such scheme is known.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except Exception as error:
        refuse(error, url)
    return fs, path


def patiently(act: Callable[[], T], url: str) -> T:
    """What a store answers; asked again where it fails for the moment.

    Raises:
        StoreError: it fails for good, or each time.
    """
    wait = _FIRST_WAIT
    for left in reversed(range(TRIES)):
        try:
            return act()
        except (MemoryError, StoreError):
            raise
        except Exception as error:
            meant = _meant(error)
            if not left or not _may_pass(meant):
                refuse(meant, url)
        time.sleep(wait * (0.5 + random.random()))
        wait *= 2
    raise AssertionError


_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError", "UnauthorizedSSOTokenError", "RefreshError"),
    *("DefaultCredentialsError", "LocalTokenNotFoundError", "SSOTokenLoadError"),
}
_REFUSED = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("security token", "Access Key Id you provided", "request signature"),
)


def _meant(error: Exception) -> Exception:
    """What was really said: fsspec calls every answer of a web server a file that is not there."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if _status(cause) in (404, 410) else cause
    return error


def _status(error: BaseException) -> int:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        status = getattr(response, "status_code", status)
    return status if isinstance(status, int) else 0


def _may_pass(error: Exception) -> bool:
    """Whether the next try may fare better."""
    if isinstance(error, _FOR_GOOD) or type(error).__name__ in _NO_CREDENTIALS:
        return False
    status = _status(error)
    if 400 <= status < 500:
        return status in (408, 425, 429)
    # What the library itself cannot do, it cannot do the next time either.
    return not isinstance(error, (TypeError, NotImplementedError, AttributeError, KeyError))


def refuse(error: Exception, url: str) -> NoReturn:
    """Raises StoreError with one line for what a store or fsspec said."""
    scheme = url.partition("://")[0]
    text, status = reason_of(error), _status(error)
    raised: StoreError
    if isinstance(error, ImportError):
        raised = StoreError(
            f"{url}: {scheme}:// needs a package that is not installed ({text})",
            "pip install 'risam[remote]'",
        )
        raised.of_all = True
    elif isinstance(error, ValueError) and "rotocol" in text:
        raised = StoreError(f"{url}: unknown storage type {scheme}://", "check the address")
    elif type(error).__name__ in _NO_CREDENTIALS or any(sign in str(error) for sign in _REFUSED):
        raised = StoreError(
            f"{url}: the credentials for {scheme}:// are missing or refused ({text})",
            "log in, or set them as the store's own tools read them (for S3: AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE)",
        )
        raised.of_all = True
    elif isinstance(error, FileNotFoundError) and _has_no_bucket(url):
        raised = StoreError(f"{url}: no such bucket", "check the address")
    elif isinstance(error, FileNotFoundError) or status in (404, 410):
        raised = StoreError(f"{url}: no such object", "check the address")
    elif isinstance(error, PermissionError) or status in (401, 403):
        raised = StoreError(
            f"{url}: the store refuses access ({text})", "check the address and your permissions"
        )
    elif isinstance(error, NotImplementedError):
        raised = StoreError(f"{url}: {scheme}:// cannot be written to", "choose another store")
    elif isinstance(error, IsADirectoryError):
        raised = StoreError(f"{url}: is a folder, not an object")
    else:
        raised = StoreError(
            f"{url}: the store did not answer in {TRIES} tries ({text})",
            "check the connection, and try again later",
        )
    raise raised from error


def _has_no_bucket(url: str) -> bool:
    """Whether it is the bucket of an S3 that is missing, and not the object."""
    fs, path = file_system(url)
    if not hasattr(fs, "call_s3"):
        return False
    try:
        fs.call_s3("head_bucket", Bucket=path.partition("/")[0])
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return False


def require_known(url: str) -> None:
    """Make sure that a URL's scheme is known and its package installed.

    Raises:
        UsageError: it is not.
    """
    try:
        file_system(url)
    except StoreError as error:
        raise UsageError(*error.args) from error
