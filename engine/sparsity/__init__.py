"""skipstone.engine.sparsity"""
