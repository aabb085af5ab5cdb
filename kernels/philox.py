"""Noise as a function: Philox4x32-10 (Salmon et al. 2011) and Box-Muller normals, on the device.

The counter is (block, step, id low, id high), the key the seed's 64 bits; block b yields elements
4b to 4b+3 of a sample in C, H, W order. The torch twins, which define the result, are
`reference.philox_words` and `reference.philox_normal`, exported here too. Words agree bit for bit.
Normals are within a few ulp of the exact function of those words, which the twin's float32 angle is
not quite near the zeros of sin and cos: there the two differ by up to 2^-21 of the radius.
"""

from __future__ import annotations

from .launch import constexpr, jit, tl
from .reference import INITIAL_STEP, philox_normal, philox_words

__all__ = ["INITIAL_STEP", "box_muller", "normal4", "normal_at", "philox_normal", "philox_words", "split64", "words"]

_M0, _M1 = constexpr(0xD2511F53), constexpr(0xCD9E8D57)
_W0, _W1 = constexpr(0x9E3779B9), constexpr(0xBB67AE85)


@jit
def split64(x):
    """The low and high 32 bits of an int64, as uint32: a seed's key words, or an id's counter words."""
    return (x & 0xFFFFFFFF).to(tl.uint32), ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@jit
def words(k0, k1, c0, c1, c2, c3):
    """Ten rounds of Philox4x32: four uint32 words for each counter. All arguments are uint32 and broadcast."""
    for _ in tl.static_range(10):
        h0, h1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        l0, l1 = tl.mul(c0, _M0, sanitize_overflow=False), tl.mul(c2, _M1, sanitize_overflow=False)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def _uniform(w):
    """In (0, 1]: float32(w) * 2^-32 + 2^-33."""
    return tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@jit
def _cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1], within 2 ulp.

    u minus the nearest quarter turn is exact in float32, so no angle is ever rounded; the library's
    sine would round 2 pi u first, and keeps a stack frame for arguments that never occur here.
    Minimax polynomials on an eighth of a turn either way, then the quadrant.
    """
    quarter = tl.floor(tl.fma(u, 4.0, 0.5))
    f = tl.fma(quarter, -0.25, u)
    s = f * f
    sin = tl.fma(tl.fma(tl.fma(s, -75.39356231689453, 81.59235382080078), s, -41.3416633605957), s, 6.2831854820251465)
    sin = sin * f
    cos = tl.fma(tl.fma(s, 59.24596405029297, -85.44374084472656), s, 64.93932342529297)
    cos = tl.fma(tl.fma(cos, s, -19.739208221435547), s, 1.0)
    q = quarter.to(tl.int32)
    odd = (q & 1) != 0
    c, d = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((q + 1) & 2) != 0, -c, c), tl.where((q & 2) != 0, -d, d)


@jit
def box_muller(w0, w1):
    """Two independent standard normals from two words: r cos(a), r sin(a); float32."""
    r = tl.sqrt_rn(-2.0 * tl.log(_uniform(w0)))
    c, s = _cos_sin_turns(_uniform(w1))
    return r * c, r * s


@jit
def normal4(k0, k1, block, step, id0, id1):
    """Elements 4 * block to 4 * block + 3 of a sample's noise, each in the shape of ``block`` (uint32).

    ``k0, k1`` and ``id0, id1`` come from `split64` of the seed and of the id; ``step`` is uint32.
    """
    w0, w1, w2, w3 = words(k0, k1, block, step, id0, id1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@jit
def normal_at(k0, k1, element, step, id0, id1):
    """The noise of each ``element`` (uint32, its index in C, H, W order): one block each, four times the work
    of `normal4`, for threads whose elements are no neighbours in that order."""
    w0, w1, w2, w3 = words(k0, k1, element >> 2, step, id0, id1)
    second = (element & 2) != 0
    z0, z1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((element & 1) != 0, z1, z0)
