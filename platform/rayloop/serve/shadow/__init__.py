"""Copies of answered requests -> how a version that answers nobody compares."""
