"""When frames are shown: the time stamps of a video, its frame rate, and frames at another rate.

A player shows a frame from its time stamp to the next one's, and the last one for its own duration. A clip has one
rate: its number of frames over the time that all of them take. If the stamps keep to that rate within half a frame, the
clip has the file's frames one for one. Otherwise, as with a screen recording that pauses, each frame of the clip is the
frame that a player shows at that moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

STILL_FPS = 8.0  # frames per second assigned to an image; the procedural clips have the same rate
SLOWEST, FASTEST = 1e-3, 1e4  # frames per second; time stamps that give another rate are damaged
TOLERANCE = 0.002  # seconds: WebM and Matroska round their stamps to 1 ms


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames of a video over time.

    Args:
        stamps: when each frame is shown, in seconds, in order; the first one's is the beginning.
        seconds: how long all frames are shown.
        fps: frames per second.
    """

    stamps: np.ndarray
    seconds: float
    fps: float

    @classmethod
    def of_still(cls) -> Timeline:
        """The timeline of one picture."""
        return cls(np.zeros(1), 1 / STILL_FPS, STILL_FPS)

    @classmethod
    def of(cls, stamps: Iterable[float], last: float | None, header_fps: float | None) -> Timeline:
        """The timeline of stamps in seconds, in any order.

        Args:
            last: seconds that the last frame is shown; None or 0 if the file does not say.
            header_fps: the rate that the file's header states. It is more exact than the stamps, and it counts if it
                agrees with them within one frame over the whole file, or if there is only one frame.

        Raises:
            ValueError: there is no rate.
        """
        times = np.array(sorted(stamps), np.float64)
        steps = np.diff(times)
        if steps.size:  # a frame that is not shown (VP8's) has a stamp close to its neighbour's
            typical = float(np.median(steps))
            times = times[np.concatenate([[True], steps > 0.25 * typical])] if typical > 0 else times
        times, n = times - (times[0] if len(times) else 0.0), len(times)
        typical = float(np.median(np.diff(times))) if n > 1 else 0.0
        seconds = round(float(times[-1] + (last or typical)), 6) if n else 0.0
        agrees = header_fps and abs(header_fps * seconds - n) <= 1
        if header_fps and (n < 2 or seconds <= 0 or agrees):
            return cls(times, max(seconds, n / header_fps) if n < 2 else seconds, float(header_fps))
        if n < 2 or not seconds > 0:
            raise ValueError("it states no frame rate")
        if not SLOWEST <= n / seconds <= FASTEST:
            raise ValueError(f"it shows {n} frames in {seconds:g} s")
        return cls(times, seconds, n / seconds)

    def __len__(self) -> int:
        """The number of frames at the clip's own rate."""
        return len(self.stamps)

    @property
    def even(self) -> bool:
        """Whether the stamps keep to the rate within half a frame."""
        return bool(np.all(np.abs(self.stamps * self.fps - np.arange(len(self.stamps))) < 0.5))

    def count(self, fps: float | None = None) -> int:
        """The number of frames at a rate; None: at the clip's own."""
        return len(self) if fps is None or self._is_own(fps) else max(1, round(self._shown_seconds * fps))

    def _is_own(self, fps: float | None) -> bool:
        return fps is None or abs(fps / self.fps - 1) < 1e-3

    @property
    def _shown_seconds(self) -> float:
        return len(self) / self.fps if self.even else self.seconds

    def resampled[Frame](
        self, shown: Iterable[tuple[float, Frame]], start: int, fps: float | None = None
    ) -> Iterator[Frame]:
        """Frames start, start + 1, ... at a rate; None: at the clip's own.

        Args:
            shown: (stamp in seconds, frame) of the file, in order, from the moment of `start` on or earlier.
        """
        even, own = self.even, self._is_own(fps)
        rate = self.fps if own or not fps else fps
        slack = min(TOLERANCE, 0.25 / rate)
        end, k, held = self.count(fps), start, None
        for stamp, frame in shown:
            if even:  # what the stamp was before it was rounded
                stamp = round(stamp * self.fps) / self.fps
            while held is not None and k < end and k / rate + slack < stamp:
                yield held
                k += 1
            if k >= end:
                return
            held = frame
        if even and own:
            end = k + 1
        while held is not None and k < end:
            yield held
            k += 1
