"""skipstone.heads"""
