"""Looped reasoning: does more thinking at test time help or harm?"""
