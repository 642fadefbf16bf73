"""A dataset or a folder and a version -> the answers the server would give, in files."""
