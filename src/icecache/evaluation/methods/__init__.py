"""The methods that are compared, one a file."""
