"""Random choices as functions of (seed, keys), never of arrival order.

Everything random in elfs_ray that concerns a sample is drawn here, so that the number of workers, the order in
which they finish and a crash between change nothing.
"""

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_uint64(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys to uint64, with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) after each key.

    `keys` are integers or integer arrays that broadcast against each other; the result has their broadcast shape.
    The order of keys matters.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed % 2**64) + _GOLDEN_GAMMA)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN_GAMMA)
    return np.asarray(state)


def hash_uniform(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash keys to float64 in [0, 1), 53 random bits each; see `hash_uint64`."""
    return (hash_uint64(seed, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray | np.uint64) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return np.asarray(state ^ (state >> np.uint64(31)))
