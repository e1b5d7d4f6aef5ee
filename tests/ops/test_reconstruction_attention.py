"""reconstruction_attention: every backend against fp64, forward and backward, in its three forms."""

import pytest
import torch

from impure_fast import ops
from impure_fast.errors import BackendError, InputError, InputTypeError
from impure_fast.ops.reconstruction_attention import SPEC, _unpack, replica_rows

from ..tolerances import assert_near
from .common import DTYPES, backends, backends_and_dtypes, device_of, gradients, need, poisoned, randn

NAME = "reconstruction_attention"
# name: batch, queries, keys, heads, width, chunks
CASES = {
    "encoder-17": (2, 17, 17, 2, 32, 0),
    "encoder-50": (2, 50, 50, 2, 64, 0),
    "encoder-65": (2, 65, 65, 2, 24, 0),
    "tiny-encoder": (2, 65, 65, 3, 32, 0),
    "decoder-197": (1, 197, 197, 2, 32, 0),
    "hidden": (2, 16, 65, 2, 32, 0),
    "hidden-49-197": (1, 49, 197, 1, 32, 0),
    "shared": (2, 34, 34, 2, 16, 2),
    "shared-4": (1, 2 * 48 + 4, 2 * 48 + 4, 2, 32, 4),
    "shared-3": (2, 2 * 9 + 3, 2 * 9 + 3, 1, 6, 3),
    "one-token": (3, 1, 1, 1, 8, 0),
    "odd": (1, 31, 7, 3, 10, 0),
    "width-80": (1, 33, 33, 1, 80, 0),
    "width-128": (1, 20, 20, 1, 128, 0),
}
LONG = {f"long-{t}": (1, t, t, 1, 32, 0) for t in (255, 256, 257, 289, 785)}
by_case = pytest.mark.parametrize("case", CASES)


def qkv(case, dtype, device="cpu", packed=True):
    """q, k, v of a case; views of packed rows where queries and keys are as many."""
    batch, queries, keys, heads, width, chunks = {**CASES, **LONG}[case]
    if queries == keys and packed:
        return (*randn(batch, keys, 3, heads, width, dtype=dtype, device=device).unbind(2), chunks)
    q = randn(batch, queries, heads, width, dtype=dtype, device=device)
    return q, *randn(batch, keys, 2, heads, width, dtype=dtype, device=device, seed=1).unbind(2), chunks


def check(case, dtype, backend, backward=True):
    q, k, v, chunks = qkv(case, dtype, device_of(backend))

    def run(on):
        return lambda q, k, v: ops.reconstruction_attention(q, k, v, chunks=chunks, backend=on)

    truth, true_grads = gradients(run("reference"), [x.double() for x in (q, k, v)])
    own, own_grads = gradients(run("reference"), [q, k, v])
    with poisoned():
        got, grads = gradients(run(backend), [q, k, v])
    assert_near(NAME, got, own, truth)
    for grad, own_grad, true_grad in zip(grads, own_grads, true_grads, strict=True):
        assert_near(NAME, grad, own_grad, true_grad)


@by_case
@backends_and_dtypes(NAME)
def test_parity_with_fp64(case, dtype, backend):
    need(NAME, backend)
    check(case, dtype, backend)


@pytest.mark.parametrize("case", LONG)
@backends_and_dtypes(NAME, ("fp32", "bf16"))
def test_parity_at_many_tokens(case, dtype, backend):
    need(NAME, backend)
    if backend == "triton" and device_of(backend) == "cpu" and case not in ("long-257", "long-289"):
        pytest.skip("takes too long in Triton's interpreter")
    check(case, dtype, backend)


@pytest.mark.parametrize("case", ["encoder-17", "hidden", "shared-3"])
@backends_and_dtypes(NAME)
def test_log_sum_exp(case, dtype, backend):
    need(NAME, backend)
    q, k, v, chunks = qkv(case, dtype, device_of(backend))
    _, truth = ops.reconstruction_attention(
        q.double(), k.double(), v.double(), chunks=chunks, return_lse=True, backend="reference"
    )
    with poisoned():
        _, lse = ops.reconstruction_attention(q, k, v, chunks=chunks, return_lse=True, backend=backend)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == truth.shape
    assert float((lse - truth).abs().max()) < 2e-6


