"""The hashes behind the projectors: known answers, slow references, and what is pinned for ever."""

import torch

from engine.projection import LayerShape, make_projector
from engine.projection.hashing import (
    PRIME,
    VERSION,
    buckets_and_signs,
    polynomial_hash,
    splitmix64,
    splitmix64_tensor,
    stream_key,
)

BUCKETS = [2797, 3710, 1583, 509, 490, 1525]
SIGNS = [-1.0, 1.0, 1.0, -1.0, 1.0, -1.0]
RADEMACHER = [0.5, 0.5, -0.5, -1.5]


def test_splitmix64_gives_the_published_numbers() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, counter) for counter in range(1, 5)] == published


def test_tensor_and_python_hashes_have_the_same_bits() -> None:
    counters = [0, 1, 2, 1000, 2**31, 2**40 + 3, 2**62]
    for key in (0, 1, 2**63, 2**64 - 1):
        values = splitmix64_tensor(key, torch.tensor(counters)).tolist()
        assert [value % 2**64 for value in values] == [splitmix64(key, counter) for counter in counters]


def test_polynomial_hashes_are_exact() -> None:
    """Against Python's unbounded integers, for the largest coefficients and arguments there are."""
    n, key = 5000, 12345
    draws = [splitmix64(key, counter) >> 33 for counter in range(4)]
    assert max(draws) < PRIME
    a, b, c, d = draws
    expected = [(a * x**3 + b * x**2 + c * x + d) % PRIME for x in range(n)]
    assert polynomial_hash(key, 4, n).tolist() == expected
    assert (PRIME - 1) * (PRIME - 1) + (PRIME - 1) < 2**63


def test_the_hashes_of_this_version_never_change() -> None:
    """Stores on disk rely on them: another hash needs another VERSION."""
    assert VERSION == "splitmix64/blake2b/mersenne31-v1"
    buckets, signs = buckets_and_signs(0, 0, "row", 6, 4096)
    assert buckets.tolist() == BUCKETS
    assert signs.tolist() == SIGNS
    rademacher = make_projector("rademacher", 4, 0, [LayerShape("a", 1, 2)])
    first_two = rademacher.project_matrix(0, [(0, torch.tensor([[1.0, 0.5]]))]) * 2
    assert first_two.tolist() == RADEMACHER


def test_rademacher_is_the_sign_matrix_of_its_stream() -> None:
    """Against the definition, entry by entry: bit b of word w signs dimension 64 w + b."""
    dim, layer = 150, LayerShape("a", 5, 3)
    projector = make_projector("rademacher", dim, 9, [LayerShape("b", 2, 2), layer])
    key, words = stream_key(9, 1, "rademacher"), 3
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros(dim, dtype=torch.float64)
    for row in range(layer.rows):
        for col in range(layer.cols):
            for k in range(dim):
                word = splitmix64(key, (row * layer.cols + col) * words + k // 64)
                expected[k] += (1 - 2 * (word >> (k % 64) & 1)) * matrix[row, col] / dim**0.5
    torch.testing.assert_close(projector.project_matrix(1, [(0, matrix)]), expected, rtol=1e-12, atol=1e-12)


def test_tensorsketch_puts_each_entry_into_its_bucket() -> None:
    """Against the definition, entry by entry: bucket (a(v) + b(w)) mod dim, sign s(v) r(w)."""
    dim, layer = 31, LayerShape("a", 9, 6)
    projector = make_projector("tensorsketch", dim, 9, [layer])
    (a, s), (b, r) = buckets_and_signs(9, 0, "row", 9, dim), buckets_and_signs(9, 0, "col", 6, dim)
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros(dim, dtype=torch.float64)
    for v in range(9):
        for w in range(6):
            expected[(a[v] + b[w]) % dim] += s[v] * r[w] * matrix[v, w]
    torch.testing.assert_close(projector.project_matrix(0, [(0, matrix)]), expected, rtol=1e-12, atol=1e-12)
