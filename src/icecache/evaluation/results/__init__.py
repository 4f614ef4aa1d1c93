"""What a run found: kept line by line, summed up, drawn."""
