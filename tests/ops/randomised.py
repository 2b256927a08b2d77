"""hypothesis, and what it draws for the ops: strides, and vocabularies up to the largest in use.

Where it is not installed (a GPU machine may have few packages), its tests are skipped.
"""

import pytest
import torch

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Strategies:
        """Stands for every strategy and for what is made of it."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    st = _Strategies()

    def given(*args, **kwargs):
        def skipped(_function):
            @pytest.mark.skip(reason="hypothesis is not installed")
            def test():
                pass

            return test

        return skipped

    def settings(*args, **kwargs):
        return lambda function: function


# A few tokens, sizes around those of vectors and caches, and any size up to that of Gemma's and Qwen's vocabularies.
VOCABS = st.one_of(st.integers(1, 90), st.sampled_from([32_000, 50_257, 65_536]), st.integers(91, 200_003))


def strided(data, x):
    """x with its dimensions in any order in memory, and with gaps between them that no op may read: NaN or -2^62."""
    order = data.draw(st.permutations(range(x.dim())), label="order in memory")
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=x.dim(), max_size=x.dim()), label="gaps")
    sizes = [x.shape[d] + gap for d, gap in zip(order, gaps, strict=True)]
    buffer = torch.full(sizes, torch.nan if x.is_floating_point() else -(2**62), dtype=x.dtype)
    inside = buffer[tuple(slice(x.shape[d]) for d in order)]
    return inside.permute([order.index(d) for d in range(x.dim())]).copy_(x)


def assert_strides_do_not_matter(data, function, tensors, grad_of):
    """function(**tensors) and its gradients are the same for tensors, and for an upstream gradient, of any strides."""

    def run(layout):
        leaves = {k: layout(v).requires_grad_(k in grad_of) for k, v in tensors.items()}
        result = function(**leaves)
        # In float16 torch counts the elements in float16, too, which gives NaN from 65,504 on.
        upstream = layout(torch.linspace(-1, 1, result.numel()).to(result.dtype).reshape(result.shape))
        return result.detach(), torch.autograd.grad(result, [leaves[k] for k in grad_of], upstream)

    plain = run(lambda x: x.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(run(lambda x: strided(data, x)), plain)


__all__ = ["VOCABS", "assert_strides_do_not_matter", "given", "settings", "st", "strided"]
