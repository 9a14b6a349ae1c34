"""The calls of a student that are under way: nested ones, and ones that failed."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["Calls"]


class Calls:
    """Follows the calls of one module through its forward hooks.

    A nested call is one that the module makes of itself. A failed one raised an error; where ``torch.compile`` runs the
    module no hook is told of that, so a call counts as under way only while its frame is on the stack.
    """

    def __init__(self) -> None:
        self._frames: list[Any] = []
        self._handled: BaseException | None = None

    def begin(self) -> bool:
        """Note that a call begins.

        Returns:
            It is the outermost.
        """
        if self._frames and _running(self._frames[0]):
            self._frames.append(_call_frame())
            return False
        self._frames, self._handled = [_call_frame()], sys.exc_info()[1]
        return True

    def end(self) -> bool:
        """Note that a call ends.

        Returns:
            It was the outermost; False also if its beginning was never noted.
        """
        if not self._frames:
            return False
        self._frames.pop()
        return not self._frames

    def failed(self) -> bool:
        """Say whether the outermost call, which has just ended, raised an error."""
        error, handled, self._handled = sys.exc_info()[1], self._handled, None
        return error is not None and error is not handled  # a call may be made in the handler of another error

    def __getstate__(self) -> dict[str, Any]:
        """Leave calls under way out of copies and pickles."""
        return {"_frames": [], "_handled": None}


def _call_frame() -> Any:
    """Return the frame of the module's call that runs the hook, which is on the stack until the call ends."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != nn.modules.module.__file__:
        frame = frame.f_back
    return frame


def _running(frame: Any) -> bool:
    current: Any = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None
