"""Answered requests -> what is remembered of them, and the truth that comes later."""