@backends(NAME)
def test_strides_do_not_matter(backend):
    need(NAME, backend)
    device = device_of(backend)
    q, k, v, _ = qkv("encoder-17", torch.float32, device, packed=False)
    wanted = ops.reconstruction_attention(q, k, v, backend=backend)
    layouts = {
        "heads before tokens": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "width not contiguous": [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)],
        "every other row": [x.repeat_interleave(2, dim=1)[:, ::2] for x in (q, k, v)],
        "with an offset": [torch.cat((x, x), dim=3)[..., x.shape[3] :] for x in (q, k, v)],
    }
    for name, given in layouts.items():
        assert torch.equal(ops.reconstruction_attention(*given, backend=backend), wanted), name
    one = [x[:1].expand(3, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(ops.reconstruction_attention(*one, backend=backend), wanted[:1].expand(3, -1, -1, -1))


@backends_and_dtypes(NAME, ("fp32", "bf16"))
@pytest.mark.filterwarnings("ignore:invalid value")  # of Triton's interpreter
def test_scores_that_are_no_numbers_stay_with_their_query(dtype, backend):
    need(NAME, backend)
    device = device_of(backend)
    x = torch.randn(2, 33, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v = x[:, :, 0].clone(), x[:, :17, 1].clone(), x[:, :17, 2]
    for scale in (0.4, -0.4):
        out, lse = ops.reconstruction_attention(q, k, v, scale=scale, return_lse=True, backend=backend)
        truth, own = ops.reconstruction_attention(
            q.double(), k.double(), v.double(), scale=scale, return_lse=True, backend="reference"
        )
        assert float((out - truth).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert float((lse - own).abs().max()) < 1e-5
    q[1, 20] = torch.nan
    broken = ops.reconstruction_attention(q, k, v, scale=-0.4, backend=backend)
    assert broken[1, 20].isnan().all()
    broken[1, 20] = out[1, 20]
    assert torch.equal(broken, out)


@backends(NAME)
def test_expanded_gradient(backend):
    need(NAME, backend)
    q, k, v, _ = qkv("encoder-17", torch.float32, device_of(backend))
    results = []
    for on in (backend, "reference"):
        leaf = q.detach().clone().requires_grad_()
        ops.reconstruction_attention(leaf, k, v, backend=on).sum().backward()
        results.append(leaf.grad)
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize(("shape", "chunks"), [((0, 17, 2, 8), 0), ((0, 34, 2, 8), 2)])
@backends(NAME)
def test_empty_batch(shape, chunks, backend):
    need(NAME, backend)
    x = torch.zeros(shape, device=device_of(backend), requires_grad=True)
    out, lse = ops.reconstruction_attention(x, x, x, chunks=chunks, return_lse=True, backend=backend)
    assert out.shape == ((0, 2, 17, 2, 8) if chunks else shape)
    assert lse.shape == ((0, 2, 2, 17) if chunks else (0, 2, 17))
    out.sum().backward()
    assert x.grad.shape == shape


@backends(NAME)
def test_two_calls_are_bitwise_equal(backend):
    need(NAME, backend)
    q, k, v, chunks = qkv("shared-4", torch.float32, device_of(backend))
    first, second = (
        gradients(lambda *x: ops.reconstruction_attention(*x, chunks=chunks, backend=backend), [q, k, v])
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("backend", ["reference", *SPEC.dtypes])
def test_shared_form_is_the_plain_one_on_materialised_replicas(backend):
    need(NAME, backend)
    q, k, v, chunks = qkv("shared-4", torch.float32, device_of(backend))
    shared = ops.reconstruction_attention(q, k, v, chunks=chunks, backend=backend)
    plain = ops.reconstruction_attention(*(_unpack(x, chunks) for x in (q, k, v)), backend=backend)
    assert torch.allclose(shared.flatten(0, 1), plain, atol=1e-6)


def test_row_map_reads_the_head_and_hides_one_chunk():
    wanted = [[12, 6, 7, 2, 3, 4, 5], [13, 0, 1, 8, 9, 4, 5], [14, 0, 1, 2, 3, 10, 11]]
    assert replica_rows(6, 3).tolist() == wanted


@backends(NAME)
def test_each_replica_is_stabilised_by_its_own_maximum(backend):
    need(NAME, backend)
    q, k, v, chunks = qkv("shared", torch.float32, device_of(backend))
    q, k = q.clone(), k.clone()
    k[:, 16] += 300.0  # a noised row that replica 0 alone reads
    q[:] = q.abs() + 1.0
    got = ops.reconstruction_attention(q, k, v, chunks=chunks, backend=backend)
    truth = ops.reconstruction_attention(q.double(), k.double(), v.double(), chunks=chunks, backend="reference")
    assert float((got - truth).abs().max()) < 1e-4


@backends(NAME)
def test_large_scores_do_not_overflow(backend):
    need(NAME, backend)
    q, k, v, _ = qkv("encoder-17", torch.float32, device_of(backend))
    got = ops.reconstruction_attention(100 * q, 100 * k, v, backend=backend)
    truth = ops.reconstruction_attention(100 * q.double(), 100 * k.double(), v.double(), backend="reference")
    assert bool(got.isfinite().all()) and float((got - truth).abs().max()) < 1e-2


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", ["one-token", "shared-3", "odd"])
def test_gradcheck(case, backend):
    need(NAME, backend)
    q, k, v, chunks = qkv(case, torch.float64)
    inputs = [x[:1].detach().clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: ops.reconstruction_attention(*x, chunks=chunks, backend=backend), inputs)


@pytest.mark.parametrize("case", ["encoder-17", "hidden", "shared-3"])
@backends(NAME)
def test_opcheck(case, backend):
    need(NAME, backend)
    q, k, v, chunks = qkv(case, torch.float32, device_of(backend))
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(SPEC.overloads[backend], (q, k, v, 0.3, chunks))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_fullgraph_compile_and_export_with_a_dynamic_batch(backend):
    need(NAME, backend)

    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.reconstruction_attention(*x.unbind(2), chunks=3, backend=backend)

    x = randn(2, 21, 3, 1, 6, device=device_of(backend))
    wanted = Net()(x)
    assert torch.allclose(torch.compile(Net(), fullgraph=True, backend="aot_eager")(x), wanted, atol=1e-6)
    program = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert torch.allclose(program.module()(torch.cat((x, x, x))), torch.cat((wanted,) * 3), atol=1e-6)
    calls = [str(node.target) for node in program.graph.nodes]
    assert (f"impure_fast.{NAME}.{backend}" in calls) == (backend != "reference")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_the_inputs(dtype):
    q, k, v, _ = qkv("one-token", torch.float32)
    with torch.autocast("cpu", DTYPES[dtype]):
        assert ops.reconstruction_attention(q, k, v).dtype == DTYPES[dtype]
        assert ops.reconstruction_attention(q.double(), k.double(), v.double()).dtype == torch.float64


X = torch.zeros(2, 6, 2, 8)
WRONG = {
    "rank": ((X[0], X, X), {}, InputError, r"q \[6, 2, 8\].*wanted q \[B, Tq, heads, width\]"),
    "heads": ((X[:, :, :1], X, X), {}, InputError, r"q \[2, 6, 1, 8\]"),
    "no keys": ((X, X[:, :0], X[:, :0]), {}, InputError, "must not be empty"),
    "values": ((X, X, X[:, :3]), {}, InputError, r"v \[2, 3, 2, 8\]"),
    "chunks": ((X, X, X), {"chunks": 4}, InputError, r"chunks=4 wants 2L \+ K rows"),
    "dtypes": ((X, X.half(), X), {}, InputTypeError, "q is torch.float32, but k is torch.float16"),
    "devices": ((X, X.to("meta"), X), {}, InputError, "q is on cpu, but k is on meta"),
    "backend": ((X, X, X), {"backend": "fast"}, BackendError, "no backend 'fast'; choose one of auto, reference"),
    "cuda": ((X, X, X), {"backend": "cuda"}, BackendError, r"backend 'cuda': .*float32\[2, 6, 2, 8\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_what_was_given(wrong):
    args, options, kind, message = WRONG[wrong]
    with pytest.raises(kind, match=message):
        ops.reconstruction_attention(*args, **options)
