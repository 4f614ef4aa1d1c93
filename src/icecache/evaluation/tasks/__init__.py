"""The tasks: where their samples come from, how they are asked and scored."""
