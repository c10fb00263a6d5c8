"""Tests of flax_sbn; ``cases`` is shared with the benchmarks."""
