"""Shared parts of the ratio benchmarks: pairing, CPU accounting, peers, reports."""
