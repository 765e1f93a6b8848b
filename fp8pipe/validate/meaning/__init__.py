"""What config.json and names say that a checkpoint should be: formats, schemes, layout."""
