"""skipstone.train"""
