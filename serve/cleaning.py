"""Files that nobody needs any more: of what has expired, and folders whose job no database knows.

A job's files are written before its row, and removed behind it, so that a process that dies in between leaves a folder
that no row names. A database that is not this place's own names none of them: then nothing is removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import getLogger

from serve.blobs import Blobs
from serve.job_files import FOLDER, JobFiles
from serve.job_store import JobStore
from serve.places import Places
from serve.work import Job

#: A folder without a row is left alone for so long: its job may be on the way into the database.
GRACE_S = 3600.0
#: Says whose place it is.
MARK = f"{FOLDER}.database"

logger = getLogger("ray.serve")


class Cleaner:
    """Removes files. Methods block."""

    def __init__(self, store: JobStore, places: Places) -> None:
        self._store, self._places = store, places
        self._looked_at: float | None = None
        self._warned = False

    def clean(self, keep_s: float | None = None) -> None:
        """Remove what has expired; now and then, what no row names.

        With `keep_s`, what was finished when nothing expired has so long behind its end, too.
        """
        if keep_s is not None:
            self._store.expire(keep_s)
        for job in self._store.expired():
            if self._store.delete(job.id, unfinished=False):  # a draft may be made again by now
                without_error(self._files(job).delete)
        for job in self._store.unmeasured():
            without_error(lambda job=job: self._store.measured(job.id, self._files(job).size()))  # type: ignore[misc]
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at > GRACE_S / 2:
            self.orphans()
            self._looked_at = now

    def _files(self, job: Job) -> JobFiles:
        return JobFiles(self._places.of(job.tenant), job.id)

    def orphans(self) -> list[str]:
        """Remove folders of jobs that the database does not know and nothing has touched for `GRACE_S`: their ids."""
        removed: list[str] = []
        for blobs in self._places.all():  # a place that cannot be reached keeps none of the others from it
            without_error(lambda blobs=blobs: removed.extend(self._orphans(blobs)))  # type: ignore[misc]
        return removed

    def _orphans(self, blobs: Blobs) -> list[str]:
        there = blobs.folders(FOLDER)
        known = self._store.known(there)
        unknown = [job_id for job_id in there if job_id not in known]
        if not self._is_own(blobs, bool(unknown)):
            return []
        removed = []
        for job_id in unknown:
            changed = blobs.changed(f"{FOLDER}/{job_id}")
            if changed and time.time() - changed > GRACE_S:
                logger.warning("%s: no row names its files: they are removed", job_id)
                without_error(JobFiles(blobs, job_id).delete)
                removed.append(job_id)
        return removed

    def _is_own(self, blobs: Blobs, unknown: bool) -> bool:
        """Whether the place is this database's: the first to know all folders there, or to find none, gets it."""
        if blobs.exists(MARK):
            own = blobs.read(MARK).decode() == self._store.identity()
        elif own := not unknown:
            blobs.write(MARK, self._store.identity().encode())
        if not own and not self._warned:
            self._warned = True
            logger.warning("the videos' place is that of another database: folders that this one does not know stay")
        return own


def without_error(remove: Callable[[], None]) -> None:
    """Look after files; where that fails they stay as they are, and the log says so."""
    try:
        remove()
    except OSError:
        logger.exception("files could not be looked after")
