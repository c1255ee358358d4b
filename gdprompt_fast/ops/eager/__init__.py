"""The ops in plain PyTorch: any device, any floating dtype; what kernels are compared with."""
