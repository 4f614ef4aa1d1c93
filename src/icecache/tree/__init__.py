"""Which tokens belong together, and which of them a query wants."""
