"""What tests and benchmarks share: one gate, one table of op inputs, Triton's interpreter mended."""
