"""Torch's int8 kernels on x86."""
