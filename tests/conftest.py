"""What every test may ask for: real data, the default model, a cache of its own.

The suite needs neither data nor a network: what does is skipped, and says what it lacks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private cache folder; only the models that the user has fetched are linked into it."""
    from pronghorn.weights.hub import cache_folder

    private = tmp_path_factory.mktemp("cache")
    (private / "models").mkdir()
    for path in sorted((cache_folder() / "models").glob("*")):
        (private / "models" / path.name).symlink_to(path.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRONGHORN_CACHE", str(private))
        yield private


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT as at a terminal: a shell's background job is started with it ignored, and so would be its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder that PRONGHORN_TEST_DATA names: small trained models and text (see CONTRIBUTING.md)."""
    folder = os.environ.get("PRONGHORN_TEST_DATA")
    if not folder:
        pytest.skip("PRONGHORN_TEST_DATA is not set (a folder with models/stories260K and text/)")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"PRONGHORN_TEST_DATA={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def default_model(cache: Path) -> Path:
    """The default model's GGUF file; `make test` fetches it once, into the user's own cache."""
    from pronghorn.weights.hub import DEFAULT_MODEL, default_model

    if not any((cache / "models").glob(f"{DEFAULT_MODEL}*")) and not os.environ.get("PRONGHORN_TEST_NETWORK"):
        pytest.skip("the default model is not in the cache (`make test` fetches it)")
    return default_model()
