"""Stage 2: a model's name and an image's shape -> a plain torch module."""
