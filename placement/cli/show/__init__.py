"""Results as text and pictures for people."""
