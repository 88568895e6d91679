"""Continuous batching over a decoder and an f-gram table. Knows no HTTP."""
