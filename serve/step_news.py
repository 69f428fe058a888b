"""News of denoising steps: a replica tells them twice a second, those of all its renderings in one call."""

from __future__ import annotations

import asyncio
from logging import getLogger

from serve.handles import tell_together
from serve.work import Told

#: Between two tellings. A call to the API costs both sides milliseconds of a core, of which a small model's step has
#: tens; for a bar that moves this is often enough.
PAUSE_S = 0.4


class StepNews:
    """Tells the newest step of each rendering. News that do not arrive disturb nobody who renders."""

    def __init__(self) -> None:
        self._newest: dict[int, tuple[Told, int, int]] = {}
        self._telling: asyncio.Task[None] | None = None

    def note(self, told: Told, index: int, step: int) -> None:
        """Step `step` of segment `index` begins. Call it in the event loop."""
        self._newest[id(told)] = (told, index, step)
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    def forget(self, told: Told) -> None:
        """The rendering has ended, or nobody listens any more."""
        self._newest.pop(id(told), None)

    async def _tell(self) -> None:
        try:
            await asyncio.sleep(0)  # those that begin together are told together
            while self._newest:
                news, self._newest = list(self._newest.values()), {}
                try:
                    await tell_together(news)
                except Exception:
                    getLogger(__name__).debug("nobody could be told of a step", exc_info=True)
                await asyncio.sleep(PAUSE_S)
        finally:
            self._telling = None
