"""What tests and benchmarks share: one gate, one table of op inputs, a mended interpreter."""
