"""hypothesis; where it is not installed (a GPU machine may have few packages), its tests are skipped."""

import pytest

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


__all__ = ["given", "settings", "st"]
