"""What a call is refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError


def refusal(call: Callable[..., Any], *args: Any) -> str:
    """The one line of the InputError that ``call(*args)`` raises."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)
