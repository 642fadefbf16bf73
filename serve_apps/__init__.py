"""Applications for `serve run` and `serve deploy`: a model of arguments and a builder each."""
