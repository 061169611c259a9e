"""Seconds, fit and advice for one placement: what is known of it before anything runs."""
