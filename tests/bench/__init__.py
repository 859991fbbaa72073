"""Benchmarks against peers, in the same run on the same machine: see docs/benchmarks.md. Never a test."""
