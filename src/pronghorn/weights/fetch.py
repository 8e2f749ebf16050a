"""Downloads that go on where they were broken off, and what a package index (PEP 503: pages of links) has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pronghorn.weights.files import CHUNK, shown

ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, and one more before each other

_TIMEOUT = 30.0  # seconds without a byte


class Unreachable(Exception):
    """A file that could not be fetched, in one line."""


def fetch(url: str, path: Path) -> None:
    """Downloads `url` to `path`, which appears when it is whole. Goes on where an earlier attempt was broken off.

    Raises Unreachable after ATTEMPTS attempts that brought nothing, and at once for what is no address or is refused;
    OSError where the disk does not take it.
    """
    import http.client
    import time
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    failures = 0
    with tqdm(desc=path.name, unit="B", unit_scale=True, leave=False, delay=1, disable=None) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _continue(url, part, before, bar):
                    part.replace(path)
                    return
                reason = "the connection broke off"
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 416 and before:  # more than there is: of another file
                    part.unlink()
                    before = 0
                elif error.code < 500:
                    raise Unreachable(f"{url}: {error}") from None
                reason = str(error)
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except ValueError as error:  # no address
                raise Unreachable(f"{shown(url)}: {error}") from None
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            came = (part.stat().st_size if part.exists() else 0) > before
            failures = 1 if came else failures + 1
            if failures >= ATTEMPTS:
                raise Unreachable(f"{url}: {reason}")
            time.sleep(PAUSE * failures)


def _continue(url: str, part: Path, have: int, bar: Any) -> bool:
    """One attempt, from byte `have` on -> whether the file is whole now."""
    import urllib.request

    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if have and answer.status != 206:  # the whole file again
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar.total = total
        bar.update(have - bar.n)
        with part.open("ab" if have else "wb") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
            size = out.tell()
            if total is not None and size != total:
                return False
            out.flush()
            os.fsync(out.fileno())
        expected = answer.headers.get("Content-MD5")
    if expected and expected != _md5(part):
        part.unlink()
        raise ConnectionError("its MD5 differs from what the server says")
    return True


def _md5(path: Path) -> str:
    """As the header Content-MD5 has it: against accidents, not against anyone."""
    import base64
    import hashlib

    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()


def index_url() -> str:
    """The package index in use, that of PIP_INDEX_URL, UV_DEFAULT_INDEX or pypi.org, without a slash at its end."""
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    return index.rstrip("/")


def wheels(package: str, folder: Path) -> list[tuple[str, str, str]]:
    """The index's wheels of a package (its name normalised) -> (file name, address, SHA-256 or "").

    Its page is kept in `folder`. Raises as `fetch` does.
    """
    import html
    import re
    import urllib.parse

    base, page = f"{index_url()}/{package}/", folder / "index.html"
    page.unlink(missing_ok=True)
    fetch(base, page)
    found = []
    for link in re.findall(r"""href=["']([^"']+\.whl(?:#[^"']*)?)["']""", page.read_text(errors="replace")):
        address, _, digest = html.unescape(link).partition("#")
        name = urllib.parse.unquote(address).rpartition("/")[2]
        whole = re.fullmatch(r"sha256=([0-9a-f]{64})", digest)
        found.append((name, urllib.parse.urljoin(base, address), whole[1] if whole else ""))
    return found
