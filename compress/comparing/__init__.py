"""Models that were made of one, side by side: what each takes, how fast it is, what it lost."""
