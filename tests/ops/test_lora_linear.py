"""lora_linear: the five tests of every op, the kernels beneath it, and layers that share an input."""

import pytest
import torch
from torch.nn.functional import linear

from fastft.ops import _extension, lora_linear, lora_linears, reference
from fastft.ops.lora_linear import FORMS, pick_form
from tests.ops.op_checks import CUDA_DTYPES, DTYPES, assert_as_accurate, run, supported, to_float64
from tests.ops.randomised import assert_strides_do_not_matter, given, settings, st

LEAVES = ("x", "lora_A", "lora_B", "bias")


def inputs(rows, K, N, r, dtype=torch.float64, device="cpu", bias=True):
    shapes = {"x": (*rows, K) if isinstance(rows, tuple) else (rows, K), "weight": (N, K), "lora_A": (r, K)}
    shapes |= {"lora_B": (N, r)} | ({"bias": (N,)} if bias else {})
    generator = torch.Generator().manual_seed(K + 31 * N + r)
    return {k: (torch.randn(s, generator=generator) / s[-1] ** 0.5).to(dtype).to(device) for k, s in shapes.items()}


def check(tensors, dtype, grad_of=LEAVES, scaling=0.7, **options):
    grad_of = tuple(k for k in grad_of if k in tensors)
    generator = torch.Generator().manual_seed(1)
    shape = (*tensors["x"].shape[:-1], tensors["weight"].shape[0])
    dy = torch.randn(shape, generator=generator).to(dtype).to(tensors["x"].device)
    ours, our_grads = run(lambda **t: lora_linear(**t, scaling=scaling, **options), tensors, grad_of, dy)
    plain, plain_grads = run(lambda **t: reference.lora_linear(**t, scaling=scaling), tensors, grad_of, dy)
    truth, true_grads = run(
        lambda **t: reference.lora_linear(**t, scaling=scaling), to_float64(tensors), grad_of, dy.double()
    )
    assert ours.dtype == dtype
    assert_as_accurate(ours, plain, truth, "y", dtype)
    for k in grad_of:
        assert our_grads[k].dtype == dtype
        assert_as_accurate(our_grads[k], plain_grads[k], true_grads[k], f"gradient of {k}", dtype)


def need_main_loop(device, dtype):
    """Skips where that form has no kernel for layers whose sizes are multiples of 8."""
    sizes = inputs(8, 8, 8, 8, dtype, device)
    try:
        pick_form("main_loop", device, dtype, [sizes["weight"]], [sizes["lora_A"]])
    except ValueError as why:
        pytest.skip(str(why))


# 1. Against float64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_against_float64(device, dtype, form):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} has no {device.type} kernel")
    if form == "main_loop":
        need_main_loop(device, dtype)
    # The kernel of main_loop takes multiples of 8, and has tiles of 128 rows and of 128 or 256 columns.
    sizes = ((33, 256, 136, 16), (7, 64, 304, 48), (300, 136, 520, 8), (129, 8, 8, 72), (600, 72, 264, 16))
    for rows, K, N, r in sizes if form == "main_loop" else ((33, 257, 131, 16), (7, 64, 300, 48)):
        check(inputs(rows, K, N, r, dtype, device), dtype, form=form)
    check(inputs((2, 19), 96, 80, 8, dtype, device), dtype, form=form)
    check(inputs((2, 19), 96, 80, 8, dtype, device, bias=False), dtype, form=form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_capability(capability, dtype):
    for rows, K, N, r in ((13, 70, 130, 16), (6, 64, 64, 33), (131, 7, 9, 3)):
        check(inputs(rows, K, N, r, dtype), dtype, form="kernels")


@pytest.mark.parametrize("form", FORMS)
def test_matches_peft(form):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 3, 24)
    y = lora_linear(x, weight, A, B, 1.5, bias, form=form)
    torch.testing.assert_close(y, model(x))
    ours = torch.autograd.grad(y.square().sum(), (A, B))
    theirs = torch.autograd.grad(model(x).square().sum(), (A, B))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# 2. gradcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    tensors = inputs((2, 3), 5, 4, 2)
    leaves = [tensors[k].requires_grad_() for k in LEAVES]
    weight = tensors["weight"]
    assert torch.autograd.gradcheck(lambda x, A, B, bias: lora_linear(x, weight, A, B, 0.7, bias, form=form), leaves)
    trained = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, A, B: lora_linear(x, w, A, B, 0.7, form=form), (leaves[0], trained, *leaves[1:3])
    )


