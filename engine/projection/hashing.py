"""Integer hashes that are the same on every device, in every process: all of a projector's randomness.

Everything is int64 arithmetic, exact or wrapping modulo 2^64, so there is nothing to round.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

VERSION = "splitmix64/blake2b/mersenne31-v1"  # change it whenever a hash below changes
PRIME = 2**31 - 1  # Mersenne; Horner's a * x + b stays below 2^62 + 2^31, exact in int64
_MASK = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream_key(seed: int, layer: int, purpose: str) -> int:
    """64-bit key of an independent random stream, from blake2b of its name."""
    name = f"{VERSION}/{seed}/{layer}/{purpose}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def splitmix64(key: int, counter: int) -> int:
    """Number `counter` of the SplitMix64 stream `key` (Steele, Lea, Flood 2014): 64 random bits."""
    z = (key + counter * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def splitmix64_tensor(key: int, counters: Tensor) -> Tensor:
    """`splitmix64` of int64 counters, elementwise, as int64 with the same bits."""
    z = counters * _signed(_GOLDEN)
    z += _signed(key)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z ^= _shift_right(z, shift)
        z *= _signed(factor)
    z ^= _shift_right(z, 31)
    return z


def polynomial_hash(key: int, independence: int, n: int) -> Tensor:
    """Values in [0, PRIME) of 0..n-1 under a random polynomial: (n,) int64, `independence`-wise independent.

    A polynomial of degree k - 1 with uniform coefficients over a field is k-wise independent (Wegman and
    Carter 1981). Coefficients are 31 bits of SplitMix64 each, the one value that is not below PRIME rejected.
    """
    assert n <= PRIME
    coefficients: list[int] = []
    counter = 0
    while len(coefficients) < independence:
        draw = splitmix64(key, counter) >> 33
        counter += 1
        if draw < PRIME:
            coefficients.append(draw)
    x = torch.arange(n)
    value = torch.zeros(n, dtype=torch.int64)
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


def buckets_and_signs(seed: int, layer: int, side: str, n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Count-sketch hashes of n indices: buckets (n,) int64 in [0, dim), 3-wise; signs (n,) float32, 4-wise.

    Reducing modulo dim (or 2) favours some values by a relative dim / PRIME (2e-6 at dim 4096), far below
    what any run could notice.
    """
    buckets = polynomial_hash(stream_key(seed, layer, f"{side}/bucket"), 3, n) % dim
    bits = polynomial_hash(stream_key(seed, layer, f"{side}/sign"), 4, n) & 1
    return buckets, (1 - 2 * bits).float()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
