"""Random choices as functions of (seed, keys), never of arrival order.

Every random choice about a sample is made here, so that it does not depend on the number of workers, on the order in
which they finish or on a crash in between.
"""

# SplitMix64's constants: the increment is 2^64 over the golden ratio, the multipliers are Stafford's variant 13.
import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_uint64(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys to uint64, with the finalizer of SplitMix64 (Steele et al., OOPSLA 2014) after each key.

    `keys` are integers or integer arrays that broadcast against each other; the result has their broadcast shape.
    The order of keys matters.
    """
    # The arithmetic is modulo 2^64. numpy wraps silently in arrays but warns about scalars.
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed % 2**64) + _GOLDEN_GAMMA)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN_GAMMA)
    return np.asarray(state)


def hash_uniform(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys to float64 in [0, 1), 53 random bits each; see `hash_uint64`."""
    # float64 has 53 significant bits: converting all 64 could round up to 1.0.
    return (hash_uint64(seed, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray | np.uint64) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return np.asarray(state ^ (state >> np.uint64(31)))