# 3. opcheck, torch.compile, autocast --------------------------------------------------------------------


def test_opcheck(device):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    t = inputs(5, 7, 9, 3, dtype, device)
    ops, u, y = torch.ops.fastft, torch.empty(5, 3, dtype=dtype, device=device), t["x"] @ t["weight"].t()
    writes = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.lora_down.default, (t["x"], t["lora_A"], 0.5, u), test_utils=writes)
    torch.library.opcheck(ops.lora_up.default, (y, u, t["lora_B"]), test_utils=writes)
    for transposed in (False, True):
        torch.library.opcheck(ops.lora_outer.default, (u, y, transposed))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_graph_breaks(device, form):
    if form == "main_loop":
        need_main_loop(device, torch.float32)
    t = inputs((2, 3), 8, 6, 2, torch.float32, device)
    leaves = [t[k].requires_grad_() for k in LEAVES]

    def f(x, A, B, bias):
        return lora_linear(x, t["weight"], A, B, 0.7, bias, form=form).square().sum()

    expected = torch.autograd.grad(f(*leaves), leaves)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs():
    t = inputs(4, 16, 12, 4, torch.float32)
    leaves = [t[k].requires_grad_() for k in LEAVES]
    x, A, B, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, t["weight"], A, B, 0.7, bias)
        expected = linear(x, t["weight"], bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    low = {k: v.detach().bfloat16() for k, v in t.items()}
    assert torch.equal(y, lora_linear(low["x"], low["weight"], low["lora_A"], low["lora_B"], 0.7, low["bias"]))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), leaves))


# 4. Hard shapes -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_strides(data):
    """Rows and small matrices may be strided; nothing beyond an operand is read or written."""
    size = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 128, 129]))
    M, K, N, r = (data.draw(size, label=label) for label in ("M", "K", "N", "r"))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(0)

    def strided(rows, columns):
        row_gap, by_column = data.draw(st.integers(0, 5)), data.draw(st.booleans())
        if by_column:
            return torch.randn(columns, rows + row_gap).to(dtype)[:, :rows].t()
        return torch.randn(rows, columns + row_gap).to(dtype)[:, :columns]

    def rows_of(rows, columns):
        buffer = torch.full((rows, columns + 3), 7.0, dtype=dtype)
        buffer[:, :columns].copy_(torch.randn(rows, columns))
        return buffer, buffer[:, :columns]

    def exact(out, truth, *terms):
        """Of sums of n products: n roundings in the accumulation dtype, one in dtype."""
        scale = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (K + M + r + 8)
        size = sum(a.double().abs() @ b.double().abs() for a, b in terms) if terms else 0
        bound = 2 * scale * size + torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny * 4
        assert ((out.double() - truth).abs() <= bound).all()

    ops = torch.ops.fastft
    a, b = strided(r, K), strided(N, r)
    (_, x), (u_buffer, u), (y_buffer, y) = rows_of(M, K), rows_of(M, r), rows_of(M, N)
    ops.lora_down(x, a, 0.5, u)
    exact(u, 0.5 * x.double() @ a.double().t(), (x, a.t()))
    before = y.clone()
    ops.lora_up(y, u, b)
    exact(y, before.double() + u.double() @ b.double().t(), (u, b.t()), (before, torch.eye(N)))
    assert (u_buffer[:, r:] == 7).all() and (y_buffer[:, N:] == 7).all()
    truth = u.double().t() @ y.double()
    exact(ops.lora_outer(u, y, False), truth, (u.t(), y))
    exact(ops.lora_outer(u, y, True), truth.t(), (y.t(), u))


