"""The navigation tasks' pseudo-lidars, all of a task's at once."""

from __future__ import annotations

import numpy as np


class PseudoLidar:
    """Closeness of the nearest point per angular bin, smoothed into the neighbouring bins.

    A point at distance d and angle a (egocentric, radians) reads s = max(0, reach - d) / reach in
    its bin, and in the next and previous bin s times the fraction by which a is past, or short of,
    its bin's end; a bin keeps its largest reading.
    Source: Ray, Achiam, Amodei 2019, section 4 (Safety Gym), as safety-gymnasium computes it.
    """

    def __init__(self, bodies_P: list[int], starts_P: list[int], bins: int, reach: float) -> None:
        """Allocate the arrays that every step reuses.

        Args:
            bodies_P: body of each of P points.
            starts_P: where in the observation the bins of that point's lidar begin.
            bins: bins per lidar.
            reach: distance in m from which a point reads 0.
        """
        points = len(bodies_P)
        self._first, self._end = min(starts_P), max(starts_P) + bins
        self._starts_P = [start - self._first for start in starts_P]
        self._bodies_P = np.array(bodies_P, dtype=np.intp)
        self._bin_size = (np.pi * 2) / bins
        self._reach = reach
        # One entry more than bins: an angle just below 0 rounds to 2 pi, which is bin 0 again.
        self._this = [b % bins for b in range(bins + 1)]
        self._next = [(b + 1) % bins for b in range(bins + 1)]
        self._previous = [(b - 1) % bins for b in range(bins + 1)]
        self._offsets_P13 = np.empty((points, 1, 3))
        self.offsets_P3 = self._offsets_P13[:, 0]
        """From the robot to the points when last measured, in m, along the world's axes."""
        self._heights_P = self.offsets_P3[:, 2]
        padded_P14 = np.empty((points, 1, 4))  # room to read x, y as one complex number
        self._ego_P13 = padded_P14[:, :, :3]
        self._ego_x_P, self._ego_y_P = padded_P14[:, 0, 0], padded_P14[:, 0, 1]
        self._ego_P = padded_P14.view(np.complex128)[:, 0, 0]
        self._angles_P = np.empty(points)
        self._distances_P = np.empty(points)

    def measure(self, positions: np.ndarray, origin: np.ndarray) -> None:
        """Store the offsets from the robot to the points.

        Args:
            positions: [bodies, 3] positions of all bodies in m.
            origin: [3] position of the robot in m.
        """
        positions.take(self._bodies_P, axis=0, out=self.offsets_P3, mode="clip")
        self._heights_P.fill(0.0)  # points are on the ground
        np.subtract(self.offsets_P3, origin, out=self.offsets_P3)

    def write_to(self, observation: np.ndarray, frame: np.ndarray) -> None:
        """Write the readings of the last measurement into the lidars' part of the observation.

        Args:
            observation: [n] the flat observation, changed in place.
            frame: [3, 3] rotation of the robot.
        """
        # A stack of row vectors: the same product, in the same order of sums, as the original's
        # point by point.
        np.matmul(self._offsets_P13, frame, out=self._ego_P13)
        np.arctan2(self._ego_y_P, self._ego_x_P, out=self._angles_P)
        np.remainder(self._angles_P, np.pi * 2, out=self._angles_P)
        np.absolute(self._ego_P, out=self._distances_P)
        # Python floats from here: for the 1 to 21 points of a task, faster than array operations.
        reach, size = self._reach, self._bin_size
        this, next_, previous = self._this, self._next, self._previous
        readings = [0.0] * (self._end - self._first)
        for start, distance, angle in zip(
            self._starts_P, self._distances_P.tolist(), self._angles_P.tolist()
        ):
            if distance >= reach:
                continue
            bin_ = int(angle / size)
            reading = (reach - distance) / reach
            past = (angle - size * bin_) / size
            # The three bins are written out: this is the innermost loop of every step.
            here = start + this[bin_]
            if reading > readings[here]:
                readings[here] = reading
            here, value = start + next_[bin_], past * reading
            if value > readings[here]:
                readings[here] = value
            here, value = start + previous[bin_], (1 - past) * reading
            if value > readings[here]:
                readings[here] = value
        observation[self._first : self._end] = readings
