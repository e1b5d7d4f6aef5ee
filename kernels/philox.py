"""Philox4x32-10 and Box-Muller in registers: word for word, and to rounding, the numbers of ``Draws``.

Key: the seed; counter: (element // 4, stream low, stream high, purpose); element e takes word e % 4.
About 20 instructions a normal where one thread makes all four of a counter, four times that where it makes one.
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
def normal_of_words(first, second):
    """Two standard normals of two words."""
    u = (first >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24: exact, and so is 1 - u
    angle = (second >> 8).to(tl.float32) * 5.9604644775390625e-08 * 6.283185307179586
    radius = tl.sqrt_rn(-2.0 * tl.log(1.0 - u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, stream, block, PURPOSE: tl.constexpr):
    """Elements 4 * block .. 4 * block + 3: a tile [R, B] of blocks -> [R, 4 * B], neighbours in one thread."""
    w0, w1, w2, w3 = words(seed, stream, block, PURPOSE)
    n0, n1 = normal_of_words(w0, w1)
    n2, n3 = normal_of_words(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(block.shape[0], 4 * block.shape[1])


@triton.jit
def normal(seed, stream, element, PURPOSE: tl.constexpr):
    """One normal for each element of any tile."""
    w0, w1, w2, w3 = words(seed, stream, element // 4, PURPOSE)
    second = element % 4 >= 2
    cosine, sine = normal_of_words(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where(element % 2 == 1, sine, cosine)