def test_splits_of_the_cuda_kernels_fill_an_h200_and_stay_long():
    splits_of = _extension.load().lora_splits
    for length in (1, 128, 2048, 7168, 8192, 28672):
        for depth in (1, 576, 2048, 7168, 28672):
            for r in (1, 16, 48, 256):
                blocks, splits, split_depth, floats = splits_of(length, depth, r, 2)
                least = 16 * (16 if r <= 16 else 64)
                assert split_depth % 64 == 0 and (splits - 1) * split_depth < depth <= splits * split_depth
                assert splits == 1 or split_depth >= least
                assert blocks * splits >= 132 or split_depth - 64 < least
                assert floats == splits * blocks * 128 * (16 if r <= 16 else 64)


def test_splits_of_the_paired_kernel_cover_y_once():
    plan_of = _extension.load().lora_pair_splits
    for M in (1, 128, 300, 2048, 8192):
        for N in (1, 512, 576, 7168, 28672):
            fused, columns, column_splits, rows, row_splits, floats = plan_of(M, N, 16, True)
            assert fused and columns == 512 and rows % 128 == 0 and rows >= 256
            assert (column_splits - 1) * columns < N <= column_splits * columns
            assert (row_splits - 1) * rows < M <= row_splits * rows
            assert column_splits * row_splits >= 132 or rows == 256
            tiles = [-(-n // 128) for n in (M, N)]
            assert floats == 128 * 16 * (column_splits * tiles[0] + row_splits * tiles[1])
    # One after the other, in the scratch of the one that needs more.
    splits_of = _extension.load().lora_splits
    for r, two_bytes in ((17, True), (16, False)):
        fused, *_, floats = plan_of(2048, 576, r, two_bytes)
        size = 2 if two_bytes else 4
        assert not fused and floats == max(splits_of(2048, 576, r, size)[3], splits_of(576, 2048, r, size)[3])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), form=st.sampled_from(FORMS), layers=st.integers(1, 2))
def test_any_strides(data, form, layers):
    """Of everything, also of the gradient from above."""
    shapes = {"x": (2, 3, 10)}
    for i, N in enumerate((7, 5)[:layers]):
        shapes |= {f"weight_{i}": (N, 10), f"lora_A_{i}": (4, 10), f"lora_B_{i}": (N, 4), f"bias_{i}": (N,)}
    tensors = {k: torch.randn(shape, dtype=torch.float64) for k, shape in shapes.items()}

    def function(x, **t):
        lists = ([t[f"{k}_{i}"] for i in range(layers)] for k in ("weight", "lora_A", "lora_B", "bias"))
        weights, As, Bs, biases = lists
        return torch.cat(lora_linears(x, weights, As, Bs, 0.7, biases, form=form), -1)

    assert_strides_do_not_matter(data, function, tensors, list(tensors))


def test_empty_batch_and_rank_one():
    for form in FORMS:
        t = inputs(0, 6, 5, 1)
        leaves = [t[k].requires_grad_() for k in LEAVES]
        y = lora_linear(leaves[0], t["weight"], *leaves[1:3], 1.0, leaves[3], form=form)
        assert y.shape == (0, 5)
        assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves))
        check(inputs(3, 6, 1, 1), torch.float64, form=form)


def test_vector_and_strided_inputs():
    t = inputs(6, 10, 4, 2)
    y = lora_linear(t["x"][0], t["weight"], t["lora_A"], t["lora_B"], 0.7, t["bias"])
    assert y.shape == (4,)
    wide = torch.randn(10, 6, dtype=torch.float64).t()  # rows are not contiguous
    check(t | {"x": wide}, torch.float64)


