"""One thin module per verb of the `scone` command."""
