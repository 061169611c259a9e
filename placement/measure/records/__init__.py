"""Run records: their schema, and the append-only log that keeps them."""
