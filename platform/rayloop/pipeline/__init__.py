"""The stages one after the other: raw rows -> a served model, checked against real traffic."""
