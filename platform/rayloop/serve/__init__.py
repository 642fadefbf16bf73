"""Stage 7: request -> prediction + event."""
