"""skipstone.kernels"""
