"""Philox4x32-10 and Box-Muller in registers: word for word, and to rounding, the numbers of ``Draws``.

Key: the seed; counter: (element // 4, stream low, stream high, purpose); element e takes word e % 4.
About 63 instructions a normal where one thread makes all four of a counter, 150 where it makes one.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def words(seed, stream, block, PURPOSE: tl.constexpr):
    """The four 32-bit words of each counter."""
    low, high = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, tl.full((), PURPOSE, tl.uint32))


@triton.jit
def _circle(turn):
    """Cosine and sine of fp32(2 pi turn), turn in [0, 1), within 1e-7; no slow path for large arguments."""
    quarter = tl.floor(turn * 4.0 + 0.5)
    angle = turn * 6.283185307179586
    r = tl.fma(quarter, -1.5707963705062866, angle)  # fp32(pi / 2), exact in fma
    r = tl.fma(quarter, 4.3711390063094768e-08, r)  # and its error
    z = r * r
    cosine = tl.fma(tl.fma(z, 2.4438379114144482e-05, -0.0013887366512790322), z, 0.04166664555668831)
    cosine = tl.fma(cosine, z * z, tl.fma(z, -0.5, 1.0))
    sine = tl.fma(tl.fma(z, -0.00019495567539706826, 0.008331977762281895), z, -0.16666650772094727)
    sine = tl.fma(sine, z * r, r)
    q = quarter.to(tl.int32)
    odd = (q & 1) == 1
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((q + 1) & 2) == 2, -cosine, cosine), tl.where((q & 2) == 2, -sine, sine)


@triton.jit
def normal_of_words(first, second):
    """Two standard normals of two words."""
    u = (first >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24: exact, and so is 1 - u
    cosine, sine = _circle((second >> 8).to(tl.float32) * 5.9604644775390625e-08)
    radius = tl.sqrt_rn(-2.0 * tl.log(1.0 - u))
    return radius * cosine, radius * sine


@triton.jit
def _neighbours(x0, x1, x2, x3):
    """Four tiles [R, B] -> [R, 4 * B], in turns."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(x0.shape[0], 4 * x0.shape[1])


@triton.jit
def uniforms(seed, stream, block, PURPOSE: tl.constexpr):
    """As ``normals``: multiples of 2**-24 in [0, 1)."""
    w0, w1, w2, w3 = words(seed, stream, block, PURPOSE)
    return (_neighbours(w0, w1, w2, w3) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def normals(seed, stream, block, PURPOSE: tl.constexpr):
    """Elements 4 * block .. 4 * block + 3: a tile [R, B] of blocks -> [R, 4 * B], neighbours in one thread."""
    w0, w1, w2, w3 = words(seed, stream, block, PURPOSE)
    n0, n1 = normal_of_words(w0, w1)
    n2, n3 = normal_of_words(w2, w3)
    return _neighbours(n0, n1, n2, n3)


@triton.jit
def normal(seed, stream, element, PURPOSE: tl.constexpr):
    """One normal for each element of any tile."""
    w0, w1, w2, w3 = words(seed, stream, element // 4, PURPOSE)
    second = element % 4 >= 2
    cosine, sine = normal_of_words(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where(element % 2 == 1, sine, cosine)