def test_same_bits_for_any_number_of_threads():
    t = inputs(300, 257, 200, 16, torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        y, grads = run(lambda **t: lora_linear(**t, scaling=0.7, form="kernels"), t, LEAVES, torch.ones(300, 200))
        results.append((y, *grads.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# CUDA ---------------------------------------------------------------------------------------------------

RANKS = [1, 4, 16, 17, 48, 64, 100, 256]


def strided(rows, columns, gap, dtype, device, by_column=False):
    """[rows, columns] of random numbers with a gap after each row, or after each column; around it NaN."""
    shape = (columns, rows) if by_column else (rows, columns)
    buffer = torch.full((shape[0] + 1, shape[1] + gap), torch.nan, dtype=dtype, device=device)
    buffer[: shape[0], : shape[1]] = torch.randn(shape, device=device).to(dtype)
    inside = buffer[: shape[0], : shape[1]]
    return inside.t() if by_column else inside


def side_products(x, a, u, y, b):
    """All products: (lora_down, lora_up, lora_outer, its transpose, both of lora_down_outer)."""
    ops = torch.ops.fastft
    down, du, up = torch.full_like(u, torch.nan), torch.full_like(u, torch.nan), y.clone()
    ops.lora_down(x, a, 0.5, down)
    ops.lora_up(up, u, b)
    pair = ops.lora_down_outer(y, b.t(), 0.5, du, u)
    return down, up, ops.lora_outer(u, y, False), ops.lora_outer(u, y, True), du, pair


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_side_products_against_float64(device, dtype, r):
    """Edges and strides, aligned to 16 bytes and not; nothing beyond an operand is read; two runs, the same bits."""
    for M, K, N in ((1, 1, 1), (65, 129, 127), (128, 512, 256), (300, 1000, 72), (2049, 1537, 261)):
        for gap, by_column in ((0, False), (3, True), (8, False), (8, True)):
            x, y, u = (strided(M, n, gap, dtype, device) for n in (K, N, r))
            a, b = strided(r, K, gap, dtype, device, by_column), strided(N, r, gap, dtype, device, by_column)
            ours, again = side_products(x, a, u, y, b), side_products(x, a, u, y, b)
            assert all(torch.equal(one, two) for one, two in zip(ours, again, strict=True))
            outer = torch.mm(u.t(), y)
            plain = (
                0.5 * torch.mm(x, a.t()),
                torch.addmm(y, u, b.t()),
                outer,
                outer.t(),
                0.5 * torch.mm(y, b),
                outer.t(),
            )
            x, a, u, y, b = (t.double() for t in (x, a, u, y, b))
            outer = u.t() @ y
            truth = 0.5 * (x @ a.t()), y + u @ b.t(), outer, outer.t(), 0.5 * y @ b, outer.t()
            names = ("lora_down", "lora_up", "lora_outer", "lora_outer transposed", "du", "lora_outer of the pair")
            for name, *three in zip(names, ours, plain, truth, strict=True):
                assert_as_accurate(*three, f"{name} {M}x{K}x{N} gap {gap}", dtype, terms=8.0 * (K + M + N) ** 0.5)


def test_side_products_write_only_their_own_elements(device):
    for dtype in CUDA_DTYPES:
        for M, N, r, gap in ((65, 130, 16, 3), (65, 130, 5, 3), (64, 128, 16, 8)):
            x, a, b = (torch.ones(s, dtype=dtype, device=device) for s in ((M, N), (r, N), (N, r)))
            buffers = [torch.full((M + 1, n + gap), 7.0, dtype=dtype, device=device) for n in (r, N)]
            u, y = (buffer[:M, :n] for buffer, n in zip(buffers, (r, N), strict=True))
            torch.ops.fastft.lora_down(x, a, 1.0, u)
            torch.ops.fastft.lora_up(y, u, b)
            assert (u == N).all() and (y == 7 + r * N).all()
            torch.ops.fastft.lora_down_outer(x, a, 2.0, u, torch.ones_like(u))
            assert (u == 2 * N).all()
            for buffer, n in zip(buffers, (r, N), strict=True):
                assert (buffer[:, n:] == 7).all() and (buffer[M:] == 7).all()


def test_side_products_of_nothing(device):
    for M, K, N, r in ((0, 8, 8, 4), (8, 0, 8, 4), (8, 8, 0, 4), (0, 0, 0, 1)):
        x, a, u, y, b = (torch.ones(s, device=device) for s in ((M, K), (r, K), (M, r), (M, N), (N, r)))
        down, up, outer, transposed, du, pair = side_products(x, a, u, y, b)
        assert (down == 0.5 * K).all() and (up == 1 + r).all() and (du == 0.5 * N).all()
        assert (outer == M).all() and (transposed == M).all() and (pair == M).all()
        assert outer.shape == (r, N) and transposed.shape == pair.shape == (N, r)


def test_cuda_stream_graph_and_second_device(device):
    if device.type == "cpu":
        pytest.skip("CUDA only")
    t = inputs(300, 520, 264, 16, torch.bfloat16, device)
    dy = torch.randn(300, 264, device=device).bfloat16()

    def step(device=device):
        leaves = {k: v.detach().to(device).requires_grad_(k in LEAVES) for k, v in t.items()}
        y = lora_linear(**leaves, scaling=0.7, form="kernels")
        return (y.detach(), *torch.autograd.grad(y, [leaves[k] for k in LEAVES], dy.to(device)))

    truth = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for _ in range(2):
            graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    for one, two, three in zip(truth, beside, captured, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    if torch.cuda.device_count() > 1:
        for one, two in zip(truth, step("cuda:1"), strict=True):
            assert torch.equal(one, two.to(device))


def test_float64_side_products_on_cuda_are_refused(device):
    if device.type == "cpu":
        pytest.skip("float64 is a CPU dtype")
    x, a, u, y, b = (
        torch.ones(s, dtype=torch.float64, device=device) for s in ((2, 3), (1, 3), (2, 1), (2, 4), (4, 1))
    )
    ops = torch.ops.fastft
    for call in (
        lambda: ops.lora_down(x, a, 1.0, u),
        lambda: ops.lora_up(y, u, b),
        lambda: ops.lora_outer(u, y, True),
        lambda: ops.lora_down_outer(y, b.t(), 1.0, u, u.clone()),
    ):
        with pytest.raises(RuntimeError, match="float64 is a CPU dtype"):
            call()


# 5. Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"x is \[2, 6\], expected \[\.\.\., 5\] like weight \[4, 5\]"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "x is torch.int64"),
        ({"weight": torch.zeros(5)}, r"weight is \[5\], expected \[N, K\]"),
        ({"weight": torch.zeros(4, 5).bfloat16()}, "weight is torch.bfloat16, expected torch.float32 like x"),
        ({"lora_A": torch.zeros(2, 6)}, r"lora_A is \[2, 6\], expected \[r, 5\]"),
        ({"lora_B": torch.zeros(3, 2)}, r"lora_B is \[3, 2\], expected \[4, 2\]"),
        ({"lora_B": torch.zeros(4, 2, device="meta")}, "lora_B is on meta, expected cpu"),
        ({"bias": torch.zeros(5)}, r"bias is \[5\], expected \[4\]"),
        ({"bias": "none"}, "bias is str, expected a tensor"),
        ({"form": "fast"}, "form is 'fast', expected one of kernels, products, epilogue, main_loop, or None"),
    ],
)
def test_errors_name_the_argument(change, message):
    t = {k: torch.zeros(s) for k, s in (("x", (2, 5)), ("weight", (4, 5)), ("lora_A", (2, 5)), ("lora_B", (4, 2)))}
    with pytest.raises(ValueError, match=f"lora_linear: {message}"):
        lora_linear(**(t | {"scaling": 1.0} | change))


def test_errors_of_several_layers_say_which():
    x, W, A, B = torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"lora_B of layer 1 is \[2, 4\]"):
        lora_linears(x, [W, W], [A, A], [B, B.t()], 1.0)
    with pytest.raises(ValueError, match="have 2, 1, 2, 2 elements"):
        lora_linears(x, [W, W], [A], [B, B], 1.0)


# What the layer costs, and layers of one input ----------------------------------------------------------


def saved_by(function):
    """Storages that autograd keeps for backward, as (data_ptr, bytes)."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return kept, result


def test_saves_the_parameters_themselves_and_nothing_of_the_output_size():
    t = inputs(50, 64, 96, 4, torch.float32)
    leaves = [t[k].requires_grad_() for k in ("x", "lora_A", "lora_B")]
    kept, y = saved_by(lambda: lora_linear(leaves[0], t["weight"], *leaves[1:], 0.7))
    own = {v.data_ptr() for v in t.values()}
    others = [n for p, n in kept.items() if p not in own]
    assert others == [50 * 4 * 4]  # u
    assert y.untyped_storage().data_ptr() not in kept


def test_no_gradient_is_computed_that_is_not_asked_for():
    t = inputs(6, 8, 5, 2)
    A = t["lora_A"].requires_grad_()
    y = lora_linear(t["x"], t["weight"], A, t["lora_B"], 0.7, t["bias"])
    y.sum().backward()
    assert A.grad is not None and all(t[k].grad is None for k in ("x", "weight", "lora_B", "bias"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_of_one_input_are_the_layers_one_by_one(form, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 40).to(dtype).requires_grad_()
    sizes = ((24, 4), (16, 4), (33, 7))
    weights = [torch.randn(N, 40).to(dtype) for N, _ in sizes]
    As = [torch.randn(r, 40).to(dtype).requires_grad_() for _, r in sizes]
    Bs = [torch.randn(N, r).to(dtype).requires_grad_() for N, r in sizes]
    biases = [torch.randn(24).to(dtype).requires_grad_(), None, torch.randn(33).to(dtype).requires_grad_()]
    leaves = [x, *As, *Bs, biases[0], biases[2]]
    dys = [torch.randn(2, 9, N).to(dtype) for N, _ in sizes]

    def gradients(outputs, of=(0, 1, 2)):
        pairs = [(outputs[i], dys[i]) for i in of]
        return torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs], allow_unused=True)

    together = lora_linears(x, weights, As, Bs, 0.7, biases, form=form)
    singly = [lora_linear(x, *t, 0.7, b, form=form) for *t, b in zip(weights, As, Bs, biases, strict=True)]
    loose = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(list(together), singly, **loose)
    torch.testing.assert_close(gradients(together), gradients(singly), **loose)
    # One output is not used: its layer gets no gradient, the others theirs.
    together = lora_linears(x, weights, As, Bs, 0.7, biases, form=form)
    singly = [lora_linear(x, *t, 0.7, b, form=form) for *t, b in zip(weights, As, Bs, biases, strict=True)]
    mine, theirs = gradients(together, of=(0, 2)), gradients(singly, of=(0, 2))
    assert not mine[2].any() and mine[5] is None and theirs[2] is None and theirs[5] is None
    torch.testing.assert_close(mine[:2] + mine[3:5] + mine[6:], theirs[:2] + theirs[3:5] + theirs[6:], **loose)


def test_a_linear_with_a_trained_bias_alone_keeps_no_input():
    """BitFit's backward is cheap in plain PyTorch: what is saved is the weight, for dx."""
    weight, bias = torch.randn(6, 5), torch.zeros(6, requires_grad=True)
    x = torch.randn(4, 3, 5, requires_grad=True).square()
    kept, _ = saved_by(lambda: linear(x, weight, bias))
    assert set(kept) <= {weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("form", FORMS)
def test_not_twice_differentiable(form):
    t = inputs(3, 5, 4, 2)
    x = t.pop("x").requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear is not twice differentiable"):
        torch.autograd.grad(lora_linear(x, **t, scaling=0.7, form=form).sum(), x, create_graph=True)
