"""Adapters to other libraries; each imports its library inside this package only."""
