"""The passes in C++ (``csrc/``), for the CPU: each file has the names and signatures of its
namesake in ``ops/eager``. Computed in fp64 for fp64, in fp32 for fp32 and bf16.
"""
