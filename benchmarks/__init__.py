"""What guidance costs: one file per question, `make bench` asks them all and writes BENCHMARKS.md.

Times are never compared across runs: `timing.interleaved` takes turns between the contestants, and
what is reported are medians and ratios of the same round.
"""
