"""Finished runs -> the one to register."""
