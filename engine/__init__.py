"""skipstone.engine"""
