from collections.abc import Iterator

import pytest

from ema_attention import _blocks


@pytest.fixture(autouse=True, scope="session")
def _smallest_blocks() -> Iterator[None]:
    """Blocks of 64 positions, so that inputs of a test's size have several and a remainder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "_BYTES", 0)
        yield
