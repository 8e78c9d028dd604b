"""What random keys are folded with: one number for each use, so that no two uses share their randomness."""

import enum


class KeyTag(enum.IntEnum):
    """A use of randomness: ``jax.random.fold_in(key, tag)`` is its key. The values are part of every result.

    The first three are folded into a chain's key of one step, itself ``fold_in(fold_in(key, chain), step)``; the
    others into the key of an estimate, a sweep or a trajectory, whose own folds (chains, cells, checkpoints, parts)
    are small numbers.
    """

    BATCH = 0
    NOISE = 1
    OTHER_DATA = 2  # the first further data set; one number more for each of the others

    PILOT = 2**31 - 7  # noise and examples of the calibration
    END_PROBE = 2**31 - 9
    CURVATURES = 2**31 - 11
    METRIC_PILOT = (
        2**31 - 11
    )  # the value of CURVATURES: harmless, since one run never does both (a metric has no theory)
    METRIC_PROBES = 2**31 - 12
    METRIC_POWER_ITERATION = 2**31 - 13

    SWEEP_CONTROL = 2**31 - 21
    SHARED_CALIBRATION = 2**31 - 22
    SHARPNESS = 2**31 - 23
