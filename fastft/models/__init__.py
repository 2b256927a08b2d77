"""Loading decoder-only models and running them on packed sequences with shared prefixes."""
