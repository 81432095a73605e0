"""What the app's own code raised, told apart from all else that can go wrong."""

from __future__ import annotations

import os
import traceback

_HERE = os.path.dirname(__file__) + os.sep  # noqa: PTH120 - compared with co_filename, which is a str


class AppError(Exception):
    """The app's code raised: a function, a generator, a validator. ``__cause__`` is what it raised.

    Anything may be in there, SystemExit and CancelledError too, which mean another thing to an event loop:
    code of the app's is called where all of it is wrapped in one of these at once.
    """

    @property
    def name(self) -> str:
        """The type of what the app raised."""
        return type(self.__cause__).__name__

    def report(self) -> str:
        """The traceback, from the app's own first frame on."""
        cause = self.__cause__
        assert cause is not None
        frames = cause.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_HERE):
            frames = frames.tb_next
        return "".join(traceback.format_exception(type(cause), cause, frames)).rstrip()
