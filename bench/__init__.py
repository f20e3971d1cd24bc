"""skipstone.bench"""
