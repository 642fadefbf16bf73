"""A job and its words -> the same job on a Ray cluster: its log, last line and exit code."""
