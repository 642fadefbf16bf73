"""Words on a command line -> calls of the rooms, printed for people or as JSON."""
