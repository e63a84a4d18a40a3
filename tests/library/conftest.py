from collections.abc import Iterator

import pytest

from ema_attention import _blocks, _forms


@pytest.fixture(autouse=True, scope="session")
def _forms_at_the_size_of_a_test() -> Iterator[None]:
    """Forms that save memory from 24 positions on, in blocks of 64: a test's input has several, and a remainder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_forms, "SAVES_MEMORY_FROM", 24)
        patch.setattr(_blocks, "_BYTES", 0)
        yield
